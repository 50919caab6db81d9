"""Images and labels by name: rendered glyphs (embedded, offline), published data sets, files and folders of your own.

    python data.py --get cifar10                # downloads the published files into data/cifar10
    python data.py --show cifar10 --split test  # writes a labelled grid of images, runs/cifar10-test.png

`load(source, split)` returns a Dataset of uint8 images [N, H, W, C] with labels [N], where source is
    letters     rendered letters A-Z a-z, the public data           (40,000 train, 5,000 test)
    digits      rendered digits in another style, embedded "private" data  (20,000 train, 5,000 test)
    pen-letters rendered letters as written with a pen, thin to thick, public (60,000 train, 5,000 test)
    pen-letters-varied  these also turned or mirrored (208 classes), some with a bar or a loop more, public (as many)
    captioned-letters, captioned-digits     others, for models with captions: "a thin digit 7 leaning right"; training
                digits lack some combinations of digit, weight and slant (glyphs.held_out), test digits do not
    scenes      letters and shapes on textured backgrounds, 256x256, public (4,000 train, 140 test), with captions
    scenes-private  digits, other shapes and other colours, embedded "private" data     (4,000 train, 140 test)
    leaves      coloured dead leaves, 32x32, public: for private photographs  (40,000 train, 1,000 test)
    a name      mnist, fashion-mnist, emnist-letters, svhn, cifar10, cifar100, celeba (or celeba:Smiling, ...),
                celebahq, imagenet32 or imagenet64: the publisher's files in DATA_DIR/NAME
    a path      an .npz of images and labels; a folder or a zip of images in class sub-folders, or with captions in a
                metadata.jsonl, below train/ and test/ or without test images
"""

import io
import os
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import download
import folders
import formats
import scenes
from formats import Dataset, read_arrays
from glyphs import LETTERS, PEN, STYLES, TURNED_LETTERS, VARIED_PEN, render, render_captioned, render_pen

CACHE = Path(__file__).resolve().parent / "data" / "cache"
# The letter that each digit 0-9 looks most like: a public starting point for the digits' embeddings.
LOOKALIKES = dict(zip("0123456789", "OlZBASbTBq", strict=True))
SHAPES_ALIKE = {"hexagon": "circle", "heart": "triangle", "cross": "square", "star": "diamond"}   # scenes' shapes
TURNED_LOOKALIKES = {"3": "E mirrored", "4": "h turned", "7": "L turned"}   # more alike, where there are such
PENS = {"pen-letters": (PEN, LETTERS), "pen-letters-varied": (VARIED_PEN, TURNED_LETTERS)}   # looks, characters
GLYPHS = ("letters", "digits", *PENS, "captioned-letters", "captioned-digits")
RENDERED = (*GLYPHS, *scenes.KINDS, "leaves")
GREY_28 = (*GLYPHS, "mnist", "fashion-mnist", "emnist-letters")   # 28x28 grey images


def load(source: str, split: str, data_dir: str = "data", image_size: int = 32, channels: int = 1) -> Dataset:
    """The `split` ("train" or "test") of a source (see above), at image_size x image_size in 1 or 3 channels.

    Grey 28x28 images get a black border up to 32x32; other sizes are resampled, other channels converted, which is
    said. ValueError for an unknown source and for missing, damaged or mismatched files, naming the file.
    """
    if split not in ("train", "test") or channels not in (1, 3) or image_size < 1:
        raise ValueError(f"cannot load the split {split!r} with {channels} channels at size {image_size}: "
                         "give train or test, 1 or 3, and a positive size")
    name, _, attribute = source.partition(":")
    folder = download.folder_of(name, data_dir)
    if source in RENDERED:
        dataset = load_rendered(source, split)
    elif source == "mnist":
        if not folder.is_dir() and Path(data_dir).name not in download.NAMES:
            folder = Path(data_dir)   # MNIST's files may lie in it directly
        dataset = formats.load_mnist(folder, split)
    elif source == "fashion-mnist":
        dataset = formats.load_mnist(folder, split, source, formats.FASHION)
    elif source == "emnist-letters":
        dataset = formats.load_emnist_letters(folder, split)
    elif source == "svhn":
        dataset = formats.load_svhn(folder, split)
    elif source in ("cifar10", "cifar100"):
        dataset = formats.load_cifar(folder, split, int(source[5:]))
    elif source in ("imagenet32", "imagenet64"):
        return formats.load_imagenet(folder, split, int(source[8:]), image_size, channels)
    elif name == "celeba":
        return folders.load_celeba(folder, split, image_size, channels, attribute or "Male")
    elif source == "celebahq":
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing: `python data.py --get celebahq` says where to get its files")
        return folders.load_folder(folder, split, image_size, channels)
    elif source.endswith(".npz") and Path(source).is_file():
        dataset = formats.load_npz(Path(source), split)
    elif Path(source).exists():
        return folders.load_folder(Path(source), split, image_size, channels)
    else:
        names = ", ".join([*RENDERED, *download.NAMES])
        raise ValueError(f"unknown data {source!r}: give {names}, or an .npz, folder or zip that exists")
    if source in GREY_28:
        border = (image_size if 28 <= image_size <= 32 else 32) - 28
        before, after = border // 2, border - border // 2
        dataset.images = np.pad(dataset.images, ((0, 0), (before, after), (before, after), (0, 0)))
    dataset.images = formats.convert(dataset.images, image_size, channels, source)
    return dataset


