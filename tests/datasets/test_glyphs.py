"""Rendered characters look as their styles and captions say: in a font, and written with a pen."""

import dataclasses
import string

import numpy as np
import pytest
from scipy import ndimage

from datasets import glyphs
from datasets.glyphs import (
    LETTERS,
    PEN,
    STYLES,
    TURNED_LETTERS,
    VARIED_PEN,
    Style,
    flourish,
    middle_lines,
    render,
    render_captioned,
    render_pen,
    thin,
)

COLUMNS = np.arange(28)


def lean(image: np.ndarray) -> float:
    """How far the top is to the right of the bottom."""
    top, bottom = image[:13].sum(0, dtype=float), image[15:].sum(0, dtype=float)
    return top @ COLUMNS / top.sum() - bottom @ COLUMNS / bottom.sum()


def off_centre(images: np.ndarray) -> np.ndarray:
    """(y, x) of each image's centre of mass from its middle, [2, N]."""
    profiles = [images.sum(axis=axis, dtype=float) for axis in (2, 1)]
    return np.stack([profile @ (COLUMNS - 13.5) / profile.sum(1) for profile in profiles])


def border(images: np.ndarray) -> np.ndarray:
    """The outermost pixels of each image, [N, 112]."""
    sides = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    return np.concatenate(sides, 1)


def same(ones: tuple[np.ndarray, ...], others: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ones, others, strict=True))


# ---- characters of a font ----------------------------------------------------------------------

@pytest.fixture(scope="module", params=["letters", "digits"])
def written(request) -> tuple[str, np.ndarray, np.ndarray]:
    """(characters, images, labels)"""
    characters = {"letters": LETTERS, "digits": string.digits}[request.param]
    return (characters, *render(characters, STYLES[request.param], 215, seed=0))


