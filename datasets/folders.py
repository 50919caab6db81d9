"""Pictures in folders and zips, by class or with captions.

listing.py decides what is an image of what. Every picture is decoded and converted on its own; only
uint8 stays in memory. A damaged picture is refused by name.
"""

import io
import json
import posixpath
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from datasets import listing
from datasets.formats import COLOURS, Dataset, convert_one
from datasets.listing import LeftOut
from datasets.trees import Tree, open_tree
from runtime.distributed import log_once
from runtime.files import UNREADABLE

warnings.filterwarnings("ignore", "Corrupt EXIF data")   # `upright` ignores it
# What Pillow and zipfile raise besides: bombs, passwords, damaged chunks.
BAD_PICTURE = (*UNREADABLE, Image.DecompressionBombError, RuntimeError, SyntaxError)


# ---- pictures ----------------------------------------------------------------------------------

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says. Damaged EXIF says nothing: the pixels are sound."""
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except BAD_PICTURE:
        turn = None
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 0 to 65535, as 0 to 255. ValueError for more bits and for fractions."""
    if image.mode[0] not in "IF":
        return image
    # Pillow has 16 bits of a PNG or PGM as 32. Others may mean any range.
    if not image.mode.startswith("I;16") and (image.mode, image.format) not in (
            ("I", "PNG"), ("I", "PPM")):
        raise ValueError("its grey has more than 16 bits, or fractions: save it in 8 or 16 bits")
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """Transparent images on a white ground; others as they are."""
    if not image.has_transparency_data:
        return image
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground


def read_images(tree: Tree, files: list[str], image_size: int, channels: int,
                crop: bool = False) -> tuple[np.ndarray, Counter, Counter]:
    """The named pictures as uint8 [N, image_size, image_size, channels].

    Also their sizes before that, {(height, width): number}, and what was left out of them. Of
    several frames the first is taken. ValueError naming a picture that is damaged, or that stands
    there twice: it would count twice, but privacy is promised for one example.
    """
    name, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{tree.root} names the image {name} {count} times")
    images = np.empty((len(files), image_size, image_size, channels), np.uint8)
    sizes, frames = Counter(), 0
    progress = tqdm(files, desc=f"reading {tree.root.name}", disable=len(files) < 2_000)
    for i, name in enumerate(progress):
        content = tree.read(name)
        try:
            with Image.open(io.BytesIO(content)) as image:
                stored = image.mode
                picture = upright(image)
                sizes[picture.height, picture.width] += 1
                frames += getattr(image, "n_frames", 1) - 1
                images[i] = convert_one(on_white(eight_bits(picture)), image_size, channels, crop)
        except BAD_PICTURE as error:
            reason = (f"Pillow {PIL.__version__} cannot tell its format"
                      if isinstance(error, UnidentifiedImageError) else error)
            raise ValueError(f"cannot read the image {name} of {tree.root}: {reason}") from error
        say_conversion(tree.root.name, stored, picture.size, image_size, channels)
    return images, sizes, Counter({"further frame{s}": frames} if frames else {})


def say_conversion(name: str, mode: str, size: tuple[int, int], image_size: int,
                   channels: int) -> None:
    """A line if a picture of that mode and size had to be converted: one for the whole set."""
    if size != (image_size, image_size) or (mode == "L") != (channels == 1):
        log_once(f"{name}: images of other sizes or colours are converted to "
                 f"{image_size}x{image_size} in {COLOURS[channels]}")
    if mode[0] == "I":
        log_once(f"{name}: grey of 16 bits, 0 to 65535, becomes 0 to 255")


def load_folder(root: Path, split: str, image_size: int, channels: int) -> Dataset:
    """Pictures in a folder or a zip, with captions or by class (listing.list_classes).

    `read_metadata` and `read_captions` say where captions stand. The names of the classes are taken
    to be public, also where the images are private.
    """
    tree = open_tree(root)
    shown, _ = listing.visible(tree.names)
    if metadata := [name for name in shown if Path(name).name == "metadata.jsonl"]:
        return load_captioned(tree, read_metadata(tree, metadata), split, image_size, channels,
                              metadata, "image{s} that metadata.jsonl does not name")
    if texts := [name for name in shown if Path(name).match("celeba-caption/*.txt")]:
        return load_captioned(tree, read_captions(tree, texts), split, image_size, channels,
                              texts, "image{s} without caption")
    name = root.stem if root.is_file() else root.resolve().name
    try:
        found = listing.list_classes(tree.names, name)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from error
    # The classes of all splits, so that the labels agree.
    classes = sorted({image.label for image in found.images})
    chosen = [image for image in found.images if image.split == split]
    left_out = left_out_of(tree, found.left_out, [image.split for image in found.images], split)
    labels = np.array([classes.index(image.label) for image in chosen])
    images, sizes, frames = read_images(tree, [image.file for image in chosen], image_size,
                                        channels)
    return Dataset(images, labels, classes, None, left_out + frames, sizes)


