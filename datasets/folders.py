"""Pictures in folders and zips, by class or with captions.

listing.py decides what is an image of what. Every picture is decoded and converted on its own; only
uint8 stays in memory, and of a large set nothing (lazy.py). A damaged picture is refused by name.
"""

import io
import json
import posixpath
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from datasets import lazy, listing
from datasets.formats import Dataset, convert_one, name_classes, say_conversion
from datasets.listing import LeftOut
from datasets.trees import Tree, open_tree
from runtime.distributed import log_once

warnings.filterwarnings("ignore", "Corrupt EXIF data")   # `orientation` says nothing then
warnings.simplefilter("ignore", Image.DecompressionBombWarning)   # worse is an error


# ---- pictures ----------------------------------------------------------------------------------

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
GREY_16 = ("I;16", "PNG", "PPM")   # Pillow has 16 bits of the latter two as 32, in older versions


class Picture(NamedTuple):
    """A decoded file."""
    image: Image.Image   # of 8 bits, upright, on white
    mode: str            # Pillow's, as stored
    frames: int


def decode(content: bytes) -> Picture:
    """A picture from the bytes of a file. Damaged ones raise anything."""
    with Image.open(io.BytesIO(content)) as image:
        frames = getattr(image, "n_frames", 1)
        image.load()   # a TIFF turns itself here
        turn, upright = TURNS.get(orientation(image)), on_white(eight_bits(image))
        return Picture(upright if turn is None else upright.transpose(turn), image.mode, frames)


def orientation(image: Image.Image) -> int:
    """As EXIF has it. Damaged EXIF has none: the pixels are sound."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:   # anything can be damaged
        return 1


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 0 to 65535, as 0 to 255; a transparent grey is white then.

    ValueError for more bits, which may mean any range, and for fractions.
    """
    if image.mode[0] not in "IF":
        return image
    if image.mode == "F" or not {image.mode[:4], image.format} & {*GREY_16}:
        raise ValueError("its grey has more than 16 bits, or fractions: save it in 8 or 16 bits")
    values = np.asarray(image).astype(np.int64)
    levels = np.rint(values / 257)
    if getattr(image, "tag_v2", {}).get(262) == 0:   # a TIFF in which 0 is white
        levels = 255 - levels
    levels[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(levels.astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """Transparent images on a white ground; others as they are."""
    if not image.has_transparency_data:
        return image
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground


def read_images(tree: Tree, files: list[str], image_size: int, channels: int,
                crop: bool = False) -> tuple[np.ndarray | lazy.Images, Counter, Counter]:
    """The named pictures as uint8 [N, image_size, image_size, channels].

    Also their sizes before that, {(height, width): number}, and what was left out of them: both are
    empty for a large set, of which nothing has been read yet. Of several frames the first is taken.
    ValueError naming a picture that is damaged, once it is read, or that stands there twice: it
    would count twice, but privacy is promised for one example.
    """
    name, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{tree.root} names the image {name} {count} times")
    shape = len(files), image_size, image_size, channels
    name, sizes, left_out, lock = tree.root.name, Counter(), Counter(), threading.Lock()

    def make(k: int) -> np.ndarray:
        picture, pixels = read_picture(tree, files[k], image_size, channels, crop)
        with lock:   # threads come here
            say_changes(picture, image_size, channels, name)
            if lazy.fits(shape):
                sizes[picture.image.height, picture.image.width] += 1
                left_out["further frame{s}"] += picture.frames - 1
            elif picture.frames > 1:   # the line that counts them was printed long ago
                log_once(f"{name}: of several frames the first is taken; the others are left out")
        return pixels

    return lazy.in_memory_if_small(make, shape, f"reading {name}"), sizes, +left_out


def read_picture(tree: Tree, name: str, image_size: int, channels: int,
                 crop: bool) -> tuple[Picture, np.ndarray]:
    """A picture, and its pixels as `convert_one` has them. ValueError naming a damaged one."""
    content = tree.read(name)
    try:
        picture = decode(content)
        return picture, convert_one(picture.image, image_size, channels, crop)
    except Exception as error:   # damaged bytes can fail anywhere in Pillow
        reason = (f"Pillow {PIL.__version__} cannot tell its format"
                  if isinstance(error, UnidentifiedImageError) else error)
        raise ValueError(f"cannot read the image {name} of {tree.root}: {reason}") from error


def say_changes(picture: Picture, image_size: int, channels: int, name: str) -> None:
    """Lines, once for a whole set, about what is not taken as it is stored."""
    fitting = picture.image.size == (image_size, image_size)
    if not fitting or (picture.mode == "L") != (channels == 1):
        say_conversion(name, image_size, channels)
    if picture.mode[0] == "I":
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
    tree.check_links(image.file for image in found.images)
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
    unused: tuple[str, ...] = ()   # keys that nothing is made of


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
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
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
    """One line of metadata.jsonl; bad ones raise Value-, Type-, Attribute- or RecursionError."""
    entry = json.loads(line)
    if "file_name" not in entry:
        raise ValueError("it has no file_name")
    record = Record(entry["file_name"], entry.get("text"), entry.get("label"),
                    tuple(entry.keys() - {"file_name", "text", "label"}))
    good = (isinstance(record.file, str) and isinstance(record.text, str | None)
            and isinstance(record.label, str | int | None))
    if not good or isinstance(record.label, int) and record.label < 0:
        raise ValueError("file_name and text must be strings, label a string or an integer "
                         "from 0 up")
    if posixpath.normpath(record.file).split("/")[0] in ("", ".."):
        raise ValueError(f"{record.file} is outside its folder")
    f"{record.text}{record.label}".encode()   # half a surrogate is no text
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
    tree.check_links(record.file for record in records)
    try:
        classes, numbers = classes_of([record.label for record in records])
        splits, rest = listing.list_named(tree.names, [record.file for record in records], lists,
                                          reason)
    except ValueError as error:
        raise ValueError(f"{tree.root}: {error}") from error
    left_out = left_out_of(tree, rest, splits, split)
    left_out.update(f"{key!r} of metadata.jsonl" for record in records for key in record.unused)
    chosen = [k for k, its in enumerate(splits) if its == split]
    images, sizes, frames = read_images(tree, [records[k].file for k in chosen], image_size,
                                        channels, crop=True)
    captions = None if records[0].text is None else [records[k].text for k in chosen]
    return Dataset(images, np.array([numbers[k] for k in chosen]), classes, captions,
                   left_out + frames, sizes)


def classes_of(values: list[str] | list[int] | list[None]) -> tuple[list[str], list[int]]:
    """(names of the classes of all splits, the number of each value). None: all are one class.

    ValueError for numbers with gaps.
    """
    if not values or values[0] is None:
        return ["image"], [0] * len(values)
    if isinstance(values[0], int):
        first, names = name_classes("metadata.jsonl", [np.array(values)], None)
        return names, [value - first for value in values]
    spelled = [listing.normal(value) for value in values]
    names = sorted({*spelled})
    return names, [names.index(value) for value in spelled]
