"""The picture shows the tilings of `tilings.py` as they are, and no two neighbours alike."""

import re
from itertools import chain, combinations, groupby, pairwise
from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw

from largerespatch import view
from largerespatch.core.tilings import COVERS, PHASES
from largerespatch.view import PALETTE, viewBricks

SHAPES = pytest.mark.parametrize("attn_shape", COVERS)


def codes(pixels):
    """Each colour as one number."""
    return pixels.astype(int) @ [1 << 16, 1 << 8, 1]


PAINTS = codes(PALETTE)


@pytest.fixture
def written(monkeypatch):
    """The texts written on the page: heading, legend, then title and legend of each panel, row by row of panels."""
    texts = []

    def text(self, position, line, **options):
        texts.append((position[1], position[0], line))
        original(self, position, line, **options)

    original = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)

    def in_order():
        levels = [[line for _, _, line in level] for _, level in groupby(sorted(texts), itemgetter(0))]
        heading, legend, *panels = levels
        rows = zip(panels[::2], panels[1::2], strict=True)  # of titles, and of the legends under them
        pairs = chain.from_iterable(zip(*row, strict=True) for row in rows)
        return [*heading, *legend, *chain.from_iterable(pairs)]

    return in_order


def runs(painted):
    """First and last of each run of True, across the gaps that mortar makes."""
    places = np.flatnonzero(painted)
    return [(run[0], run[-1] + 1) for run in np.split(places, np.flatnonzero(np.diff(places) > view.MARGIN) + 1)]


def places(page):
    """Where the page's drawings are, as slices, row by row: all else on it is grey text on paper."""
    painted = np.isin(codes(np.asarray(page)), PAINTS)
    return [
        np.s_[top:bottom, left:right]
        for top, bottom in runs(painted.any(1))
        for left, right in runs(painted[top:bottom].any(0))
    ]


def drawings(page):
    return [np.asarray(page)[place] for place in places(page)]


def token_colours(drawing, width, height):
    """The colour at the centre of each token, which has to be one of the palette."""
    rows = (2 * np.arange(height) + 1) * drawing.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * drawing.shape[1] // (2 * width)
    colours = codes(drawing[np.ix_(rows, columns)])
    assert np.isin(colours, PAINTS).all()
    return colours


def owners(attn_shape, width, height, phase, slice_x, slice_y):
    owner = np.empty((height, width), int)
    for i, tile in enumerate(COVERS[attn_shape](height, width, phase, slice_y, slice_x)):
        owner[tile.rows, tile.columns] = i
    return owner


def neighbouring_cells(plane):
    """Each pair of cells that share an edge or a corner, as two flat arrays."""
    pairs = [
        (plane[:-1], plane[1:]),
        (plane[:, :-1], plane[:, 1:]),
        (plane[:-1, :-1], plane[1:, 1:]),
        (plane[:-1, 1:], plane[1:, :-1]),
    ]
    return (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True))


def phases_drawn(page, attn_shape, width, height, slice_x, slice_y):
    """For each drawing of a page, whether cells have one colour where they have one owner, and only there."""
    right = []
    for phase, drawing in enumerate(drawings(page)):
        here, there = neighbouring_cells(owners(attn_shape, width, height, phase, slice_x, slice_y))
        colour_here, colour_there = neighbouring_cells(token_colours(drawing, width, height))
        right.append(bool(((here == there) == (colour_here == colour_there)).all()))
    return right


@SHAPES
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_the_drawn_bricks_are_those_of_each_phase_and_neighbours_differ(
    attn_shape, width, height, slice_x, slice_y, seed
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "PAGE", (700, 700))  # smaller pages, for speed
        page = viewBricks(width, height, slice_x, slice_y, attn_shape=attn_shape, seed=seed)
    assert phases_drawn(page, attn_shape, width, height, slice_x, slice_y) == [True] * PHASES


def test_a_map_drawn_at_one_pixel_per_token_keeps_every_token(monkeypatch):
    monkeypatch.setattr(view, "PAGE", (500 + 2 * view.MARGIN, view.PAGE[1]))
    page = viewBricks(500, 20, 2, 1)
    assert drawings(page)[0].shape[:2] == (20, 500)
    assert phases_drawn(page, "brick", 500, 20, 2, 1) == [True] * PHASES


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 99))
def test_colours_differ_along_a_course_and_between_courses(lengths, seed):
    colours = view._colours(np.array(lengths), np.random.default_rng(seed))
    courses = np.split(colours, np.cumsum(lengths)[:-1])
    assert [len(course) for course in courses] == lengths
    assert all(0 <= colour < len(PALETTE) for colour in colours)
    for course in courses:
        assert (course[1:] != course[:-1]).all()
    for course, below in pairwise(courses):
        assert not set(course) & set(below)


