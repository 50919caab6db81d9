"""What a Dataset is, and readers of publishers' files: IDX, .npz, .mat, binary batches.

Images stay bytes: a float32 copy of a large set would not fit into memory. What is large itself is
read when it is indexed (lazy.py). Images of other sizes or colours are converted one by one.
Damaged files are refused by name.
"""

import gzip
import io
import math
import string
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

from datasets import lazy, listing
from runtime.distributed import log_once
from runtime.files import UNREADABLE, array_header, array_names, map_array, read_arrays

COLOURS = {1: "grey", 3: "colour"}
LARGEST = 2**28   # bytes that one file of an archive or folder may have, unpacked
DIGITS = list(string.digits)
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
           "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@dataclass
class Dataset:
    """Images, and what they show. ValueError unless labels and captions are as many as images."""
    images: np.ndarray | lazy.Images    # uint8 [N, H, W, C]
    labels: np.ndarray                  # int64 [N]
    classes: list[str]                  # the name of each label
    captions: list[str] | None = None   # a sentence for each image
    left_out: Counter = field(default_factory=Counter)   # {reason as in listing.py: number}
    # {(height, width), upright: number}; empty: not known yet; None: all are stored as they are
    sizes: Counter | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "captions"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.images):
                raise ValueError(f"{len(self.images)} images but {len(values)} {name}: "
                                 "they must be as many")


# ---- sizes and channels ------------------------------------------------------------------------

def convert_one(image: Image.Image, image_size: int, channels: int,
                crop: bool = False) -> np.ndarray:
    """A picture as uint8 [image_size, image_size, channels].

    It is squeezed into a square, or its central square is taken (crop).
    """
    image = image.convert("L" if channels == 1 else "RGB")
    if crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    resized = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(resized).reshape(image_size, image_size, channels)


def convert(images: np.ndarray | lazy.Images, image_size: int, channels: int,
            name: str) -> np.ndarray | lazy.Images:
    """uint8 [N, H, W, 1 or 3] -> [N, image_size, image_size, channels].

    Returns the same images if nothing is to convert; otherwise prints so, once for each `name`.
    """
    N, height, width, stored = images.shape
    if (height, width, stored) == (image_size, image_size, channels):
        return images
    say_conversion(name, image_size, channels)

    def make(k: int) -> np.ndarray:
        image = images[k]
        picture = Image.fromarray(image[..., 0] if stored == 1 else image)
        return convert_one(picture, image_size, channels)

    shape = N, image_size, image_size, channels
    return lazy.in_memory_if_small(make, shape, f"converting {name}")


def say_conversion(name: str, image_size: int, channels: int) -> None:
    """One line for a whole set. Which sizes its images have is not said: they may be private."""
    log_once(f"{name}: images of other sizes or colours are converted to "
             f"{image_size}x{image_size} in {COLOURS[channels]}")


# ---- .npz --------------------------------------------------------------------------------------

def load_npz(path: Path, split: str) -> Dataset:
    """An .npz of uint8 `images` [N, H, W] or [N, H, W, C] and integer `labels`, for training.

    With test images it holds train_images, train_labels, test_images and test_labels. `classes` may
    name the labels from 0 up. Without it they count from 0 or 1, none is left out in both splits
    together, and their numbers are the names. Other arrays are left out.
    """
    names = array_names(path)
    splits = ("train", "test") if "test_images" in names else ("",)
    if split == "test" and "test" not in splits:
        raise ValueError(f"{path} has no test_images and test_labels: "
                         "its images are all for training")
    pairs = {part: (f"{part}_images".lstrip("_"), f"{part}_labels".lstrip("_")) for part in splits}
    shapes = {part: check_shapes(path, *pair) for part, pair in pairs.items()}
    labels = dict(zip(splits, read_arrays(path, [pair[1] for pair in pairs.values()]), strict=True))
    for array in labels.values():
        if array.min() < 0:
            raise ValueError(f"{path} has labels below 0: give integers [N] from 0 up")
    named = read_arrays(path, ["classes"])[0].tolist() if "classes" in names else None
    first, classes = name_classes(path, list(labels.values()), named)
    used = {"classes", *(name for pair in pairs.values() for name in pair)}
    left_out = Counter({"other array{s}": len({*names} - used)})
    for part in {*splits} - {split, ""}:
        left_out[f"{part} image{{s}}"] = shapes[part][0]
    chosen = split if split in splits else ""
    images = read_or_map(path, pairs[chosen][0])
    images = images[..., None] if images.ndim == 3 else images
    numbers = labels[chosen].reshape(-1).astype(np.int64) - first
    return Dataset(images, numbers, classes, None, +left_out)