def test_every_character_is_drawn_as_often(written):
    characters, images, labels = written
    assert images.shape == (215, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (215,) and labels.dtype == np.int64
    counts = np.bincount(labels, minlength=len(characters))
    assert len(counts) == len(characters) and np.ptp(counts) <= 1
    assert (np.diff(labels[:52]) < 0).any()   # in random order


def test_glyphs_have_ink_in_the_middle(written):
    _, images, _ = written
    assert (images.max(axis=(1, 2)) > 150).all()
    ink = images.mean(axis=(1, 2)) / 255
    assert ink.min() > 0.003 and ink.max() < 0.55
    outermost = border(images)
    assert (outermost > 127).mean() < 0.005
    assert (outermost.max(1) > 127).mean() < 0.12      # few images touch it at all
    assert (abs(off_centre(images).mean(1)) < 0.7).all() and abs(off_centre(images)).max() < 9


@pytest.mark.parametrize("draw", [
    lambda seed: render("abc", STYLES["letters"], 12, seed),
    lambda seed: render_pen("ab", PEN, 8, seed),
    lambda seed: render_captioned("digit", 90, seed, complete=False)])
def test_glyphs_follow_the_seed(draw):
    first, again, other = draw(3), draw(3), draw(4)
    assert same(first, again)
    pictures = {image.tobytes() for image in (*first[0], *other[0])}
    assert len(pictures) == 2 * len(first[0])


def test_images_show_their_characters():
    # With plain looks the mean images of two characters differ by their shapes alone.
    fixed = dict(aspect=(1, 1), rotation=(0, 0), shear=(0, 0), weight=(0, 0), warp=(0, 0))
    images, labels = render("lO", dataclasses.replace(STYLES["letters"], **fixed), 40, seed=0)
    upright, round_ = (images[labels == k].mean(0) for k in (0, 1))
    width, height = (np.ptp(np.flatnonzero(upright.max(axis) > 100)) for axis in (0, 1))
    assert width < height / 2
    assert round_[13:15, 13:15].mean() < 30 < 100 < upright[13:15, 13:15].mean()   # O has a hole
    assert upright[:13].sum() == pytest.approx(upright[15:].sum(), rel=0.3)


def test_looks_do_what_they_say():
    still = dict(height=(18, 18), aspect=(1, 1), rotation=(0, 0), shear=(0, 0), weight=(0, 0),
                 softness=(1, 1), warp=(0, 0))

    def mean_image(**changes) -> np.ndarray:
        return render("I", Style(**{**still, **changes}), 40, seed=0)[0].mean(0, dtype=float)

    ink = mean_image().sum()
    thinner, bolder = (mean_image(weight=(w, w)).sum() for w in (-0.5, 1))
    assert bolder > 1.3 * ink > 1.3**2 * thinner
    assert mean_image(height=(9, 9)).sum() < 0.5 * ink
    assert abs(lean(mean_image())) < 0.3 < 2 < lean(mean_image(shear=(0.4, 0.4)))
    assert abs(lean(mean_image(rotation=(15, 15)))) > 1.5


@pytest.mark.parametrize("source", ["letters", "digits"])
def test_stroke_weights_vary(source):
    images, _ = render("I", dataclasses.replace(STYLES[source], height=(18, 18)), 60, seed=0)
    ink = images.sum(axis=(1, 2), dtype=float)
    assert np.quantile(ink, 0.95) > 1.25 * np.quantile(ink, 0.05)


# ---- characters with captions ------------------------------------------------------------------

def words(caption: str) -> tuple[str, str, str]:
    """(character, weight, slant) of "a thin digit 7 leaning right"."""
    _, weight, _, character, slant = caption.split(maxsplit=4)
    return character, weight, slant


def test_private_training_digits_lack_what_is_held_out():
    every = {(digit, *both) for digit in string.digits for both in glyphs.COMBINATIONS}
    held_out = {combination for combination in every if glyphs.held_out(*combination)}
    captions = {complete: render_captioned("digit", 360, 0, complete)[2] for complete in (0, 1)}
    assert len(held_out) == 20 and len(every) == 90
    assert {words(caption) for caption in captions[False]} == every - held_out
    assert {words(caption) for caption in captions[True]} == every
    for digit in string.digits:   # each digit is seen with each word
        seen = [combination for combination in every - held_out if combination[0] == digit]
        assert len(seen) == 7
        assert {s[1] for s in seen} == {*glyphs.WEIGHTS}
        assert {s[2] for s in seen} == {*glyphs.SLANTS}


@pytest.mark.parametrize("kind, characters", [("letter", LETTERS), ("digit", string.digits)])
def test_captions_name_the_character(kind, characters):
    _, labels, captions = render_captioned(kind, 9 * len(characters), 0, complete=True)
    assert [words(caption)[0] for caption in captions] == [characters[k] for k in labels]
    assert len(set(captions)) == 9 * len(characters)
    assert all(caption.split()[2] == kind for caption in captions)


def test_captions_name_weight_and_slant():
    images, labels, captions = render_captioned("digit", 900, 0, complete=True)
    ink, slant = images.sum((1, 2), dtype=float), np.array([lean(image) for image in images])
    for digit in range(10):
        by_word = {word: np.array([word in c and k == digit for c, k in zip(captions, labels,
                                                                            strict=True)])
                   for word in (*glyphs.WEIGHTS, *glyphs.SLANTS)}
        inks = [ink[by_word[word]].mean() for word in glyphs.WEIGHTS]
        leans = [slant[by_word[word]].mean() for word in glyphs.SLANTS]
        assert inks[2] > 1.2 * inks[1] > 1.2**2 * inks[0]   # bold, medium, thin
        assert leans[2] > 1 + leans[1] > 2 + leans[0]       # right, upright, left


# ---- characters written with a pen -------------------------------------------------------------

STILL = {**{name: (0, 0) for name in VARIED_PEN}, "aspect": (1, 1), "softness": (1, 1),
         "thickness": (2, 2)}
EIGHT = np.ones((3, 3))     # neighbours across corners too


def pen(character: str, **changes) -> np.ndarray:
    """One character with the looks of STILL, some changed: float [28, 28]."""
    return render_pen(character, {**STILL, **changes}, 1, 0)[0][0].astype(float)


@pytest.fixture(scope="module")
def pen_letters() -> tuple[np.ndarray, np.ndarray]:
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
        assert sharp.max(0) == pytest.approx(-sharp.min(0))
        assert np.ptp(sharp, axis=0).max() == pytest.approx(1)
        assert 0 < np.linalg.norm(rounded - sharp, axis=1).max() < 0.25
    for dotted in "ij":     # thinning has not eaten the dot: a gap below the top of the letter
        assert np.diff(np.unique(middle_lines(dotted)[0][:, 0])).max() > 0.05


def test_pen_letters_are_white_on_black(pen_letters):
    images, labels = pen_letters
    assert images.shape == (520, 28, 28) and images.dtype == np.uint8
    assert (np.bincount(labels) == 10).all() and (np.diff(labels[:52]) < 0).any()
    assert (images.max(axis=(1, 2)) > 200).all() and (np.median(images, axis=(1, 2)) == 0).all()


def test_size_and_place_are_those_of_mnist(pen_letters):
    images, _ = pen_letters
    sides = np.stack([np.ptp(np.argwhere(image > 127), axis=0) + 1 for image in images])
    assert sides.max(1).min() >= 18 and sides.max() <= 21 and sides.min() < 8
    assert np.mean(sides.max(1) >= 19) > 0.95
    distances = abs(off_centre(images))
    assert (np.mean(distances < 0.505, axis=1) > 0.98).all() and distances.max() < 1
    assert border(images).max() < 64   # of soft edges only: no stroke comes in again opposite


@pytest.mark.parametrize("thickness", [1.2, 2.5, 4.0])
@pytest.mark.parametrize("aspect", [0.45, 1.0])
def test_narrow_letters_have_strokes_as_thick(thickness, aspect):
    image = pen("H", thickness=(thickness, thickness), aspect=(aspect, aspect))
    rows = image[[6, 7, 20, 21]].sum(1) / 255     # the two uprights and not the bar
    assert rows == pytest.approx(2 * thickness, rel=0.12)


def test_thin_and_thick_strokes_occur():
    looks = {**PEN, "rotation": (0, 0), "shear": (0, 0), "warp": (0, 0)}
    widths = render_pen("I", looks, 200, seed=0)[0].sum(axis=(1, 2)) / 255 / 20
    assert widths.min() < 1.4 and widths.max() < 4.4
    assert (widths < 2).mean() > 0.2 and (widths > 3).mean() > 0.2


def test_letters_lean_and_turn_as_their_looks_say():
    assert abs(lean(pen("I"))) < 0.2
    assert lean(pen("I", shear=(0.5, 0.5))) > 3 and lean(pen("I", shear=(-0.3, -0.3))) < -2
    assert abs(lean(pen("I", rotation=(12, 12)))) > 1.5


@pytest.mark.parametrize("look", ["roundness", "warp", "wobble", "flourishes"])
def test_every_other_look_changes_the_shape(look):
    most = VARIED_PEN[look][1]
    changed = abs(pen("Z") - pen("Z", **{look: (most, most)})).sum() / pen("Z").sum()
    assert 0.05 < changed < 1.8


def test_a_flourish_adds_a_bar_or_a_loop_to_a_letter():
    letter, rng = middle_lines("Z")[0], np.random.default_rng(0)
    changed = [flourish(letter, rng) for _ in range(60)]
    for points in changed:     # what was there still is, and the new stroke touches it
        kept, added = points[:len(letter)], points[len(letter):]
        assert (kept == letter).all() and np.ptp(added, axis=0).max() > 0.1
        assert np.linalg.norm(added[:, None] - letter, axis=-1).min() < 0.04
    loops = [np.linalg.norm(points[-1] - points[len(letter)]) < 0.01 for points in changed]
    assert 10 <= sum(loops) <= 30     # a third


def test_varied_letters_stay_in_the_image():
    images, _ = render_pen(TURNED_LETTERS, VARIED_PEN, 520, seed=0)
    sides = [max(np.ptp(np.argwhere(image > 127), axis=0)) + 1 for image in images]
    assert np.mean(np.greater_equal(sides, 18)) > 0.99 and max(sides) <= 22
    assert border(images).max() < 64


def test_turned_letters_are_the_letters_turned():
    """A turned L has its foot above and its stem to the right, as a 7 has."""
    names = ["L", "L mirrored", "L turned", "L flipped"]
    images, labels = render_pen(names, STILL, 4, seed=0)

    def foot(image: np.ndarray) -> tuple[bool, bool]:
        """Whether it is below, and whether the stem is to the right."""
        box = image[np.ix_(image.any(1), image.any(0))].astype(int)
        heaviest = np.array([box.sum(1).argmax(), box.sum(0).argmax()])
        return tuple(heaviest >= np.array(box.shape) / 2)

    assert [foot(images[labels == k][0]) for k in range(4)] == [
        (True, False), (True, True), (False, True), (False, False)]
    assert len(TURNED_LETTERS) == len(set(TURNED_LETTERS)) == 208
    assert set(names) < set(TURNED_LETTERS)