def test_the_colours_of_the_palette_are_clearly_distinct():
    colours = np.array([*PALETTE.tolist(), ImageColor.getrgb(view.PAPER)])
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1)
    # of 442 from black to white; the closest two, sand and paper, are still told apart at a glance
    assert apart[~np.eye(len(colours), dtype=bool)].min() > 80


def test_the_seed_chooses_the_colours():
    first, same, other = (np.asarray(viewBricks(60, 60, 8, 8, seed=seed)) for seed in (3, np.int64(3), 4))
    assert np.array_equal(first, same)
    assert first.shape == other.shape and not np.array_equal(first, other)


def test_the_page_tells_the_sizes_and_the_phases_in_order(written):
    viewBricks(256, 200, 64, 50)
    lines = written()
    assert "256 x 200 tokens" in lines[0]
    assert "attn_slice_x 64" in lines[1] and "attn_slice_y 50" in lines[1] and "brick" in lines[1]
    assert lines[2::2] == [
        "Phase 0: wide bricks",
        "Phase 1: tall bricks",
        "Phase 2: wide bricks, flipped",
        "Phase 3: tall bricks, flipped",
    ]
    assert lines[3] == "10 bricks:  4 of 85 x 50,  4 of 128 x 50,  2 of 86 x 50 tokens"
    assert lines[5] == "10 bricks:  4 of 64 x 67,  4 of 64 x 100,  2 of 64 x 66 tokens"


@SHAPES
@pytest.mark.parametrize("phase", range(PHASES))
def test_the_legend_counts_bricks_and_leaves_none_out(attn_shape, phase, written):
    viewBricks(101, 67, 16, 9, attn_shape=attn_shape)
    cover = COVERS[attn_shape](67, 101, phase, 9, 16)
    sizes = [f"{tile.width} x {tile.height}" for tile in cover]
    legend = written()[3 + 2 * phase]
    assert legend.startswith(f"{len(cover)} {attn_shape}s")
    listed = re.findall(r"(\d+) of (\d+ x \d+)", legend)
    assert listed and all(sizes.count(size) == int(count) for count, size in listed)
    others = re.search(r"and (\d+) other size", legend)
    assert len(listed) + (int(others[1]) if others else 0) == len(set(sizes))


def test_one_token_is_one_brick_of_one_size(written):
    page = viewBricks(1, 1, 64, 64)
    assert written()[3] == "1 brick of 1 x 1 tokens"
    assert [drawing.shape for drawing in drawings(page)] == [(view.LARGEST_TOKEN, view.LARGEST_TOKEN, 3)] * PHASES


def test_no_text_is_cut_off_or_runs_into_another(monkeypatch):
    boxes = []
    text = ImageDraw.ImageDraw.text

    def measured(self, position, line, **options):
        boxes.append(self.textbbox(position, line, font=options["font"]))
        text(self, position, line, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", measured)
    page = viewBricks(1, 90, 7, 7)
    assert page.width - view.MARGIN >= max(box[2] for box in boxes) > view.LARGEST_TOKEN + view.MARGIN
    assert page.height > max(box[3] for box in boxes)
    apart = [a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1] for a, b in combinations(boxes, 2)]
    assert len(boxes) == 2 + 2 * PHASES and all(apart)


@pytest.mark.parametrize(
    ("width", "height", "drawn"),
    [
        (8192, 8192, (355, 355)),
        (8192, 2048, (652, 163)),
        (8192, 410, (1340, 67)),
        (512, 8192, (22, 355)),
        (3, 8192, (12, 355)),
        (8192, 1, (1340, 12)),
        (374, 200, (652, 348)),
        (64, 16, (652, 163)),
        (20, 2, (960, 96)),
        (1, 9, (39, 355)),
    ],
)
def test_maps_grow_or_shrink_to_fit_the_page(width, height, drawn):
    page = viewBricks(width, height, 256, 256)
    assert [drawing.shape for drawing in drawings(page)] == [(*drawn[::-1], 3)] * PHASES


