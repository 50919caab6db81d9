"""Pictures in folders and zips: by class, with captions, or with the attributes of CelebA.

Every picture is decoded and converted on its own; only uint8 stays in memory. A damaged picture is
refused by name.
"""

import io
import json
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from datasets.formats import COLOURS, Dataset, convert_one
from runtime.distributed import log_once
from runtime.files import UNREADABLE

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
# What Pillow and zipfile raise besides: bombs, passwords, damaged chunks.
BAD_PICTURE = (*UNREADABLE, Image.DecompressionBombError, RuntimeError, SyntaxError)


@dataclass
class Tree:
    """All files below a folder or in a zip, without hidden ones."""
    root: Path
    names: list[str]                 # paths below the root, sorted
    read: Callable[[str], bytes]     # the content of one of them

    def lines(self, name: str) -> list[str]:
        """A text file's lines, in UTF-8. ValueError naming it if it is damaged."""
        try:
            return self.read(name).decode("utf-8").split("\n")
        except (*UNREADABLE, RuntimeError) as error:
            raise ValueError(f"cannot read {name} of {self.root}: {error}") from error


def open_tree(root: Path) -> Tree:
    """The files of a folder or a zip. ValueError naming it if it is neither."""
    def read_file(name: str) -> bytes:
        return (root / name).read_bytes()

    try:
        if root.is_file():
            archive = zipfile.ZipFile(root)
            names, read = archive.namelist(), archive.read
        else:
            names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
            read = read_file
    except UNREADABLE as error:
        raise ValueError(f"{root} is no readable folder or zip: {error}") from error
    shown = {name for name in names if not re.search(r"(^|/)\.", name)}   # a zip may repeat names
    return Tree(root, sorted(shown), read)


def read_images(tree: Tree, files: list[str], image_size: int, channels: int,
                crop: bool = False) -> np.ndarray:
    """The named pictures as uint8 [N, image_size, image_size, channels].

    ValueError naming a picture that is damaged, has more than 8 bits per channel or stands there
    twice: it would count twice, but privacy is promised for one example.
    """
    name, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{tree.root} names the image {name} {count} times")
    images = np.empty((len(files), image_size, image_size, channels), np.uint8)
    progress = tqdm(files, desc=f"reading {tree.root.name}", disable=len(files) < 2_000)
    for i, name in enumerate(progress):
        try:
            with Image.open(io.BytesIO(tree.read(name))) as image:
                if image.mode[0] in "IF":   # converting would clip 16 and 32 bits to white
                    raise ValueError("it has more than 8 bits per channel")
                right_size = image.size == (image_size, image_size)
                if not right_size or (image.mode == "L") != (channels == 1):
                    log_once(f"{tree.root.name}: images of other sizes or colours are converted to "
                             f"{image_size}x{image_size} in {COLOURS[channels]}")
                upright = ImageOps.exif_transpose(image)
                images[i] = convert_one(upright, image_size, channels, crop)
        except BAD_PICTURE as error:
            raise ValueError(f"cannot read the image {name} of {tree.root}: {error}") from error
    return images


def is_of_split(names: list[str], split: str, depth: int) -> list[bool]:
    """Which files are of the split: those below a folder of its name.

    Without such folders all are for training; training images are never used for testing. depth:
    how many of the last parts of a path do not count: 1 for the file, 2 for its class too.
    """
    folders = [set(Path(name).parts[:-depth]) for name in names]
    if split == "test" or any({"train", "test"} & f for f in folders):
        return [split in f for f in folders]
    return [True] * len(names)


def load_folder(root: Path, split: str, image_size: int, channels: int) -> Dataset:
    """Pictures in a folder or a zip, with captions or in class sub-folders.

    `read_metadata` and `read_captions` say where captions stand. The names of the classes are taken
    to be public, also where the images are private.
    """
    tree = open_tree(root)
    if metadata := [name for name in tree.names if Path(name).name == "metadata.jsonl"]:
        return load_captioned(tree, read_metadata(tree, metadata), split, image_size, channels)
    if texts := [name for name in tree.names if Path(name).match("celeba-caption/*.txt")]:
        return load_captioned(tree, read_captions(tree, texts), split, image_size, channels)
    files = [name for name in tree.names if "/" in name and name.lower().endswith(PICTURES)]
    # The classes of all splits, so that the labels agree.
    classes = sorted({Path(name).parent.name for name in files})
    if classes and {*classes} <= {"train", "test"}:
        raise ValueError(f"{root} has its images directly in {' and '.join(classes)}: put each "
                         "class's into a folder of its own there, or add a metadata.jsonl")
    wanted = is_of_split(files, split, depth=2)
    files = [name for name, is_wanted in zip(files, wanted, strict=True) if is_wanted]
    if not files:
        raise ValueError(f"{root} holds no class sub-folders with images for {split}")
    labels = np.array([classes.index(Path(name).parent.name) for name in files])
    return Dataset(read_images(tree, files, image_size, channels), labels, classes)


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
                except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    pictures = [Path(name) for name in tree.names if name.lower().endswith(PICTURES)]
    images = {path.stem: path.as_posix() for path in pictures
              if path.parent.name in ("CelebA-HQ-img", "images")}
    records = []
    for text in sorted(texts, key=lambda name: (len(name), name)):
        stem = Path(text).stem
        if stem not in images:
            raise ValueError(f"{tree.root / text} has no picture CelebA-HQ-img/{stem}.jpg")
        records.append(Record(images[stem], tree.lines(text)[0].strip(), None))
    return records


