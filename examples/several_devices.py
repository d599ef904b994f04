"""Paint one image by several processes, each of which computes a band of it, and print what each of them took:

    torchrun --nproc-per-node 2 examples/several_devices.py

Between GPUs they talk by NCCL, on hosts by gloo. The image is the one that a single process makes.
"""

import argparse
import os
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image

from largerespatch import LargeResPatch
from largerespatch.memory.counting import LiveBytes, gibibytes
from pipelines import Parser, add_picture_options, load_pipeline, positive, run, save, words_for


class Taken(NamedTuple):
    """What one process took: seconds, and the most bytes of tensors that were alive beside the weights."""

    rank: int
    seconds: float
    bytes: int


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_picture_options(parser, 1024, 512)
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="denoising steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (%(default)s)")
    return parser


def paint(pipe: Any, group: Any, options: argparse.Namespace) -> tuple[Image.Image, Taken]:
    """The image, and what this process took for it."""
    size = {"width": options.width, "height": options.height}
    generator = torch.Generator().manual_seed(options.seed)
    start = time.perf_counter()
    try:
        patch = LargeResPatch(pipe, **size, process_group=group)
    except ValueError as error:
        build_parser().error(str(error))
    with patch, LiveBytes(pipe.device.type) as alive:
        words = words_for(options).at(options.width)
        image = pipe(words, num_inference_steps=options.steps, generator=generator, **size).images[0]
    return image, Taken(group.rank(), time.perf_counter() - start, alive.peak)


def report(taken: Taken, group: Any) -> list[Taken]:
    """What all processes took, printed by the first."""
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, taken, group=group)
    if group.rank() == 0:
        for each in everyone:
            print(f"rank {each.rank} of {group.size()}: {each.seconds:.1f} s, {gibibytes(each.bytes)} beside weights")
    return everyone


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    if "RANK" not in os.environ:  # which torchrun says
        parser.error("is to be started by torchrun: torchrun --nproc-per-node 2 examples/several_devices.py")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before NCCL looks
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        pipe = load_pipeline(options.model, parser)
        pipe.set_progress_bar_config(disable=dist.get_rank() > 0)
        image, taken = paint(pipe, dist.group.WORLD, options)
        report(taken, dist.group.WORLD)
        if dist.get_rank() == 0:
            save(image, options.out)
        dist.barrier()  # a group that is left while another process still talks is an error there
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