def same_source(one: str, other: str) -> bool:
    """Whether two sources are the same images: one file by two paths, or one set whose classes are other attributes."""
    one, other = (str(Path(s).resolve()) if Path(s).exists() else s.partition(":")[0] for s in (one, other))
    return one == other


def starting_classes(private: list[str], public: list[str]) -> list[int] | None:
    """For every private class the public one it starts from: its namesake or lookalike; None if one has none."""
    known = {**LOOKALIKES, **SHAPES_ALIKE}
    # From most to least alike; some sets have no turned letters, some no small ones.
    alike = {c: (c, TURNED_LOOKALIKES.get(c, ""), known.get(c, ""), known.get(c, "").upper()) for c in private}
    names = [next((n for n in alike[c] if n in public), None) for c in private]
    return None if None in names else [public.index(n) for n in names]


# ---- rendered glyphs -------------------------------------------------------------------------------

COUNTS = {"letters": {"train": 40_000, "test": 5_000}, "digits": {"train": 20_000, "test": 5_000},
          **{name: {"train": 60_000, "test": 5_000} for name in PENS},
          "scenes": {"train": 4_000, "test": 140}, "scenes-private": {"train": 4_000, "test": 140},
          "leaves": {"train": 40_000, "test": 1_000}}


def cached(name: str, arrays: tuple[str, ...], make: Callable) -> Sequence[np.ndarray]:
    """The named arrays of an .npz in CACHE, which `make()` returns; it is called and they are kept the first time."""
    path = CACHE / f"{name}.npz"
    if path.exists():
        return read_arrays(path, arrays)
    made = make()   # not read back: of several processes only the first one has written it
    save_arrays(path, **dict(zip(arrays, made, strict=True)))
    return made


def load_rendered(source: str, split: str) -> Dataset:
    """One of RENDERED, at the size that it is rendered at."""
    if source == "leaves":
        return load_leaves(split)
    if source in scenes.KINDS:
        return load_scenes(source, split)
    if source in PENS:
        return load_pen_letters(source, split)
    return load_glyphs(source, split) if source in ("letters", "digits") else load_captioned_glyphs(source, split)


def load_glyphs(source: str, split: str) -> Dataset:
    """Rendered letters or digits, the same wherever Pillow and SciPy are; kept in CACHE after the first time."""
    characters, seed = LETTERS if source == "letters" else string.digits, {"train": 0, "test": 1}[split]
    images, labels = cached(f"{source}-{split}-v3", ("images", "labels"),
                            lambda: render(characters, STYLES[source], COUNTS[source][split], seed))
    return Dataset(images[..., None], labels, list(characters))


def load_pen_letters(source: str, split: str) -> Dataset:
    """Letters as written with a pen; kept in CACHE after the first time."""
    count, seed, (looks, characters) = COUNTS[source][split], {"train": 0, "test": 1}[split], PENS[source]
    images, labels = cached(f"{source}-{split}-v2", ("images", "labels"),
                            lambda: render_pen(characters, looks, count, seed))
    return Dataset(images[..., None], labels, list(characters))


def load_captioned_glyphs(source: str, split: str) -> Dataset:
    """The same for captioned-letters and captioned-digits; held_out combinations are in the test digits only."""
    kind, seed = source.removeprefix("captioned-"), {"train": 0, "test": 1}[split]
    complete = kind == "letters" or split == "test"
    images, labels, captions = cached(
        f"{source}-{split}-v1", ("images", "labels", "captions"),
        lambda: render_captioned(kind.removesuffix("s"), COUNTS[kind][split], seed, complete))
    return Dataset(images[..., None], labels, list(LETTERS if kind == "letters" else string.digits), captions.tolist())


