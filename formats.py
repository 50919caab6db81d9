"""What a Dataset is, and readers of the files that publishers offer: IDX, .npz, .mat, binary batches.

Images are kept as bytes, never as floats: one float32 copy of a large set would not fit into memory. Those of other
sizes, or grey instead of colour, are converted one by one. What is damaged is refused by its name.
"""

import functools
import gzip
import os
import string
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

COLOURS = {1: "grey", 3: "colour"}
DIGITS = list(string.digits)
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, NotImplementedError, struct.error, zlib.error,
              zipfile.BadZipFile, tarfile.TarError, Image.DecompressionBombError)


@dataclass
class Dataset:
    images: np.ndarray                  # uint8 [N, H, W, C]
    labels: np.ndarray                  # int64 [N]
    classes: list[str]                  # the name of each label
    captions: list[str] | None = None   # a sentence for each image

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels: they must be as many")
        if self.captions is not None and len(self.captions) != len(self.images):
            raise ValueError(f"{len(self.images)} images but {len(self.captions)} captions: they must be as many")


# ---- sizes and channels ----------------------------------------------------------------------------

def is_first_process() -> bool:
    """Whether this is the first of torchrun's processes, or the only one: the one that writes and speaks."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK", "0") == "0"


@functools.cache
def say_once(line: str) -> None:
    """Print a line, the first time only; of several processes (torchrun) only the first one does."""
    if is_first_process():
        print(line)


def convert_one(image: Image.Image, image_size: int, channels: int, crop: bool = False) -> np.ndarray:
    """A picture as uint8 [image_size, image_size, channels], squeezed into a square, or its central square (crop)."""
    image = image.convert("L" if channels == 1 else "RGB")
    if crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    resized = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(resized).reshape(image_size, image_size, channels)


def convert(images: np.ndarray, image_size: int, channels: int, name: str) -> np.ndarray:
    """uint8 [N, H, W, 1 or 3] -> [N, image_size, image_size, channels], the same array if it is that already."""
    N, *shape = images.shape
    if shape == [image_size, image_size, channels]:
        return images
    say_once(f"{name}: images of {shape[0]}x{shape[1]} pixels in {COLOURS[shape[2]]} are converted to "
             f"{image_size}x{image_size} in {COLOURS[channels]}")
    converted = np.empty((N, image_size, image_size, channels), np.uint8)
    for i in tqdm(range(N), desc=f"converting {name}", unit_scale=True, disable=N < 20_000):
        converted[i] = convert_one(Image.fromarray(images[i, ..., 0] if shape[2] == 1 else images[i]),
                                   image_size, channels)
    return converted


# ---- arrays ----------------------------------------------------------------------------------------

def array_names(path: Path) -> list[str]:
    """What the arrays of an .npz are called. ValueError naming the file if it is none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays.files
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable .npz: {error}") from error


