"""Images and labels by name: rendered, published, or your own.

`load(source, split)` returns a Dataset of uint8 images [N, H, W, C] with labels [N]. A source is
    letters             rendered letters A-Z a-z, public       (40,000 train, 5,000 test)
    digits              rendered digits in another style, "private"  (20,000 train, 5,000 test)
    pen-letters         letters as written with a pen, thin to thick, public  (60,000, 5,000)
    pen-letters-varied  also turned or mirrored (208 classes), some with a bar or loop more
    captioned-letters, captioned-digits
                        with captions: "a thin digit 7 leaning right". The training digits lack
                        some combinations of digit, weight and slant (glyphs.held_out)
    scenes              letters and shapes on textured backgrounds, 256x256, public, with captions
                        (4,000 train, 140 test)
    scenes-private      digits, other shapes and other colours, "private"  (4,000, 140)
    leaves              coloured dead leaves, 32x32, public: for private photographs
                        (40,000 train, 1,000 test)
    a name              mnist, fashion-mnist, emnist-letters, svhn, cifar10, cifar100,
                        celeba (or celeba:Smiling, ...), celebahq, imagenet32 or imagenet64:
                        the publisher's files in DATA_DIR/NAME
    a path              an .npz of images and labels, or a folder or zip of images. The images are
                        in class sub-folders or have captions in a metadata.jsonl, below train/
                        and test/ or without test images. ./NAME is a folder, NAME may not be
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from datasets import celeba, download, folders, formats, lazy, listing
from datasets.formats import Dataset
from datasets.rendered import GLYPHS, RENDERED, load_rendered
from runtime.terminal import on_one_line

__all__ = ["GREY_28", "Dataset", "load", "same_source"]

GREY_28 = (*GLYPHS, "mnist", "fashion-mnist", "emnist-letters")   # 28x28 grey images

# name -> reader of (folder, split, image_size, channels). The first readers return images as
# they are stored, the others convert each one or each batch by itself.
PUBLISHED: dict[str, Callable[[Path, str, int, int], Dataset]] = {
    "mnist": lambda folder, split, *_: formats.load_mnist(folder, split),
    "fashion-mnist": lambda folder, split, *_: formats.load_mnist(
        folder, split, "fashion-mnist", formats.FASHION),
    "emnist-letters": lambda folder, split, *_: formats.load_emnist_letters(folder, split),
    "svhn": lambda folder, split, *_: formats.load_svhn(folder, split),
    "cifar10": lambda folder, split, *_: formats.load_cifar(folder, split, 10),
    "cifar100": lambda folder, split, *_: formats.load_cifar(folder, split, 100),
    "imagenet32": lambda folder, split, *target: formats.load_imagenet(folder, split, 32, *target),
    "imagenet64": lambda folder, split, *target: formats.load_imagenet(folder, split, 64, *target),
    "celeba": celeba.load_celeba,
    "celebahq": celeba.load_celebahq,
}


def load(source: str, split: str, data_dir: str = "data", image_size: int = 32,
         channels: int = 1, is_public: bool = False) -> Dataset:
    """The `split` ("train" or "test") of a source, at image_size x image_size, in 1 or 3 channels.

    Grey 28x28 images get a black border up to 32x32. Images of other sizes are resampled, other
    channels converted, and a line is printed about it. Another line says how many images there are
    and what was left out; of public ones also their sizes, and how many a class has. Pictures of a
    large set are read when they are indexed (lazy.py), and what is odd about them is said then.
    ValueError for an unknown source, for a name that is a path too, and for missing, damaged or
    mismatched files, naming the file.
    """
    if split not in ("train", "test") or channels not in (1, 3) or image_size < 1:
        raise ValueError(f"cannot load the split {split!r} with {channels} channels at size "
                         f"{image_size}: give train or test, 1 or 3, and a positive size")
    name = source.partition(":")[0]
    if source in RENDERED:
        check_no_path(source)
        dataset = load_rendered(source, split)
    elif name in PUBLISHED and name in (source, "celeba"):
        check_no_path(name, download.folder_of(name, data_dir))
        dataset = load_published(source, split, data_dir, image_size, channels)
    else:
        dataset = load_path(source, split, image_size, channels)
    if dataset.sizes is None:
        dataset.sizes = Counter({dataset.images.shape[1:3]: len(dataset.images)})
    if source in GREY_28:
        dataset.images = with_border(dataset.images, image_size)
    dataset.images = formats.convert(dataset.images, image_size, channels, source)
    for line in describe(source, split, dataset, is_public):
        print(on_one_line(line))
    return dataset


def check_no_path(name: str, but: Path | None = None) -> None:
    """ValueError if the name of a set is that of a file or folder here too, other than `but`."""
    path = Path(name)
    if path.exists() and not (but and but.exists() and path.samefile(but)):
        raise ValueError(f"{name} is a set of this program, and a path here: give ./{name} for the "
                         f"path, or rename it")


def describe(source: str, split: str, dataset: Dataset, is_public: bool) -> Iterator[str]:
    """The lines that are printed once images are loaded.

    How many a class has, and their sizes, would tell of private images. That a class has none is
    said: no run can learn it.
    """
    name = (Path(source).name or source) + (" (test)" if split == "test" else "")
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    left_out = listing.in_words(dataset.left_out)
    yield (f"{name}: {listing.words(len(dataset.images), 'image{s}')}, "
           f"{listing.words(len(dataset.classes), 'class{es}')}"
           + (f"; left out: {left_out}" if left_out else ""))
    if missing := [dataset.classes[k] for k in np.flatnonzero(counts == 0)]:
        rest = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        yield f"{name}: no image of {', '.join(missing[:5])}{rest} for {split}"
    if is_public:
        by_area = sorted(dataset.sizes, key=lambda size: (size[0] * size[1], size))
        sizes = " to ".join(f"{height}x{width}" for height, width in
                            dict.fromkeys(by_area[:1] + by_area[-1:]))
        numbers = " to ".join(f"{count:,}" for count in dict.fromkeys((counts.min(), counts.max())))
        yield f"{name}: {numbers} of each class" + (f"; {sizes} pixels" if sizes else "")


def load_published(source: str, split: str, data_dir: str, image_size: int,
                   channels: int) -> Dataset:
    """A published set, from DATA_DIR/NAME; MNIST's files may also lie in DATA_DIR itself."""
    name, _, attribute = source.partition(":")
    folder = download.folder_of(name, data_dir)
    if name == "mnist" and not folder.is_dir() and Path(data_dir).name not in download.NAMES:
        folder = Path(data_dir)
    options = [attribute] if attribute else []
    return PUBLISHED[name](folder, split, image_size, channels, *options)