def read_or_map(path: Path, name: str) -> np.ndarray:
    """An array of an .npz. A large one is mapped: it takes no memory, if it is not compressed."""
    shape, dtype = array_header(path, name)
    large = math.prod(shape) * dtype.itemsize > lazy.LARGE
    mapped = map_array(path, name) if large else None
    return read_arrays(path, [name])[0] if mapped is None else mapped


def check_shapes(path: Path, images: str, labels: str) -> tuple[int, ...]:
    """The shape of the images in an .npz, by its headers alone: arrays of zeros unpack to much.

    ValueError unless they are uint8 [N, H, W] or [N, H, W, C], and the labels N integers.
    """
    (shape, dtype), (count, kind) = (array_header(path, name) for name in (images, labels))
    if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)) or (
            0 in shape):
        raise ValueError(f"the {images} of {path} are {dtype} {shape}: "
                         "give uint8 [N, H, W] or [N, H, W, 1 or 3]")
    if kind.kind not in "iu" or count[:1] != (math.prod(count),):
        raise ValueError(f"the {labels} of {path} are {kind} {count}: give integers [N] from 0 up")
    if count[0] != shape[0]:
        raise ValueError(f"{path} has {shape[0]} {images} but {count[0]} {labels}: they must be as "
                         "many")
    return shape


def name_classes(path: Path | str, arrays: list[np.ndarray],
                 named: list | None) -> tuple[int, list[str]]:
    """(the first class's label, the names of all), from the labels of all splits.

    named: the file's own names. ValueError if some label has no name or no image: a number such as
    255 may mean "no label", and would be a class.
    """
    labels = sorted({label for array in arrays for label in np.unique(array).tolist()})
    first, last = labels[0], labels[-1]
    if named is None and (first > 1 or last - first >= len(labels)):
        raise ValueError(f"the labels of {path} are {len(labels)} numbers from {first} to {last}: "
                         "count from 0 or 1 without gaps, or give all classes names")
    if named is None:
        return first, [str(label) for label in labels]
    strings = isinstance(named, list) and all(isinstance(name, str) for name in named)
    names = [listing.normal(name) for name in named] if strings else []
    if len({*names}) != len(names) or last >= len(names):
        raise ValueError(f"`classes` of {path} must be {last + 1} or more different strings, the "
                         "names of the labels from 0 up")
    return 0, names


# ---- IDX: MNIST, Fashion-MNIST, EMNIST ---------------------------------------------------------

def read_idx(path: Path, content: bytes | None = None) -> np.ndarray:
    """An unsigned-byte array in IDX format: 00 00 08 (rank), big-endian uint32 sizes, the bytes.

    content: the bytes of the file, where they come out of an archive. A large file is mapped: it
    takes no memory. ValueError naming the file if it is damaged or of another type.
    """
    try:
        if content is None:   # "c": who writes into the array leaves the file alone
            large = path.stat().st_size > lazy.LARGE
            content = np.memmap(path, np.uint8, "c") if large else path.read_bytes()
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(LARGEST + 1)
            check_size(len(content))
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable IDX file: {error}") from error
    if (zeros, kind) != (0, 8):
        raise ValueError(f"{path} is no IDX file of unsigned bytes")
    return array


def find_idx(folder: Path, part: str, name: str) -> np.ndarray:
    """The array of PART or PART.gz in a folder, or of gzip/PART.gz in its gzip.zip, as EMNIST's."""
    for path in (folder / part, folder / f"{part}.gz"):
        if path.is_file():
            return read_idx(path)
    packed, inside = folder / "gzip.zip", f"gzip/{part}.gz"
    if packed.is_file():
        return read_idx(packed / inside, read_members(packed, [inside])[inside])
    raise ValueError(f"{folder / part}[.gz] is missing: `python data.py --get {name}` fetches it")