def load_captioned(tree: Tree, records: list[Record], split: str, image_size: int,
                   channels: int) -> Dataset:
    """The central squares of the records' pictures; labels are zeros where the set has none."""
    values = {record.label for record in records}   # of all splits, so that the labels agree
    classes = ["image"] if None in values else [str(value) for value in sorted(values)]
    wanted = is_of_split([record.file for record in records], split, depth=1)
    chosen = [record for record, is_wanted in zip(records, wanted, strict=True) if is_wanted]
    if not chosen:
        raise ValueError(f"{tree.root} names no images for {split}: a set with test images has "
                         "them below test/")
    files, captions, labels = (list(column) for column in zip(*chosen, strict=True))
    numbers = [0 if label is None else classes.index(str(label)) for label in labels]
    images = read_images(tree, files, image_size, channels, crop=True)
    return Dataset(images, np.array(numbers), classes, None if captions[0] is None else captions)


# ---- CelebA ------------------------------------------------------------------------------------

def load_celeba(folder: Path, split: str, image_size: int, channels: int,
                attribute: str = "Male") -> Dataset:
    """CelebA (Liu et al. 2015), aligned and cropped: the central squares, in two classes.

    One of 40 attributes decides the class. ValueError naming a file that is missing or damaged.
    """
    faces = folder / "img_align_celeba"
    root = faces if faces.exists() else faces.with_suffix(".zip")
    attributes = folder / "list_attr_celeba.txt"
    if not root.exists() or not attributes.is_file():
        raise ValueError(f"{folder} must hold img_align_celeba (or its .zip) and "
                         "list_attr_celeba.txt: `python data.py --get celeba` says where to get "
                         "them")
    labels = read_attribute(attributes, attribute)
    partition = folder / "list_eval_partition.txt"
    files = read_partition(partition, split)
    if files is None:
        log_once(f"{partition} is missing: all images are taken for training, also the official "
                 "test set")
        files = list(labels)
    unknown = [name for name in files if name not in labels]
    if unknown or not files:
        what = unknown[0] if unknown else "any image"
        raise ValueError(f"{folder}: {partition.name} and {attributes.name} do not agree on {what}")
    tree = open_tree(root)
    places = {Path(name).name: name for name in tree.names}
    images = read_images(tree, [places.get(name, name) for name in files], image_size, channels,
                         crop=True)
    numbers = np.array([labels[name] for name in files])
    return Dataset(images, numbers, [f"not {attribute}", attribute])


def read_rows(path: Path) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in path.read_text("ascii", "replace").splitlines()]


def read_attribute(path: Path, attribute: str) -> dict[str, int]:
    """0 or 1 for each picture's name, from list_attr_celeba.txt: a count, names, 1 or -1 each."""
    rows = read_rows(path)
    attributes = rows[1] if len(rows) > 1 else []
    if attribute not in attributes:
        raise ValueError(f"{path} has no attribute {attribute!r} but {', '.join(attributes)}")
    column = attributes.index(attribute) + 1
    try:
        return {row[0]: {"1": 1, "-1": 0}[row[column]] for row in rows[2:] if row}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_partition(path: Path, split: str) -> list[str] | None:
    """The pictures of the split, from list_eval_partition.txt: 0 is train, 2 is test.

    1, validation, goes unused. None if there is no such file, which makes all images training
    images; ValueError if test images are asked for then.
    """
    if path.is_file():
        code = {"train": "0", "test": "2"}[split]
        return [row[0] for row in read_rows(path) if row[1:] == [code]]
    if split == "test":
        raise ValueError(f"{path} is missing: without it all images of CelebA are for training")
    return None


def load_celebahq(folder: Path, split: str, image_size: int, channels: int) -> Dataset:
    """CelebA-HQ with captions, as published or with a metadata.jsonl."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: `python data.py --get celebahq` says where to get "
                         "its files")
    return load_folder(folder, split, image_size, channels)
