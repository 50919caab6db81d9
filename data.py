"""Images and labels: rendered glyphs (embedded, offline), MNIST as IDX files, folders and zips of images.

`load(source, split)` returns a Dataset of uint8 images [N, H, W, C] with labels [N], where source is
    letters   rendered letters A-Z a-z, the public data           (40,000 train, 5,000 test)
    digits    rendered digits in another style, embedded "private" data  (20,000 train, 5,000 test)
    mnist     the IDX files of MNIST, gzipped or not, in --data-dir
    a path    a folder or a zip with one sub-folder of images per class, below train/ and test/ or without test images
"""

import gzip
import io
import os
import re
import string
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm import tqdm

CACHE = Path(__file__).resolve().parent / "data" / "cache"
LETTERS = string.ascii_uppercase + string.ascii_lowercase
# The letter that each digit 0-9 looks most like: a public starting point for the digits' class embeddings.
LOOKALIKES = dict(zip("0123456789", "OlZBASbTBq", strict=True))


@dataclass
class Dataset:
    images: np.ndarray   # uint8 [N, H, W, C]
    labels: np.ndarray   # int64 [N]
    classes: list[str]   # the name of each label

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels: they must be as many")


def load(source: str, split: str, data_dir: str = "data", image_size: int = 32, channels: int = 1) -> Dataset:
    """The `split` ("train" or "test") of a source (see above), at image_size x image_size.

    ValueError for an unknown source and for missing, damaged or mismatched files, naming the file.
    """
    if source in ("letters", "digits"):
        dataset = load_glyphs(source, split)
    elif source == "mnist":
        dataset = load_mnist(Path(data_dir), split)
    elif Path(source).exists():
        return load_folder(Path(source), split, image_size, channels)
    else:
        raise ValueError(f"unknown data {source!r}: give letters, digits, mnist, or a folder or zip that exists")
    border = image_size - dataset.images.shape[1]
    if border < 0:
        raise ValueError(f"{source} images are 28x28: image_size must be at least 28")
    before, after = border // 2, border - border // 2
    dataset.images = np.pad(dataset.images, ((0, 0), (before, after), (before, after), (0, 0)))
    dataset.images = dataset.images.repeat(channels, axis=-1)   # 3: grey, as a colour
    return dataset


def starting_classes(private: list[str], public: list[str]) -> list[int] | None:
    """For every private class the public one it starts from: its namesake or lookalike; None if one has none."""
    names = [c if c in public else LOOKALIKES.get(c) for c in private]
    return [public.index(n) for n in names] if all(n in public for n in names) else None


# ---- rendered glyphs -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Style:
    """Ranges that each glyph's looks are drawn from; lengths in pixels of the 28x28 image."""
    height: tuple[float, float]     # size of the longer side
    aspect: tuple[float, float]     # width is multiplied by this
    rotation: tuple[float, float]   # degrees
    shear: tuple[float, float]      # 0.3 leans right by 0.3 pixel per pixel of height
    weight: tuple[float, float]     # added to each side of the stroke
    softness: tuple[float, float]   # width of the stroke's blurred edge
    warp: tuple[float, float]       # standard deviation of the elastic displacement


STYLES = {
    "letters": Style((16, 21), (0.7, 1.2), (-15, 15), (-0.35, 0.45), (-0.5, 1.0), (0.8, 2.0), (0.0, 1.6)),
    "digits": Style((20, 21), (0.9, 1.1), (-5, 5), (0.15, 0.35), (0.4, 1.0), (1.2, 2.0), (0.3, 0.8)),   # bold, leaning
}
COUNTS = {"letters": {"train": 40_000, "test": 5_000}, "digits": {"train": 20_000, "test": 5_000}}