def load_path(source: str, split: str, image_size: int, channels: int) -> Dataset:
    """An .npz, a folder or a zip. ValueError if there is none of this path."""
    path = Path(source)
    if path.suffix.lower() == ".npz" and path.is_file():
        return formats.load_npz(path, split)
    if path.exists():
        return folders.load_folder(path, split, image_size, channels)
    names = ", ".join([*RENDERED, *download.NAMES])
    raise ValueError(f"unknown data {source!r}: give {names}, or an .npz, folder or zip that "
                     "exists")


def with_border(images: np.ndarray, image_size: int) -> np.ndarray | lazy.Images:
    """28x28 images with zeros around: up to image_size if it is 28 to 32, else up to 32x32."""
    border = (image_size if 28 <= image_size <= 32 else 32) - 28
    pads = *[(border // 2, border - border // 2)] * 2, (0, 0)
    shape = len(images), 28 + border, 28 + border, 1
    if lazy.fits(shape):
        return np.pad(images, ((0, 0), *pads))
    return lazy.Images(lambda k: np.pad(images[k], pads), shape)


def same_source(one: str, other: str) -> bool:
    """Whether two sources are the same images.

    One file may have two paths, and one set may have classes by two attributes.
    """
    def identity(source: str) -> str:
        path = Path(source)
        return str(path.resolve()) if path.exists() else source.partition(":")[0]

    return identity(one) == identity(other)
