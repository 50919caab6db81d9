"""CelebA, whose attributes are classes, and CelebA-HQ, which has captions."""

from collections import Counter
from pathlib import Path

import numpy as np

from datasets import listing
from datasets.folders import load_folder, read_images
from datasets.formats import Dataset
from datasets.trees import open_tree
from runtime.distributed import log_once


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
    places = {Path(name).name: name for name in listing.visible(tree.names)[0]
              if listing.is_picture(name)}
    known = [places[name] for name in labels if name in places]
    _, rest = listing.list_named(tree.names, known, (), "image{s} without attributes")
    left_out = Counter(reason for _, reason in (*tree.left_out, *rest))
    left_out["image{s} of other splits"] = max(0, len(known) - len(files))
    images, sizes, frames = read_images(tree, [places.get(name, name) for name in files],
                                        image_size, channels, crop=True)
    numbers = np.array([labels[name] for name in files])
    return Dataset(images, numbers, [f"not {attribute}", attribute], None, +left_out + frames,
                   sizes)


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
