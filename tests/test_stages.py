"""Stages know how far their convolutions reach, and what runs whole or in tiles follows from that."""

from fractions import Fraction

import tiny
from largerespatch.techniques.vae.stages import decoder_splits, encoder_splits, measure, scale_of


def sd_like(**changes):
    """The levels and layers of Stable Diffusion's VAE."""
    shape = {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 4, "layers_per_block": 2}
    return tiny.vae(**shape | changes)


def test_sd_splits_have_the_halos_that_their_convolutions_need():
    vae = sd_like()
    assert [split.halo for split in decoder_splits(vae.decoder)] == [10, 12, 13]
    assert [split.scale for split in decoder_splits(vae.decoder)] == [2, 4, 8]
    assert [split.halo for split in encoder_splits(vae.encoder)] == [8, 20, 48]
    assert measure(vae.decoder.mid_block).scale == 1


def test_a_stage_is_measured_in_cells_of_its_input():
    vae = sd_like()
    up, down = measure(vae.decoder.up_blocks[0]), measure(vae.encoder.down_blocks[0])
    # Three residual blocks of two convolutions, and one on the doubled map.
    assert (up.scale, up.reach, up.values) == (2, 6 + Fraction(1, 2), 4 * 32)
    # Two blocks, and one with a stride of 2, which is not centred.
    assert (down.scale, down.reach, down.values) == (Fraction(1, 2), 4 + 2, 32)
    assert scale_of([up, down, down]) == Fraction(1, 2)


def test_every_split_runs_each_stage_once_and_in_order():
    vae = sd_like()
    for half, splits in ((vae.decoder, decoder_splits(vae.decoder)), (vae.encoder, encoder_splits(vae.encoder))):
        called = [module for module in half.modules() if module in {stage.module for stage in splits[0].stages}]
        assert {stage.module for stage in splits[0].stages} == set(called)
        assert all(split.stages is splits[0].stages for split in splits)
    stages = len(decoder_splits(vae.decoder)[0].stages)
    assert [split.tiled for split in decoder_splits(vae.decoder)] == [range(start, stages) for start in (4, 3, 2)]
    assert [split.tiled for split in encoder_splits(vae.encoder)] == [range(stop) for stop in (2, 3, 4)]


def test_what_runs_whole_is_counted_at_its_largest():
    first, *_, last = decoder_splits(sd_like(block_out_channels=(8, 16, 32, 32)).decoder)
    # Before the last: the first convolution and the middle, 32 channels; before the first an upsampler to 4 x 4 cells.
    assert last.whole_bytes(10, 20, batch=2, itemsize=4) == 3 * 32 * 200 * 2 * 4
    assert first.whole_bytes(10, 20, batch=2, itemsize=4) == 3 * 32 * 16 * 200 * 2 * 4


def test_what_is_in_tiles_is_counted_with_the_halo():
    first = decoder_splits(sd_like(block_out_channels=(8, 16, 32, 32)).decoder)[0]
    # The last two up blocks: 32 channels to 16 on the doubled map, where its upsampler has 16 on one doubled again.
    assert first.halo == 10
    assert first.tile_values(20, 30) == 16 * 16 * (20 + 20) * (30 + 20) / 4
