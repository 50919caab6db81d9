"""Pictures of many images: titled grids as PNG, and rows of real images to put into them."""

import unicodedata
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from runtime.files import atomic_write

SOFTWARE = "dp-ldm"   # is in each PNG: runtime.outputs replaces no other program's
MARGIN, TITLE, LINE = 8, 22, 18   # pixels around a panel, above its rows, per line of the caption
LONGEST = 100   # characters of a title or name, and 20 times as many of the caption
NOWHERE = "\U0010ffff"   # Unicode promises that no font has this character: it looks as all such do

Panel = tuple[str, np.ndarray, list[str]]


class LabelledImages(Protocol):
    """What the rows are taken from: a data set, or anything with these four."""
    images: np.ndarray            # uint8 [N, H, W, C]
    labels: np.ndarray            # int64 [N]
    classes: list[str]            # the name of each label
    captions: list[str] | None    # a sentence for each image


def save_grid(path: Path, panels: list[Panel], caption: str = "") -> None:
    """A PNG of panels side by side, each a grid of images with a name in front of every row.

    panels: (title, uint8 images [rows, columns, H, W, C], row names). The caption goes below, in
    lines as wide as the panels. Texts are as `legible` makes them.
    """
    font = ImageFont.load_default(14)
    drawn = [draw_panel(*panel, font) for panel in panels]
    width = sum(panel.width + MARGIN for panel in drawn) + MARGIN
    bottom = max(panel.height for panel in drawn) + 2 * MARGIN
    lines = wrap(legible(" ".join(caption.split()), font, 20 * LONGEST), font, width - 2 * MARGIN)
    height = bottom + LINE * len(lines) + MARGIN * bool(lines)
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).multiline_text((MARGIN, bottom), "\n".join(lines), fill="black",
                                           font=font)
    x = MARGIN
    for panel in drawn:
        picture.paste(panel, (x, MARGIN))
        x += panel.width + MARGIN
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=mark)


def draw_panel(title: str, images: np.ndarray, names: list[str],
               font: ImageFont.FreeTypeFont) -> Image.Image:
    """One panel of `save_grid`."""
    rows, columns, height, width, _ = images.shape
    title, *names = (legible(text, font) for text in (title, *names))
    left = int(max(font.getlength(name) for name in names)) + MARGIN
    panel = Image.new("RGB", (left + columns * width, TITLE + rows * height), "white")
    draw = ImageDraw.Draw(panel)
    draw.text((left, 3), title, fill="black", font=font)
    for r, name in enumerate(names):
        top = TITLE + r * height
        draw.text((0, top + 0.5 * height), name, fill="black", font=font, anchor="lm")
        for c in range(columns):
            image = images[r, c].squeeze(-1) if images.shape[-1] == 1 else images[r, c]
            panel.paste(Image.fromarray(image), (left + c * width, top))
    return panel


def legible(text: str, font: ImageFont.FreeTypeFont, longest: int = LONGEST) -> str:
    """The text on one line: what the font lacks as its code, U+732B, and a long middle left out."""
    box = bytes(font.getmask(NOWHERE))
    text = unicodedata.normalize("NFC", text)
    known = {c: c if bytes(font.getmask(c)) != box else f"U+{ord(c):04X}" for c in set(text)}
    text = "".join(known[c] for c in text)
    tail = longest // 3
    return text if len(text) <= longest else f"{text[:longest - tail - 3]}...{text[-tail:]}"


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The words of `text` in lines of at most `width` pixels; longer words stand alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def rows_by_class(dataset: LabelledImages, columns: int,
                  rows: int = 10) -> tuple[np.ndarray, list[str]]:
    """The first `columns` images of each of the first `rows` classes that have any.

    And the names of these classes. Images uint8 [rows, columns, H, W, C]; a class with fewer images
    repeats them.
    """
    shape, shown = (columns, *dataset.images.shape[1:]), np.unique(dataset.labels)[:rows]
    firsts = [np.flatnonzero(dataset.labels == k)[:columns] for k in shown]
    chosen = [np.resize(dataset.images[first], shape) for first in firsts]
    return np.stack(chosen), [dataset.classes[k] for k in shown]


def rows_by_caption(dataset: LabelledImages, captions: list[str],
                    columns: int) -> tuple[np.ndarray, list[str]]:
    """The first `columns` images with each of the captions, as rows_by_class, and the captions.

    ValueError if a caption has no image.
    """
    known = np.array(dataset.captions or [""])
    rows = [np.flatnonzero(known == caption) for caption in captions]
    for caption, row in zip(captions, rows, strict=True):
        if not len(row):
            raise ValueError(f"no real image has the caption {caption!r}")
    return np.stack([dataset.images[np.resize(row, columns)] for row in rows]), captions
