"""Pictures in folders and zips: by class, with captions, or with the attributes of CelebA.

Every picture is decoded and converted on its own; what stays in memory is uint8. A damaged picture is refused by its
name.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from formats import COLOURS, UNREADABLE, Dataset, convert_one, say_once


def open_tree(root: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Names of all files below a folder or in a zip, hidden ones left out, and a function that reads one of them."""
    try:
        if root.is_file():
            archive = zipfile.ZipFile(root)
            names = archive.namelist()
        else:
            names = [p.relative_to(root).as_posix() for p in root.rglob("*")]
    except UNREADABLE as error:
        raise ValueError(f"{root} is no readable folder or zip: {error}") from error
    names = sorted(n for n in names if not re.search(r"(^|/)\.", n))
    return names, archive.read if root.is_file() else lambda name: (root / name).read_bytes()


def read_images(root: Path, read: Callable[[str], bytes], files: list[str], image_size: int, channels: int,
                crop: bool = False) -> np.ndarray:
    """The named pictures as uint8 [N, image_size, image_size, channels]. ValueError naming one that is damaged."""
    images = np.empty((len(files), image_size, image_size, channels), np.uint8)
    for i, name in enumerate(tqdm(files, desc=f"reading {root.name}", disable=len(files) < 2_000)):
        try:
            with Image.open(io.BytesIO(read(name))) as image:
                if image.mode[0] in "IF":   # 16 and 32 bits: converting would clip them to white
                    raise ValueError("it has more than 8 bits per channel")
                if image.size != (image_size, image_size) or (image.mode == "L") != (channels == 1):
                    say_once(f"{root.name}: images of other sizes or colours are converted to "
                             f"{image_size}x{image_size} in {COLOURS[channels]}")
                images[i] = convert_one(ImageOps.exif_transpose(image), image_size, channels, crop)
        except (*UNREADABLE, RuntimeError, SyntaxError) as error:
            raise ValueError(f"cannot read the image {name} of {root}: {error}") from error
    return images


def choose_split(names: list[str], split: str, depth: int) -> list[bool]:
    """Which files are of the split: those below a folder of its name; without such folders all are for training.

    depth: how many of the last parts of a path do not count: 1 for the file, 2 for its class too.
    """
    folders = [set(Path(n).parts[:-depth]) for n in names]
    if split == "test" or any({"train", "test"} & f for f in folders):   # never training images for testing
        return [split in f for f in folders]
    return [True] * len(names)