@pytest.mark.parametrize(
    ("width", "height", "columns"),
    [
        (1, 1, 2),
        (374, 374, 2),
        (128, 512, 2),
        (3, 8192, 2),
        (512, 128, 2),
        (499, 100, 2),
        (500, 100, 1),
        (8192, 410, 1),
    ],
)
def test_two_by_two_unless_the_map_is_very_wide(width, height, columns):
    where = places(viewBricks(width, height, 64, 64))
    tops, lefts = ([place[axis].start for place in where] for axis in (0, 1))
    assert len(where) == PHASES
    rows = [tops[i : i + columns] for i in range(0, PHASES, columns)]
    assert all(len(set(row)) == 1 for row in rows), "beside each other"
    assert tops == sorted(tops) and len(set(tops)) == PHASES // columns
    assert lefts == sorted(set(lefts)) * (PHASES // columns), "under each other"


def test_from_very_wide_on_one_column_draws_a_map_larger():
    for width, larger in ((8, max), (4, min)):
        one, two = (view._drawn_size(width * 100, 100, columns) for columns in (1, 2))
        assert one == larger(one, two) != two


@given(st.integers(1, 10**4), st.integers(1, 10**4), st.integers(50, 10**4))
@settings(max_examples=15, deadline=None)
def test_the_page_fits_a_screen(width, height, slice_size):
    page = viewBricks(width, height, slice_size, slice_size)
    assert page.width <= 1400 and page.height <= 1000


def test_each_drawing_is_under_its_own_title(monkeypatch):
    texts = {}
    text = ImageDraw.ImageDraw.text

    def placed(self, position, line, **options):
        texts[line] = position
        text(self, position, line, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", placed)
    for width, height in ((60, 80), (600, 80)):
        for phase, place in enumerate(places(viewBricks(width, height, 16, 16))):
            x, y = texts[f"Phase {phase}: {view.PHASE_NAMES['brick'][phase]}"]
            assert place[1].start == x
            assert 0 < place[0].start - y < 2 * view.MARGIN


def test_bricks_of_less_than_a_drawn_pixel_are_drawn_without_mortar():
    page = viewBricks(3000, 3000, 3, 300)
    assert np.isin(codes(drawings(page)[1]), PAINTS).all()


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("bricks", "bricks.png"),
        ("bricks.png", "bricks.png"),
        ("bricks.PNG", "bricks.PNG"),
        ("bricks.webp", "bricks.webp"),
        ("bricks_v1.5", "bricks_v1.5.png"),
        ("bricks.psd", "bricks.psd.png"),  # Pillow reads these, but does not write them
    ],
)
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "PathLike"])
def test_png_is_appended_to_names_without_an_image_suffix(name, saved, kind, tmp_path):
    viewBricks(2, 2, 1, 1, kind(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [saved]


def test_what_is_saved_is_what_is_returned(tmp_path):
    page = viewBricks(30, 20, 4, 4, tmp_path / "bricks")
    with Image.open(tmp_path / "bricks.png") as saved:
        assert saved.format == "PNG"
        assert np.array_equal(np.asarray(saved), np.asarray(page))


def test_nothing_is_saved_or_printed_without_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert isinstance(viewBricks(4, 4, 2, 2), Image.Image)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("option", ["width", "height", "attn_slice_x", "attn_slice_y"])
@pytest.mark.parametrize(
    ("value", "kind"), [(0, ValueError), (-1, ValueError), (True, TypeError), (8.0, TypeError), ("8", TypeError)]
)
def test_sizes_are_positive_whole_numbers(option, value, kind):
    sizes = dict(width=8, height=8, attn_slice_x=2, attn_slice_y=2)
    with pytest.raises(kind) as error:
        viewBricks(**(sizes | {option: value}))
    assert str(error.value) == f"{option} must be a whole number of tokens, at least 1; got {value!r}"


@pytest.mark.parametrize(
    ("option", "value", "kind", "accepted"),
    [
        ("attn_shape", "hexagon", ValueError, "'brick', 'tile'"),
        ("attn_shape", None, TypeError, "'brick', 'tile'"),
        ("seed", -1, ValueError, "at least 0"),
        ("seed", 0.5, TypeError, "at least 0"),
        ("seed", None, TypeError, "at least 0"),
        ("outPath", 7, TypeError, "os.PathLike"),
        ("outPath", b"bricks.png", TypeError, "os.PathLike"),
        ("outPath", "", IsADirectoryError, "not of a folder"),
        ("outPath", "nowhere/bricks.png", FileNotFoundError, "existing folder"),
    ],
)
def test_errors_name_option_value_and_what_is_accepted(option, value, kind, accepted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(view, "_panel", lambda *_: pytest.fail("drawn before every option was checked"))
    with pytest.raises(kind) as error:
        viewBricks(8, 8, 2, 2, **{option: value})
    message = str(error.value)
    assert message.startswith(option) and repr(value) in message and accepted in message


def test_more_slices_than_can_be_drawn_are_refused_before_they_are_listed():
    with pytest.raises(ValueError, match=r"attn_slice_x and attn_slice_y .* got 1 and 2 for 100000 x 1000 tokens"):
        viewBricks(100_000, 1000, 1, 2)


def test_numpy_integers_are_sizes():
    sizes = [np.int64(12), np.int16(9), np.uint8(2), np.int32(3)]
    assert np.array_equal(np.asarray(viewBricks(*sizes)), np.asarray(viewBricks(12, 9, 2, 3)))