def left_out_of(tree: Tree, left_out: LeftOut, splits: Iterable[str], split: str) -> Counter:
    """{reason: number of files or folders}, with the other split's images.

    ValueError if that leaves no image of the split.
    """
    counts = Counter(reason for _, reason in (*tree.left_out, *left_out))
    other = {"train": "test", "test": "train"}[split]
    splits = Counter(splits)
    if splits[other]:
        counts[f"{other} image{{s}}"] = splits[other]
    if not splits[split]:
        rest = f"; it holds {listing.in_words(counts)}" if counts else ""
        raise ValueError(f"{tree.root} holds no images for {split}{rest}")
    return counts


# ---- captions ----------------------------------------------------------------------------------

class Record(NamedTuple):
    """What is known of a picture; None where the set has no such thing."""
    file: str
    text: str | None
    label: str | int | None


def read_metadata(tree: Tree, files: list[str]) -> list[Record]:
    """The lines of metadata.jsonl, the ImageFolder format of Hugging Face.

    A line is {"file_name": ..., "text": ..., "label": ...}; text and label stand in all lines or in
    none. file_name is relative to the folder of the metadata.jsonl and stays in it. ValueError
    naming a line that is not so, or two lines of one picture.
    """
    records, lines = [], {}
    for file in files:
        for number, line in enumerate(tree.lines(file), 1):
            if line.strip():
                here = f"line {number} of {tree.root / file}"
                try:
                    record = parse_metadata(line)
                except (ValueError, KeyError, TypeError, AttributeError,
                        RecursionError) as error:
                    raise ValueError(f"{here} is no line of metadata: {error}") from error
                place = posixpath.normpath(Path(file).parent / record.file)
                if place in lines:
                    raise ValueError(f"{here} names {place}, as {lines[place]} does")
                lines[place] = here
                records.append(record._replace(file=place))
    for part in ("text", "label"):
        if len({type(getattr(record, part)) for record in records}) > 1:
            raise ValueError(f"{tree.root / files[0]}: some lines have a {part} and some have "
                             "none, or of different types")
    return records


def parse_metadata(line: str) -> Record:
    """One line of metadata.jsonl; bad ones raise Value-, Key-, Type- or AttributeError."""
    entry = json.loads(line)
    record = Record(entry["file_name"], entry.get("text"), entry.get("label"))
    good = (isinstance(record.file, str) and isinstance(record.text, str | None)
            and isinstance(record.label, str | int | None))
    if not good or isinstance(record.label, int) and record.label < 0:
        raise ValueError("file_name and text must be strings, label a string or an integer "
                         "from 0 up")
    if posixpath.normpath(record.file).split("/")[0] in ("", ".."):
        raise ValueError(f"{record.file} is outside its folder")
    return record


def read_captions(tree: Tree, texts: list[str]) -> list[Record]:
    """Multi-Modal-CelebA-HQ (Xia et al. 2021): CelebA-HQ-img/K.jpg and celeba-caption/K.txt.

    A text file has ten captions; the first is taken.
    """
    pictures = [Path(name) for name in listing.visible(tree.names)[0] if listing.is_picture(name)]
    images = {path.stem: path.as_posix() for path in pictures
              if path.parent.name in ("CelebA-HQ-img", "images")}
    records = []
    for text in sorted(texts, key=lambda name: (len(name), name)):
        stem = Path(text).stem
        if stem not in images:
            raise ValueError(f"{tree.root / text} has no picture CelebA-HQ-img/{stem}.jpg")
        records.append(Record(images[stem], tree.lines(text)[0].strip(), None))
    return records


def load_captioned(tree: Tree, records: list[Record], split: str, image_size: int, channels: int,
                   lists: list[str], reason: str) -> Dataset:
    """The central squares of the records' pictures; labels are zeros where the set has none.

    lists: the files that name them. reason: why other pictures are left out.
    """
    values = {record.label for record in records}   # of all splits, so that the labels agree
    classes = ["image"] if None in values else [str(value) for value in sorted(values)]
    try:
        splits, rest = listing.list_named(tree.names, [record.file for record in records], lists,
                                          reason)
    except ValueError as error:
        raise ValueError(f"{tree.root}: {error}") from error
    left_out = left_out_of(tree, rest, splits, split)
    chosen = [record for record, its in zip(records, splits, strict=True) if its == split]
    files, captions, labels = (list(column) for column in zip(*chosen, strict=True))
    numbers = [0 if label is None else classes.index(str(label)) for label in labels]
    images, sizes, frames = read_images(tree, files, image_size, channels, crop=True)
    return Dataset(images, np.array(numbers), classes, None if captions[0] is None else captions,
                   left_out + frames, sizes)