def load_scenes(source: str, split: str) -> Dataset:
    """Rendered scenes with captions; kept in CACHE after the first time, 19 kB each."""
    kind = scenes.KINDS[source]
    seed = 2 * list(scenes.KINDS).index(source) + (split == "test")   # no two of the four share a background
    images, labels, colours, textures = cached(
        f"{source}-{split}-v2", ("images", "labels", "colours", "textures"),
        lambda: scenes.render(kind, COUNTS[source][split], seed))
    captions = [kind.caption(*numbers) for numbers in zip(labels, colours, textures, strict=True)]
    return Dataset(images, labels, kind.classes, captions)


def load_leaves(split: str) -> Dataset:
    """Rendered dead leaves; kept in CACHE after the first time (a minute), 2 kB each."""
    images, labels = cached(f"leaves-{split}-v1", ("images", "labels"),
                            lambda: scenes.render_leaves(COUNTS["leaves"][split], {"train": 4, "test": 5}[split]))
    return Dataset(images, labels, scenes.LEAVES)


# ---- files -----------------------------------------------------------------------------------------

@contextmanager
def atomic_write(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write `path` into, which is at every moment absent, the old one, or the whole new one.

    `before` is called when the new one is whole on the disk, and has yet to take its place. Of several processes
    (torchrun) only the first one writes.
    """
    if not formats.is_first_process():
        yield io.BytesIO()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz of the named arrays."""
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


# ---- pictures --------------------------------------------------------------------------------------

def save_grid(path: Path, panels: list[tuple[str, np.ndarray, list[str]]], caption: str = "") -> None:
    """A PNG of titled panels side by side, each a grid of images with a name in front of every row.

    panels: (title, uint8 images [rows, columns, H, W, C], row names). The caption goes below, in lines as wide as they.
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
    width, bottom = sum(p.width + margin for p in drawn) + margin, max(p.height for p in drawn) + 2 * margin
    lines = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width - 2 * margin:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    picture = Image.new("RGB", (width, bottom + 18 * len(lines) + margin * bool(lines)), "white")
    ImageDraw.Draw(picture).multiline_text((margin, bottom), "\n".join(lines), fill="black", font=font)
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


def rows_by_caption(dataset: Dataset, captions: list[str], columns: int) -> tuple[np.ndarray, list[str]]:
    """The first `columns` images with each of the captions, as rows_by_class. ValueError if one has no image."""
    rows = [np.flatnonzero(np.array(dataset.captions or [""]) == caption) for caption in captions]
    if missing := [caption for caption, row in zip(captions, rows, strict=True) if not len(row)]:
        raise ValueError(f"no real image has the caption {missing[0]!r}: leave out --real")
    return np.stack([dataset.images[np.resize(row, columns)] for row in rows]), captions


# ---- command line ----------------------------------------------------------------------------------

def show(source: str, split: str, data_dir: str, image_size: int, channels: int, columns: int = 10) -> tuple:
    """A panel for `save_grid`: images of up to ten classes or, with captions, ten images."""
    dataset = load(source, split, data_dir, image_size, channels)
    title = f"{Path(source).stem}, {split}: {len(dataset.images):,} images"
    if dataset.captions is None:
        return title, *rows_by_class(dataset, columns)
    return title, dataset.images[:10, None], [caption[:100] for caption in dataset.captions[:10]]


def main(argv: list[str] | None = None) -> None:
    # Not at the top, as config.py imports this module.
    from config import Parser
    parser = Parser(__doc__)
    parser.add_argument("--get", metavar="NAME", help="download the files of a published data set into DATA_DIR/NAME")
    parser.add_argument("--show", metavar="SOURCE", help="write a PNG of images by class")
    parser.add_argument("--split", default="train", help="train (default) or test")
    parser.add_argument("--data-dir", default="data", help="folder of the named data sets' folders (default data)")
    parser.add_argument("--image-size", type=int, default=32, help="images are this high and wide (default 32)")
    parser.add_argument("--channels", type=int, help="1 for grey, 3 for colour (default: as a named set has it, or 3)")
    parser.add_argument("--out", type=Path, help="the PNG of --show (default runs/SOURCE-SPLIT.png)")
    args = parser.parse_args(argv)
    if not args.get and not args.show:
        raise ValueError("nothing to do: give --get NAME or --show SOURCE")
    if args.get:
        print(f"{args.get} is in {download.get(args.get, args.data_dir)}")
    if args.show:
        channels = args.channels or (1 if args.show in GREY_28 else 3)
        out = args.out or Path("runs") / f"{Path(args.show).stem.replace(':', '-')}-{args.split}.png"
        save_grid(out, [show(args.show, args.split, args.data_dir, args.image_size, channels)])
        print(f"wrote {out}")


if __name__ == "__main__":
    from config import one_line_errors
    with one_line_errors():
        main()
