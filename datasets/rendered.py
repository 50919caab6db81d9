"""The rendered data sets by name, each drawn once and then kept in CACHE.

They need no download. Everyone who has Pillow and SciPy gets the same images.
"""

import os
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from datasets import glyphs, scenes
from datasets.formats import Dataset
from datasets.glyphs import LETTERS
from runtime.files import read_arrays, save_arrays

CACHE = Path(__file__).resolve().parents[1] / "data" / "cache"
# Looks and characters.
PENS = {"pen-letters": (glyphs.PEN, LETTERS),
        "pen-letters-varied": (glyphs.VARIED_PEN, glyphs.TURNED_LETTERS)}
# How many images there are; the captioned sets have as many as the others of their characters.
COUNTS = {"letters": {"train": 40_000, "test": 5_000},
          "digits": {"train": 20_000, "test": 5_000},
          **{name: {"train": 60_000, "test": 5_000} for name in PENS},
          "scenes": {"train": 4_000, "test": 140},
          "scenes-private": {"train": 4_000, "test": 140},
          "leaves": {"train": 40_000, "test": 1_000}}


def cached(name: str, arrays: Sequence[str],
           make: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
    """The named arrays, which `make()` returns: it is called once, then they are in CACHE/NAME.npz.

    Where CACHE cannot be written they are in the user's cache folder; where that cannot be either,
    a line says so. ValueError if the file is damaged.
    """
    paths = [folder / f"{name}.npz" for folder in cache_folders()]
    for path in filter(os.path.exists, paths):
        return read_arrays(path, arrays)
    made, problem = make(), ""   # not read back: of several processes only the first one writes
    for path in paths:
        try:
            save_arrays(path, **dict(zip(arrays, made, strict=True)))
            return made
        except OSError as error:
            problem = problem or f"{name} is made anew each time: {error}"
    print(problem)
    return made


def cache_folders() -> list[Path]:
    """CACHE, and for where that cannot be written the user's cache folder (XDG Base Directory)."""
    try:
        users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:   # this user has no home
        return [CACHE]
    return [CACHE, Path(users, "dp-ldm")]


def load_rendered(source: str, split: str) -> Dataset:
    """One of RENDERED, at the size that it is rendered at."""
    return LOADERS[source](source, split)


def load_glyphs(source: str, split: str) -> Dataset:
    """Letters or digits in a font, 28x28."""
    characters = LETTERS if source == "letters" else string.digits
    style, seed = glyphs.STYLES[source], {"train": 0, "test": 1}[split]
    images, labels = cached(
        f"{source}-{split}-v3", ("images", "labels"),
        lambda: glyphs.render(characters, style, COUNTS[source][split], seed))
    return Dataset(images[..., None], labels, list(characters))


def load_pen_letters(source: str, split: str) -> Dataset:
    """Letters as written with a pen, 28x28."""
    (looks, characters), seed = PENS[source], {"train": 0, "test": 1}[split]
    images, labels = cached(
        f"{source}-{split}-v2", ("images", "labels"),
        lambda: glyphs.render_pen(characters, looks, COUNTS[source][split], seed))
    return Dataset(images[..., None], labels, list(characters))


def load_captioned_glyphs(source: str, split: str) -> Dataset:
    """Letters or digits with captions, 28x28; only the test digits have `held_out` combinations."""
    kind, seed = source.removeprefix("captioned-"), {"train": 0, "test": 1}[split]
    complete = kind == "letters" or split == "test"
    images, labels, captions = cached(
        f"{source}-{split}-v1", ("images", "labels", "captions"),
        lambda: glyphs.render_captioned(kind.removesuffix("s"), COUNTS[kind][split], seed,
                                        complete))
    characters = LETTERS if kind == "letters" else string.digits
    return Dataset(images[..., None], labels, list(characters), captions.tolist())


def load_scenes(source: str, split: str) -> Dataset:
    """Scenes with captions, 256x256; the cache takes 19 kB for each."""
    kind = scenes.KINDS[source]
    # No two of the four sets share a background.
    seed = 2 * list(scenes.KINDS).index(source) + (split == "test")
    images, labels, colours, textures = cached(
        f"{source}-{split}-v2", ("images", "labels", "colours", "textures"),
        lambda: scenes.render(kind, COUNTS[source][split], seed))
    captions = [kind.caption(*numbers) for numbers in zip(labels, colours, textures, strict=True)]
    return Dataset(images, labels, kind.classes, captions)


def load_leaves(source: str, split: str) -> Dataset:
    """Dead leaves, 32x32; the cache takes 2 kB for each, and a minute the first time."""
    seed = {"train": 4, "test": 5}[split]
    images, labels = cached(f"{source}-{split}-v1", ("images", "labels"),
                            lambda: scenes.render_leaves(COUNTS[source][split], seed))
    return Dataset(images, labels, scenes.LEAVES)


LOADERS = {"letters": load_glyphs, "digits": load_glyphs,
           **dict.fromkeys(PENS, load_pen_letters),
           "captioned-letters": load_captioned_glyphs, "captioned-digits": load_captioned_glyphs,
           **dict.fromkeys(scenes.KINDS, load_scenes), "leaves": load_leaves}
RENDERED = tuple(LOADERS)
GLYPHS = tuple(name for name in RENDERED if name not in (*scenes.KINDS, "leaves"))   # 28x28 grey