def load_idx(folder: Path, prefix: str, name: str, classes: list[str], first: int = 0) -> Dataset:
    """PREFIX-images-idx3-ubyte and PREFIX-labels-idx1-ubyte, gzipped or not.

    The images are 28x28 and grey; the labels count from `first`.
    """
    images = find_idx(folder, f"{prefix}-images-idx3-ubyte", name)
    labels = find_idx(folder, f"{prefix}-labels-idx1-ubyte", name)
    last = first + len(classes) - 1
    fitting = images.shape == (len(labels), 28, 28) and labels.ndim == 1
    if not fitting or not np.isin(labels, range(first, last + 1)).all():
        raise ValueError(f"{folder / prefix}-images-idx3-ubyte and its labels have the shapes "
                         f"{images.shape} and {labels.shape}: {name} has [N, 28, 28] and [N], "
                         f"labels from {first} to {last}")
    return Dataset(images[..., None], labels.astype(np.int64) - first, list(classes))


def load_mnist(folder: Path, split: str, name: str = "mnist",
               classes: list[str] = DIGITS) -> Dataset:
    """MNIST (LeCun et al. 1998), or Fashion-MNIST (Xiao et al. 2017) with the same file names."""
    return load_idx(folder, {"train": "train", "test": "t10k"}[split], name, classes)


def load_emnist_letters(folder: Path, split: str) -> Dataset:
    """EMNIST letters (Cohen et al. 2017): a class holds a letter's capital and small forms.

    The files hold the images transposed.
    """
    classes = list(string.ascii_uppercase)
    dataset = load_idx(folder, f"emnist-letters-{split}", "emnist-letters", classes, first=1)
    dataset.images = np.ascontiguousarray(dataset.images.swapaxes(1, 2))
    return dataset


# ---- SVHN --------------------------------------------------------------------------------------

def load_svhn(folder: Path, split: str) -> Dataset:
    """SVHN's cropped digits (Netzer et al. 2011).

    The .mat holds X uint8 [32, 32, 3, N] and y [N, 1], where 10 stands for 0.
    """
    path = folder / f"{split}_32x32.mat"
    if not path.is_file():
        raise ValueError(f"{path} is missing: `python data.py --get svhn` fetches it")
    try:
        arrays = scipy.io.loadmat(path)
        images, labels = arrays["X"], arrays["y"].reshape(-1)
    except Exception as error:   # SciPy raises whatever the damaged bytes lead it to
        raise ValueError(f"{path} is no readable .mat of X and y: {error}") from error
    fitting = images.shape == (32, 32, 3, len(labels)) and images.dtype == np.uint8
    if not fitting or not np.isin(labels, range(1, 11)).all():
        raise ValueError(f"{path} holds X {images.dtype} {images.shape} and y {labels.shape}: SVHN "
                         "has uint8 [32, 32, 3, N] and [N, 1], labels from 1 to 10")
    images = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
    return Dataset(images, labels.astype(np.int64) % 10, list(DIGITS))


# ---- CIFAR -------------------------------------------------------------------------------------

def read_members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The named files of a .zip or a .tar.gz, read in one pass.

    ValueError naming the archive if it is damaged or lacks a file.
    """
    names = list(names)
    try:
        members_of = members_of_zip if path.suffix == ".zip" else members_of_tar
        found = members_of(path, names)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable archive: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} lacks {missing[0]}")
    return found


def members_of_zip(path: Path, names: list[str]) -> dict[str, bytes]:
    """The named files of a zip, as many as it has."""
    with zipfile.ZipFile(path) as archive:
        return {name: read_member(archive, archive.getinfo(name)) for name in names
                if name in archive.namelist()}


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The content of one file of a zip. ValueError if it is large."""
    check_size(member.file_size)
    with archive.open(member) as file:
        return file.read(member.file_size)   # not more than it says


def check_size(size: int) -> None:
    """ValueError for a file of so many bytes, unpacked: a zip of a few kB can hold gigabytes."""
    if size > LARGEST:
        raise ValueError(f"a file in it has more than {LARGEST:,} bytes")


def members_of_tar(path: Path, names: list[str]) -> dict[str, bytes]:
    """The named files of a .tar.gz, as many as it has."""
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        found = {}
        for member in archive:
            if member.name in names and member.isfile():
                check_size(member.size)
                found[member.name] = archive.extractfile(member).read()
        while stream.read(1 << 20):   # to the end, where gzip has its checksum
            pass
    return found


