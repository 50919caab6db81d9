"""Letters as written with a pen: thinning, thickness, size and place, looks, and the data set of them."""

import string

import numpy as np
import pytest
from scipy import ndimage

import data
from glyphs import LETTERS, PEN, TURNED_LETTERS, VARIED_PEN, flourish, middle_lines, render_pen, thin

STILL = {**{name: (0, 0) for name in VARIED_PEN}, "aspect": (1, 1), "softness": (1, 1), "thickness": (2, 2)}
EIGHT = np.ones((3, 3))     # neighbours across corners too


@pytest.fixture(scope="module")
def written() -> tuple[np.ndarray, np.ndarray]:
    return render_pen(LETTERS, PEN, 520, seed=0)


def test_a_thinned_bar_is_its_middle_line():
    bar = np.zeros((30, 20), bool)
    bar[4:26, 7:12] = True
    line = thin(bar)
    rows, columns = np.nonzero(line)
    assert (line.sum(1) <= 1).all() and set(columns) == {9} and len(rows) > 15


def test_thinning_keeps_pieces_and_holes():
    ring = np.hypot(*np.mgrid[-20:21, -20:21])
    shape = (ring < 15) & (ring > 9) | (ring < 4)
    line = thin(shape)
    assert not (line & ~shape).any() and line.sum() < shape.sum() / 4
    assert ndimage.label(line, EIGHT)[1] == ndimage.label(shape, EIGHT)[1] == 2
    assert ndimage.label(~line)[1] == 2     # around the ring, inside it
    assert (thin(line) == line).all()


def test_middle_lines_fill_a_box_of_size_one():
    for character in LETTERS:
        sharp, rounded = middle_lines(character)
        assert sharp.max(0) == pytest.approx(-sharp.min(0)) and np.ptp(sharp, axis=0).max() == pytest.approx(1)
        assert 0 < np.linalg.norm(rounded - sharp, axis=1).max() < 0.25
    for dotted in "ij":     # thinning has not eaten the dot: a gap below the top of the letter
        assert np.diff(np.unique(middle_lines(dotted)[0][:, 0])).max() > 0.05


def test_images_and_labels(written):
    images, labels = written
    assert images.shape == (520, 28, 28) and images.dtype == np.uint8 and labels.shape == (520,)
    assert (np.bincount(labels) == 10).all() and (np.diff(labels[:52]) < 0).any()
    assert (images.max(axis=(1, 2)) > 200).all() and (np.median(images, axis=(1, 2)) == 0).all()
    assert len({image.tobytes() for image in images}) == 520


def test_size_and_place_are_those_of_mnist(written):
    ink = written[0] > 127
    sides = np.stack([np.ptp(np.argwhere(image), axis=0) + 1 for image in ink])
    assert sides.max(1).min() >= 18 and sides.max() <= 21 and sides.min() < 8
    assert np.mean(sides.max(1) >= 19) > 0.95
    positions = np.arange(28) - 13.5
    for axis in (1, 2):
        profile = written[0].sum(axis=3 - axis, dtype=float)
        off_centre = abs(profile @ positions / profile.sum(1))
        assert np.mean(off_centre < 0.505) > 0.98 and off_centre.max() < 1
    border = max(written[0][:, [0, -1]].max(), written[0][:, :, [0, -1]].max())
    assert border < 64      # of soft edges only: nothing leaves the image and comes in again opposite


def test_pen_letters_follow_the_seed():
    again, other = (render_pen("ab", PEN, 8, seed) for seed in (3, 4))
    first = render_pen("ab", PEN, 8, 3)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all() and (first[0] != other[0]).any()


@pytest.mark.parametrize("thickness", [1.2, 2.5, 4.0])
@pytest.mark.parametrize("aspect", [0.45, 1.0])
def test_strokes_are_as_thick_as_the_pen_however_narrow_the_letter(thickness, aspect):
    image = render_pen("H", {**STILL, "thickness": (thickness, thickness), "aspect": (aspect, aspect)}, 1, 0)[0][0]
    rows = image[[6, 7, 20, 21]].sum(1) / 255     # the two uprights and not the bar
    assert rows == pytest.approx(2 * thickness, rel=0.12)