def read_arrays(path: Path, names: tuple[str, ...] = ("images", "labels")) -> list[np.ndarray]:
    """The named arrays of an .npz. ValueError naming the file if it lacks them or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable .npz of {' and '.join(names)}: {error}") from error


def load_npz(path: Path, split: str) -> Dataset:
    """An .npz of uint8 `images` [N, H, W] or [N, H, W, C] and integer `labels`, for training; or of train_images,
    train_labels, test_images and test_labels."""
    with_splits = "test_images" in array_names(path)
    if split == "test" and not with_splits:
        raise ValueError(f"{path} has no test_images and test_labels: its images are all for training")
    splits = ("train_", "test_") if with_splits else ("",)
    labels = dict(zip(splits, read_arrays(path, tuple(f"{s}labels" for s in splits))))
    chosen = f"{split}_" if with_splits else ""
    images, = read_arrays(path, (f"{chosen}images",))
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"the images of {path} are {images.dtype} {images.shape}: give uint8 [N, H, W] or [N, H, W, 1 "
                         "or 3]")
    for array in labels.values():
        if array.size != len(array) or array.dtype.kind not in "iu" or not array.size or array.min() < 0:
            raise ValueError(f"the labels of {path} are {array.dtype} {array.shape}: give integers [N] from 0 up")
    classes = [str(k) for k in range(max(int(array.max()) for array in labels.values()) + 1)]
    return Dataset(images, labels[chosen].reshape(-1).astype(np.int64), classes)


def read_idx(path: Path, content: bytes | None = None) -> np.ndarray:
    """An unsigned-byte array in IDX format: 00 00 08 (rank), the sizes as big-endian uint32, the bytes.

    content: the bytes of the file, where they come out of an archive.
    """
    try:
        content = path.read_bytes() if content is None else content
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable IDX file: {error}") from error
    if (zeros, kind) != (0, 8):
        raise ValueError(f"{path} is no IDX file of unsigned bytes")
    return array


def load_idx(folder: Path, prefix: str, name: str, classes: list[str], first: int = 0) -> Dataset:
    """PREFIX-images-idx3-ubyte and PREFIX-labels-idx1-ubyte, gzipped or not: 28x28 grey images, labels from `first`.

    EMNIST's files may also lie in its gzip.zip.
    """
    arrays = []
    for part in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        found = [folder / (part + ending) for ending in ("", ".gz") if (folder / (part + ending)).is_file()]
        packed, inside = folder / "gzip.zip", f"gzip/{part}.gz"
        if found:
            arrays.append(read_idx(found[0]))
        elif packed.is_file():
            arrays.append(read_idx(packed / inside, read_members(packed, [inside])[inside]))
        else:
            raise ValueError(f"{folder / part}[.gz] is missing: `python data.py --get {name}` fetches it")
    images, labels = arrays
    last = first + len(classes) - 1
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or not np.isin(labels, range(first, last + 1)).all():
        raise ValueError(f"{folder / prefix}-images-idx3-ubyte and its labels have the shapes {images.shape} and "
                         f"{labels.shape}: {name} has [N, 28, 28] and [N], labels from {first} to {last}")
    return Dataset(images[..., None], labels.astype(np.int64) - first, list(classes))


def load_mnist(folder: Path, split: str, name: str = "mnist", classes: list[str] = DIGITS) -> Dataset:
    """MNIST (LeCun et al. 1998), or a set with the same file names: Fashion-MNIST (Xiao et al. 2017)."""
    return load_idx(folder, {"train": "train", "test": "t10k"}[split], name, classes)


def load_emnist_letters(folder: Path, split: str) -> Dataset:
    """EMNIST letters (Cohen et al. 2017): 26 classes, capital and small letters together; stored transposed."""
    dataset = load_idx(folder, f"emnist-letters-{split}", "emnist-letters", list(string.ascii_uppercase), 1)
    dataset.images = np.ascontiguousarray(dataset.images.swapaxes(1, 2))
    return dataset


def load_svhn(folder: Path, split: str) -> Dataset:
    """SVHN's cropped digits (Netzer et al. 2011): X uint8 [32, 32, 3, N] and y [N, 1], where 10 stands for 0."""
    path = folder / f"{split}_32x32.mat"
    if not path.is_file():
        raise ValueError(f"{path} is missing: `python data.py --get svhn` fetches it")
    try:
        arrays = scipy.io.loadmat(path)
        images, labels = arrays["X"], arrays["y"].reshape(-1)
    except Exception as error:   # SciPy raises whatever the damaged bytes lead it to
        raise ValueError(f"{path} is no readable .mat of X and y: {error}") from error
    if images.shape != (32, 32, 3, len(labels)) or images.dtype != np.uint8 or not np.isin(labels, range(1, 11)).all():
        raise ValueError(f"{path} holds X {images.dtype} {images.shape} and y {labels.shape}: SVHN has uint8 "
                         "[32, 32, 3, N] and [N, 1], labels from 1 to 10")
    return Dataset(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10,
                   list(DIGITS))