def load_folder(root: Path, split: str, image_size: int, channels: int) -> Dataset:
    """Pictures in a folder or a zip: with captions (`read_metadata`, `read_captions`) or in class sub-folders.

    The names of the classes are taken to be public, also where the images are private.
    """
    names, read = open_tree(root)
    pictures = [n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"))]
    if metadata := [n for n in names if Path(n).name == "metadata.jsonl"]:
        return load_captioned(root, read, read_metadata(root, read, metadata), split, image_size, channels)
    if texts := [n for n in names if Path(n).match("celeba-caption/*.txt")]:
        return load_captioned(root, read, read_captions(root, read, texts, pictures), split, image_size, channels)
    files = [n for n in pictures if "/" in n]
    classes = sorted({Path(n).parent.name for n in files})   # of all splits, so that the labels agree
    if classes and {*classes} <= {"train", "test"}:
        raise ValueError(f"{root} has its images directly in {' and '.join(classes)}: put those of each class into a "
                         "folder of its own there, or add a metadata.jsonl")
    files = [n for n, wanted in zip(files, choose_split(files, split, depth=2)) if wanted]
    if not files:
        raise ValueError(f"{root} holds no class sub-folders with images for {split}")
    labels = np.array([classes.index(Path(n).parent.name) for n in files])
    return Dataset(read_images(root, read, files, image_size, channels), labels, classes)


# ---- captions and attributes -----------------------------------------------------------------------

# A picture's path, its caption and its label; None where there is no such thing.
Record = tuple[str, str | None, str | int | None]


def read_lines(root: Path, read: Callable[[str], bytes], name: str) -> list[str]:
    try:
        return read(name).decode("utf-8").split("\n")
    except (*UNREADABLE, RuntimeError) as error:
        raise ValueError(f"cannot read {name} of {root}: {error}") from error


def read_metadata(root: Path, read: Callable[[str], bytes], files: list[str]) -> list[Record]:
    """Lines of metadata.jsonl (the ImageFolder format of Hugging Face): {"file_name": ..., "text": ..., "label": ...},
    the last two as the set has them; file_name is relative to the folder of the metadata.jsonl."""
    records = []
    for file in files:
        for number, line in enumerate(read_lines(root, read, file), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, text, label = entry["file_name"], entry.get("text"), entry.get("label")
                if not isinstance(name, str) or not isinstance(text, str | None) or not isinstance(
                        label, str | int | None) or isinstance(label, int) and label < 0:
                    raise ValueError("file_name and text must be strings, label a string or an integer from 0 up")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number} of {root / file} is no line of metadata: {error}") from error
            records.append(((Path(file).parent / name).as_posix(), text, label))
    for part in range(1, 3):
        if len({type(record[part]) for record in records}) > 1:
            raise ValueError(f"{root / files[0]}: some lines have a {('text', 'label')[part - 1]} and some have none, "
                             "or of different types")
    return records


def read_captions(root: Path, read: Callable[[str], bytes], texts: list[str], pictures: list[str]) -> list[Record]:
    """Multi-Modal-CelebA-HQ (Xia et al. 2021): CelebA-HQ-img/K.jpg, and K.txt with ten captions, of which the first."""
    images = {Path(n).stem: n for n in pictures if Path(n).parent.name in ("CelebA-HQ-img", "images")}
    records = []
    for text in sorted(texts, key=lambda n: (len(n), n)):
        if Path(text).stem not in images:
            raise ValueError(f"{root / text} has no picture CelebA-HQ-img/{Path(text).stem}.jpg")
        records.append((images[Path(text).stem], read_lines(root, read, text)[0].strip(), None))
    return records


def load_captioned(root: Path, read: Callable[[str], bytes], records: list[Record], split: str, image_size: int,
                   channels: int) -> Dataset:
    """The pictures of `records`, their central squares; labels are zeros where the set has none."""
    values = {label for _, _, label in records}   # of all splits, so that the labels agree
    classes = ["image"] if None in values else [str(value) for value in sorted(values)]
    wanted = choose_split([name for name, _, _ in records], split, depth=1)
    records = [record for record, is_wanted in zip(records, wanted) if is_wanted]
    if not records:
        raise ValueError(f"{root} names no images for {split}: a set with test images has them below test/")
    files, captions, labels = zip(*records)
    labels = [0 if label is None else classes.index(str(label)) for label in labels]
    return Dataset(read_images(root, read, list(files), image_size, channels, crop=True), np.array(labels), classes,
                   None if captions[0] is None else list(captions))


def load_celeba(folder: Path, split: str, image_size: int, channels: int, attribute: str = "Male") -> Dataset:
    """CelebA (Liu et al. 2015), aligned and cropped: the central squares, in two classes by one of 40 attributes.

    list_eval_partition.txt tells the splits: 0 is train, 1 (validation) goes unused, 2 is test.
    """
    root = next((folder / n for n in ("img_align_celeba", "img_align_celeba.zip") if (folder / n).exists()), None)
    if root is None or not (folder / "list_attr_celeba.txt").is_file():
        raise ValueError(f"{folder} must hold img_align_celeba (or its .zip) and list_attr_celeba.txt: "
                         "`python data.py --get celeba` says where to get them")
    rows = [line.split() for line in (folder / "list_attr_celeba.txt").read_text("ascii", "replace").splitlines()]
    attributes = rows[1] if len(rows) > 1 else []   # below the number of images
    if attribute not in attributes:
        raise ValueError(f"{folder}/list_attr_celeba.txt has no attribute {attribute!r} but {', '.join(attributes)}")
    column = attributes.index(attribute) + 1
    try:
        labels = {row[0]: {"1": 1, "-1": 0}[row[column]] for row in rows[2:] if row}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{folder}/list_attr_celeba.txt is damaged: {error}") from error
    partition = folder / "list_eval_partition.txt"
    if partition.is_file():
        code = {"train": "0", "test": "2"}[split]
        rows = [line.split() for line in partition.read_text("ascii", "replace").splitlines()]
        files = [row[0] for row in rows if row[1:] == [code]]
    elif split == "test":
        raise ValueError(f"{partition} is missing: without it all images of CelebA are for training")
    else:
        say_once(f"{partition} is missing: all images are taken for training, those of the official test set too")
        files = list(labels)
    if missing := [n for n in files if n not in labels] or ([] if files else ["any image"]):
        raise ValueError(f"{folder}: {partition.name} and list_attr_celeba.txt do not agree on {missing[0]}")
    names, read = open_tree(root)
    places = {Path(n).name: n for n in names}
    images = read_images(root, read, [places.get(n, n) for n in files], image_size, channels, crop=True)
    return Dataset(images, np.array([labels[n] for n in files]), [f"not {attribute}", attribute])