def test_thin_and_thick_strokes_occur():
    images, _ = render_pen("I", {**PEN, "rotation": (0, 0), "shear": (0, 0), "warp": (0, 0)}, 200, seed=0)
    widths = images.sum(axis=(1, 2)) / 255 / 20
    assert widths.min() < 1.4 and (widths < 2).mean() > 0.2 and (widths > 3).mean() > 0.2 and widths.max() < 4.4


def test_letters_lean_and_turn_as_their_looks_say():
    def lean(**changes):   # how far the top is to the right of the bottom
        image, columns = render_pen("I", {**STILL, **changes}, 1, 0)[0][0].astype(float), np.arange(28)
        top, bottom = image[:13].sum(0), image[15:].sum(0)
        return top @ columns / top.sum() - bottom @ columns / bottom.sum()

    assert abs(lean()) < 0.2 and lean(shear=(0.5, 0.5)) > 3 and lean(shear=(-0.3, -0.3)) < -2
    assert abs(lean(rotation=(12, 12))) > 1.5


@pytest.mark.parametrize("look", ["roundness", "warp", "wobble", "flourishes"])
def test_every_other_look_changes_the_shape(look):
    plain, changed = (render_pen("Z", {**STILL, look: (size, size)}, 1, 0)[0][0].astype(float)
                      for size in (0, VARIED_PEN[look][1]))
    assert 0.05 < abs(plain - changed).sum() / plain.sum() < 1.8


def test_a_flourish_adds_a_bar_or_a_loop_to_a_letter():
    letter, rng = middle_lines("Z")[0], np.random.default_rng(0)
    changed = [flourish(letter, rng) for _ in range(60)]
    for points in changed:     # what was there still is, and the new stroke touches it
        kept, added = points[:len(letter)], points[len(letter):]
        assert (kept == letter).all() and np.ptp(added, axis=0).max() > 0.1
        assert np.linalg.norm(added[:, None] - letter, axis=-1).min() < 0.04
    closed = [np.linalg.norm(points[-1] - points[len(letter)]) < 0.01 for points in changed]
    assert 10 <= sum(closed) <= 30     # loops are a third


def test_varied_letters_stay_in_the_image():
    images, _ = render_pen(TURNED_LETTERS, VARIED_PEN, 520, seed=0)
    sides = [max(np.ptp(np.argwhere(image > 127), axis=0)) + 1 for image in images]
    assert np.mean(np.greater_equal(sides, 18)) > 0.99 and max(sides) <= 22
    assert max(images[:, [0, -1]].max(), images[:, :, [0, -1]].max()) < 64


def test_turned_letters_are_the_letters_turned():
    """A turned L has its foot above and its stem to the right, as a 7 has."""
    still = {**STILL, "roundness": (0.0, 0.0)}
    names = ["L", "L mirrored", "L turned", "L flipped"]
    images, labels = render_pen(names, still, 4, seed=0)
    upright, mirrored, turned, flipped = (images[labels == k][0].astype(int) for k in range(4))

    def foot(image):     # whether it is below, and whether the stem is to the right
        box = image[np.ix_(image.any(1), image.any(0))]
        return tuple(np.array([box.sum(1).argmax(), box.sum(0).argmax()]) >= np.array(box.shape) / 2)

    assert [foot(image) for image in (upright, mirrored, turned, flipped)] == [
        (True, False), (True, True), (False, True), (False, False)]
    assert len(TURNED_LETTERS) == len(set(TURNED_LETTERS)) == 208 and set(names) < set(TURNED_LETTERS)


@pytest.mark.parametrize("name", data.PENS)
def test_pen_letters_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "COUNTS", {name: {"train": 60, "test": 60}})
    train, test = (data.load(name, split) for split in ("train", "test"))
    assert train.images.shape == test.images.shape == (60, 32, 32, 1)
    assert train.classes[:52] == list(LETTERS) and not set(train.classes) & set(string.digits)
    assert train.classes == list(data.PENS[name][1]) and len(set(train.classes)) == len(train.classes)
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    monkeypatch.setattr(data, "render_pen", None)
    assert (data.load(name, "train").images == train.images).all()      # from the cache
    starts = [train.classes[k] for k in data.starting_classes(list(string.digits), train.classes)]
    assert [starts[digit] for digit in (3, 4, 7)] == (
        ["E mirrored", "h turned", "L turned"] if name == "pen-letters-varied" else ["B", "A", "T"])