def read_members(path: Path, names: list[str]) -> dict[str, bytes]:
    """The named files of a .zip or a .tar.gz, read in one pass. ValueError naming the archive or what it lacks."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found = {name: archive.read(name) for name in names if name in archive.namelist()}
        else:
            with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                found = {m.name: archive.extractfile(m).read() for m in archive if m.name in names and m.isfile()}
                while stream.read(1 << 20):   # to the end, where gzip has its checksum
                    pass
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable archive: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} lacks {missing[0]}")
    return found


def load_cifar(folder: Path, split: str, number: int) -> Dataset:
    """The binary version of CIFAR-10 or, with its fine labels, CIFAR-100 (Krizhevsky 2009), packed or unpacked.

    A record is one label (two in CIFAR-100: coarse, fine) and 3 x 32 x 32 bytes: red, green, blue.
    """
    inner, labels_file, heads, parts = {
        10: ("cifar-10-batches-bin", "batches.meta.txt", 1,
             [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]),
        100: ("cifar-100-binary", "fine_label_names.txt", 2, [f"{split}.bin"])}[number]
    wanted = [f"{inner}/{part}" for part in (labels_file, *parts)]
    archive = folder / f"cifar-{number}-binary.tar.gz"
    if all((folder / name).is_file() for name in wanted):
        archive, contents = folder, {name: (folder / name).read_bytes() for name in wanted}
    elif archive.is_file():
        contents = read_members(archive, wanted)
    else:
        raise ValueError(f"{archive} is missing: `python data.py --get cifar{number}` fetches it (the binary version; "
                         "the others are not read)")
    classes = contents[wanted[0]].decode("ascii", "replace").split()
    batches = []
    for name in wanted[1:]:
        if len(contents[name]) % (heads + 3072):
            raise ValueError(f"{archive / name} is damaged: its records are not all {heads + 3072} bytes long")
        records = np.frombuffer(contents[name], np.uint8).reshape(-1, heads + 3072)
        if len(classes) != number or records[:, heads - 1].max(initial=0) >= number:
            raise ValueError(f"{archive / name} is damaged: there are {number} classes, with labels below {number}")
        batches.append(records)
    records = np.concatenate(batches)
    images = records[:, heads:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Dataset(np.ascontiguousarray(images), records[:, heads - 1].astype(np.int64), classes)


def load_imagenet(folder: Path, split: str, stored: int, image_size: int, channels: int) -> Dataset:
    """Downsampled ImageNet (Chrabaszcz et al. 2017): .npz batches of `data` uint8 [N, 3 stored^2], labels 1 to 1000.

    Batches are converted one by one: at 64x64 all of them together take 16 GB.
    """
    paths = sorted(folder.rglob("train_data_batch_*.npz" if split == "train" else "val_data.npz"),
                   key=lambda p: (len(p.name), p.name))
    if not paths:
        raise ValueError(f"{folder} holds no {'train_data_batch_K.npz' if split == 'train' else 'val_data.npz'}: "
                         f"`python data.py --get imagenet{stored}` says where to get them")
    labels = [read_arrays(path, ("labels",))[0].reshape(-1) for path in paths]
    images = np.empty((sum(map(len, labels)), image_size, image_size, channels), np.uint8)
    start = 0
    for path, part in zip(tqdm(paths, desc=f"reading imagenet{stored}", disable=len(paths) < 2), labels, strict=True):
        data, = read_arrays(path, ("data",))
        shape = len(part), 3 * stored**2
        if data.shape != shape or data.dtype != np.uint8 or not np.isin(part, range(1, 1001)).all():
            raise ValueError(f"{path} holds data {data.dtype} {data.shape}: imagenet{stored} has uint8 {shape} for as "
                             "many labels, which go from 1 to 1000")
        images[start:start + len(part)] = convert(
            data.reshape(-1, 3, stored, stored).transpose(0, 2, 3, 1), image_size, channels, f"imagenet{stored}")
        start += len(part)
    return Dataset(images, np.concatenate(labels).astype(np.int64) - 1, [f"{k:04d}" for k in range(1, 1001)])
