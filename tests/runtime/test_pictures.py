"""Grids of images as PNG, and the rows of real images in them."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFont

from runtime.pictures import legible, rows_by_caption, rows_by_class, save_grid

EIGHT = SimpleNamespace(
    images=np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1), labels=np.array([1, 0] * 3 + [2, 0]),
    classes=["a", "b", "c"], captions=["one", "two"] * 4)


def size_of(*arguments) -> tuple[int, int]:
    save_grid(*arguments)
    with Image.open(arguments[0]) as picture:
        return picture.size


def test_panels_stand_side_by_side(tmp_path):
    grey = np.full((2, 3, 8, 8, 1), 50, np.uint8)
    colour = np.full((1, 2, 8, 8, 3), (200, 0, 0), np.uint8)
    grey[1, 2] = 150
    path = tmp_path / "new" / "grid.png"
    save_grid(path, [("grey", grey, ["", ""]), ("colour", colour, [""])])
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # 8 around and between panels; without names a panel is 8 wider than its images, and 22
        # higher by its title.
        assert picture.size == (8 + (8 + 3 * 8) + 8 + (8 + 2 * 8) + 8, 8 + (22 + 2 * 8) + 8)
        assert picture.getpixel((16, 30)) == (50, 50, 50)
        assert picture.getpixel((8 + 8 + 3 * 8 - 1, 8 + 22 + 2 * 8 - 1)) == (150, 150, 150)
        assert picture.getpixel((48 + 8, 30)) == (200, 0, 0)


def test_row_names_make_room(tmp_path):
    images = np.zeros((1, 1, 8, 8, 1), np.uint8)
    narrow, wide = (size_of(tmp_path / "grid.png", [("", images, [name])])[0]
                    for name in ("", "airplane"))
    assert wide > narrow + 30


def test_the_caption_goes_below_in_lines(tmp_path):
    images = np.zeros((1, 20, 8, 8, 1), np.uint8)
    sizes = [size_of(tmp_path / "grid.png", [("", images, [""])], "word\n" * count)
             for count in (0, 1, 20)]
    assert len({width for width, _ in sizes}) == 1
    without, one_line, many = (height for _, height in sizes)
    assert one_line == without + 18 + 8 and many >= one_line + 4 * 18


@pytest.mark.parametrize("name, shown", [
    ("It's 50% ~ {a}", "It's 50% ~ {a}"),
    ("猫", "U+732B"),
    ("café", "cafU+00E9"),
    ("cafe\u0301", "cafU+00E9"),     # the same in two characters
    ("two\nlines\t", "twoU+000AlinesU+0009"),
    ("\0\x7f\u200b", "U+0000U+007FU+200B"),
    ("\U0001f600", "U+1F600"),
    ("\udcff", "U+DCFF"),            # a byte that is no UTF-8, in the name of a folder
    ("\u202e\u05d0", "U+202EU+05D0"),
    ("", "")])
def test_what_the_font_lacks_is_spelled(name, shown):
    assert legible(name, ImageFont.load_default(14)) == shown


def test_a_long_name_keeps_both_ends():
    font = ImageFont.load_default(14)
    assert legible("x" * 100, font) == "x" * 100
    shortened = legible("first" + "猫" * 5_000 + "last", font)
    assert len(shortened) == 100 and "..." in shortened
    assert shortened.startswith("firstU+732B") and shortened.endswith("U+732Blast")


@pytest.mark.parametrize("place", ["title", "name", "caption"])
def test_every_text_in_a_grid_is_legible(tmp_path, place):
    def picture(shown: str) -> np.ndarray:
        texts = {"title": "", "name": "", "caption": "", place: shown}
        panel = texts["title"], np.zeros((2, 20, 8, 8, 1), np.uint8), ["", texts["name"]]
        save_grid(tmp_path / "grid.png", [panel], texts["caption"])
        with Image.open(tmp_path / "grid.png") as image:
            return np.asarray(image)

    assert np.array_equal(picture("a猫\0b"), picture("aU+732BU+0000b"))
    assert max(picture("x " * 10**5).shape) < 2_000


def test_rows_by_class_repeat_what_is_too_few():
    chosen, names = rows_by_class(EIGHT, columns=2, rows=2)
    assert names == ["a", "b"] and chosen.reshape(2, 2).tolist() == [[1, 3], [0, 2]]
    chosen, names = rows_by_class(EIGHT, columns=3)
    assert chosen.shape == (3, 3, 1, 1, 1) and names == ["a", "b", "c"]
    assert chosen[2].ravel().tolist() == [6, 6, 6]


def test_a_class_without_images_has_no_row():
    labels = np.where(EIGHT.labels == 1, 0, EIGHT.labels)
    chosen, names = rows_by_class(
        SimpleNamespace(**{**vars(EIGHT), "labels": labels}), columns=2, rows=2)
    assert names == ["a", "c"] and len(chosen) == 2


def test_rows_by_caption():
    chosen, names = rows_by_caption(EIGHT, ["two", "one"], columns=3)
    assert names == ["two", "one"] and chosen.reshape(2, 3).tolist() == [[1, 3, 5], [0, 2, 4]]


@pytest.mark.parametrize("captions", [EIGHT.captions, None])
def test_a_caption_without_images_is_refused(captions):
    dataset = SimpleNamespace(**{**vars(EIGHT), "captions": captions})
    with pytest.raises(ValueError, match="no real image has the caption 'a cat'"):
        rows_by_caption(dataset, ["a cat"], columns=3)