def load_cifar(folder: Path, split: str, number: int) -> Dataset:
    """The binary version of CIFAR-10 or CIFAR-100 (Krizhevsky 2009), packed or unpacked.

    A record is one label and 3 x 32 x 32 bytes: red, green, blue. In CIFAR-100 two labels stand
    there, coarse and fine; the fine one is taken.
    """
    if number == 10:
        inner, labels_file, heads = "cifar-10-batches-bin", "batches.meta.txt", 1
        batches = [f"data_batch_{k}.bin" for k in range(1, 6)]
        parts = batches if split == "train" else ["test_batch.bin"]
    else:
        inner, labels_file, heads = "cifar-100-binary", "fine_label_names.txt", 2
        parts = [f"{split}.bin"]
    names = [f"{inner}/{part}" for part in (labels_file, *parts)]
    archive = folder / f"cifar-{number}-binary.tar.gz"
    if all((folder / name).is_file() for name in names):
        archive, contents = folder, {name: (folder / name).read_bytes() for name in names}
    elif archive.is_file():
        contents = read_members(archive, names)
    else:
        raise ValueError(f"{archive} is missing: `python data.py --get cifar{number}` fetches it "
                         "(the binary version; the others are not read)")
    classes = contents[names[0]].decode("ascii", "replace").split()
    records = np.concatenate([read_records(archive / name, contents[name], heads, number)
                              for name in names[1:]])
    if len(classes) != number:
        raise ValueError(f"{archive / names[0]} is damaged: there are {number} classes")
    images = records[:, heads:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Dataset(np.ascontiguousarray(images), records[:, heads - 1].astype(np.int64), classes)


def read_records(path: Path, content: bytes, heads: int, number: int) -> np.ndarray:
    """uint8 [N, heads + 3072]. ValueError naming the file if the last head is no label."""
    size = heads + 3072
    if len(content) % size:
        raise ValueError(f"{path} is damaged: its records are not all {size} bytes long")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    if records[:, heads - 1].max(initial=0) >= number:
        raise ValueError(f"{path} is damaged: it has labels that are not below {number}")
    return records


# ---- downsampled ImageNet ----------------------------------------------------------------------

def load_imagenet(folder: Path, split: str, stored: int, image_size: int,
                  channels: int) -> Dataset:
    """Downsampled ImageNet (Chrabaszcz et al. 2017), whose images are `stored` pixels high.

    The files are .npz batches of `data` uint8 [N, 3 stored^2] and of labels from 1 to 1000. All of
    them together take 16 GB at 64x64. Where the images are large and the batches not compressed,
    they are mapped; else batches are read and converted one by one.
    """
    pattern = "train_data_batch_*.npz" if split == "train" else "val_data.npz"
    paths = sorted(folder.rglob(pattern), key=lambda p: (len(p.name), p.name))
    if not paths:
        wanted = pattern.replace("*", "K")
        raise ValueError(f"{folder} holds no {wanted}: `python data.py --get imagenet{stored}` "
                         "says where to get them")
    labels = [read_arrays(path, ["labels"])[0].reshape(-1) for path in paths]
    shape = sum(map(len, labels)), image_size, image_size, channels
    maps = [None if lazy.fits(shape) else map_array(path, "data") for path in paths]
    batches = (imagenet_batch(path, map_, part, stored)
               for path, map_, part in zip(paths, maps, labels, strict=True))
    if any(map_ is None for map_ in maps):
        images, start = np.empty(shape, np.uint8), 0
        for batch in tqdm(batches, f"reading imagenet{stored}", len(paths), disable=len(paths) < 2):
            stop = start + len(batch)
            images[start:stop] = convert(batch, image_size, channels, f"imagenet{stored}")[:]
            start = stop
    else:
        images = convert(lazy.joined([*batches]), image_size, channels, f"imagenet{stored}")
    classes = [f"{k:04d}" for k in range(1, 1001)]
    return Dataset(images, np.concatenate(labels).astype(np.int64) - 1, classes)


def imagenet_batch(path: Path, data: np.ndarray | None, labels: np.ndarray,
                   stored: int) -> np.ndarray:
    """The images of one batch, uint8 [N, stored, stored, 3]; its data are read unless mapped."""
    data = read_arrays(path, ["data"])[0] if data is None else data
    shape = len(labels), 3 * stored**2
    fitting = data.shape == shape and data.dtype == np.uint8
    if not fitting or not np.isin(labels, range(1, 1001)).all():
        raise ValueError(f"{path} holds data {data.dtype} {data.shape}: imagenet{stored} has uint8 "
                         f"{shape} for as many labels, which go from 1 to 1000")
    return data.reshape(-1, 3, stored, stored).transpose(0, 2, 3, 1)