def signed_distance(character: str, size: int = 80) -> np.ndarray:
    """Distance to the outline of a rendered character, positive inside, in pixels of a 2*size canvas."""
    font = ImageFont.load_default(size)
    canvas = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size, size), character, fill=255, font=font, anchor="mm")
    inside = np.asarray(canvas) > 127
    rows, columns = np.nonzero(inside)
    centre = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    inside = ndimage.shift(inside.astype(np.uint8), [size - c for c in centre], order=0).astype(bool)
    return ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)


def render(characters: str, style: Style, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` glyphs of random characters in random looks: images uint8 [count, 28, 28], labels [count].

    Every image looks up its character's distance map at the affinely and elastically displaced pixel
    positions; the distance, shifted by the stroke weight, becomes ink through a soft edge.
    """
    rng = np.random.default_rng(seed)
    maps = [signed_distance(c) for c in characters]
    extents = [np.ptp(np.argwhere(m > 0), axis=0) + 1 for m in maps]
    labels = np.arange(count) % len(characters)
    rng.shuffle(labels)
    looks = {name: rng.uniform(*limits, size=count) for name, limits in vars(style).items()}
    pixels = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), 0) - 13.5     # [2, 28, 28]: y, x
    images = np.empty((count, 28, 28), np.uint8)
    for i in tqdm(range(count), desc="rendering glyphs", unit_scale=True, disable=count < 5_000):
        look = {name: values[i] for name, values in looks.items()}
        distance, extent = maps[labels[i]], extents[labels[i]]
        scale = extent.max() / look["height"]                        # map pixels per image pixel
        angle = np.deg2rad(look["rotation"])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        lean = np.array([[1.0, 0.0], [look["shear"], 1.0]])          # x of the map grows as y falls
        stretch = np.diag([1.0, 1.0 / look["aspect"]])
        warp = ndimage.gaussian_filter(rng.standard_normal((2, 28, 28), np.float32), (0, 5, 5), truncate=2.0)
        moved = pixels + warp * (look["warp"] / warp.std()) - rng.uniform(-1.5, 1.5, (2, 1, 1))
        where = np.tensordot(stretch @ lean @ turn, moved, axes=1) * scale + len(distance) / 2 - 0.5
        depth = ndimage.map_coordinates(distance, where, order=1, mode="nearest") / scale
        ink = 0.5 + (depth + look["weight"]) / look["softness"]
        images[i] = np.clip(ink, 0.0, 1.0) * 255
    return images, labels


def load_glyphs(source: str, split: str) -> Dataset:
    """Rendered letters or digits, the same wherever Pillow and SciPy are; kept in CACHE after the first time."""
    characters = LETTERS if source == "letters" else string.digits
    count = COUNTS[source][split]
    path = CACHE / f"{source}-{split}-v3.npz"
    if path.exists():
        images, labels = read_arrays(path)
    else:
        seed = {"train": 0, "test": 1}[split]
        images, labels = render(characters, STYLES[source], count, seed)
        save_arrays(path, images=images, labels=labels)
    return Dataset(images[..., None], labels, list(characters))


# ---- files -----------------------------------------------------------------------------------------

@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write `path` into, which is at every moment absent, the old one, or the whole new one.

    Of several processes (torchrun) only the first one writes.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        yield io.BytesIO()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz of the named arrays."""
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays `images` and `labels` of an .npz. ValueError naming the file if it is not such a one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"]
    except (OSError, KeyError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no readable .npz of images and labels: {error}") from error


def read_idx(path: Path) -> np.ndarray:
    """An unsigned-byte array in IDX format: 00 00 08 (rank), the sizes as big-endian uint32, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is no readable IDX file: {error}") from error
    if (zeros, kind) != (0, 8):
        raise ValueError(f"{path} is no IDX file of unsigned bytes")
    return array


def load_mnist(folder: Path, split: str) -> Dataset:
    prefix = {"train": "train", "test": "t10k"}[split]
    arrays = []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        found = [folder / (name + ending) for ending in ("", ".gz") if (folder / (name + ending)).is_file()]
        if not found:
            raise ValueError(f"{folder / name}[.gz] is missing: --data-dir must be the folder of MNIST's IDX files")
        arrays.append(read_idx(found[0]))
    images, labels = arrays
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or labels.max(initial=0) > 9:
        raise ValueError(f"{folder / prefix}-images-idx3-ubyte and its labels have the shapes {images.shape} and "
                         f"{labels.shape}: MNIST has [N, 28, 28] and [N], labels from 0 to 9")
    return Dataset(images[..., None], labels.astype(np.int64), list(string.digits))


def load_folder(root: Path, split: str, image_size: int, channels: int) -> Dataset:
    """Class sub-folders of images, in a folder or a zip, below folders named train and test if there are such.

    The names of the classes are taken to be public, also where the images are private.
    """
    archive = None
    try:
        if root.is_file():
            archive = zipfile.ZipFile(root)
        names = archive.namelist() if archive else [p.relative_to(root).as_posix() for p in root.rglob("*")]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{root} is no readable folder or zip: {error}") from error
    endings = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
    files = sorted(n for n in names if n.lower().endswith(endings) and "/" in n and not re.search(r"(^|/)\.", n))
    classes = sorted({Path(n).parent.name for n in files})   # of all splits, so that the labels agree
    if split == "test" or any({"train", "test"} & set(Path(n).parts[:-2]) for n in files):
        files = [n for n in files if split in Path(n).parts[:-2]]   # never training images for testing
    if not files:
        raise ValueError(f"{root} holds no class sub-folders with images for {split}")
    images = []
    for name in tqdm(files, desc=f"reading {root.name}", disable=len(files) < 2_000):
        try:
            with Image.open(io.BytesIO(archive.read(name)) if archive else root / name) as image:
                if image.mode[0] in "IF":   # 16 and 32 bits: converting would clip them to white
                    raise ValueError("it has more than 8 bits per channel")
                image = image.convert("L" if channels == 1 else "RGB")
                images.append(np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS)))
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, SyntaxError) as error:
            raise ValueError(f"cannot read the image {name} of {root}: {error}") from error
    labels = np.array([classes.index(Path(n).parent.name) for n in files])
    return Dataset(np.stack(images).reshape(len(files), image_size, image_size, channels), labels, classes)


# ---- pictures --------------------------------------------------------------------------------------

def save_grid(path: Path, panels: list[tuple[str, np.ndarray, list[str]]]) -> None:
    """A PNG of titled panels side by side, each a grid of images with a name in front of every row.

    panels: (title, uint8 images [rows, columns, H, W, C], row names).
    """
    font = ImageFont.load_default(14)
    margin = 8
    drawn = []
    for title, images, names in panels:
        rows, columns, height, width, _ = images.shape
        left = int(max(font.getlength(n) for n in names)) + margin
        panel = Image.new("RGB", (left + columns * width, 22 + rows * height), "white")
        draw = ImageDraw.Draw(panel)
        draw.text((left, 3), title, fill="black", font=font)
        for r, name in enumerate(names):
            draw.text((0, 22 + (r + 0.5) * height), name, fill="black", font=font, anchor="lm")
            for c in range(columns):
                panel.paste(Image.fromarray(images[r, c].squeeze(-1) if images.shape[-1] == 1 else images[r, c]),
                            (left + c * width, 22 + r * height))
        drawn.append(panel)
    picture = Image.new("RGB", (sum(p.width + margin for p in drawn) + margin,
                                max(p.height for p in drawn) + 2 * margin), "white")
    x = margin
    for panel in drawn:
        picture.paste(panel, (x, margin))
        x += panel.width + margin
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def rows_by_class(dataset: Dataset, columns: int, rows: int = 10) -> tuple[np.ndarray, list[str]]:
    """The first `columns` images of each of the first `rows` classes, [rows, columns, H, W, C], and names."""
    names = dataset.classes[:rows]
    chosen = [np.resize(dataset.images[dataset.labels == k], (columns, *dataset.images.shape[1:]))
              for k in range(len(names))]
    return np.stack(chosen), names
