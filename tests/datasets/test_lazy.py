"""Images that are made when they are indexed: the same as in memory, and never all at once."""

import functools
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_files import encoded, idx, plain, write, zipped

from datasets import lazy, load
from datasets.lazy import Images, in_memory_if_small, joined

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (70, 4, 4, 3)).astype(np.uint8)
GREY = RNG.integers(0, 256, (5, 28, 28)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """After large(), every set is too large for the memory."""
    return lambda: monkeypatch.setattr(lazy, "LARGE", 0)


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Images are made by so many threads."""
    monkeypatch.setattr(lazy, "THREADS", request.param)
    with ThreadPoolExecutor(request.param) as pool:
        monkeypatch.setattr(lazy, "POOL", pool)
        yield request.param


@pytest.mark.parametrize("index", [
    0, -1, np.int64(3), slice(5, 60, 7), slice(0), np.array([69, 0, 69]), np.arange(70) % 3 == 0,
    (slice(10), None), np.arange(6).reshape(2, 3)], ids=str)
def test_they_are_indexed_as_an_array_is(index, threads):
    images = Images(lambda k: PIXELS[k], PIXELS.shape)
    assert np.array_equal(images[index], PIXELS[index])
    assert (len(images), images.shape, images.dtype) == (70, PIXELS.shape, PIXELS.dtype)
    assert np.array_equal(np.stack([*images]), PIXELS)


def test_only_what_is_indexed_is_made():
    made = []
    images = Images(lambda k: made.append(k) or PIXELS[k], PIXELS.shape)
    assert not made
    images[[4, 2]]
    assert sorted(made) == [2, 4]
    with pytest.raises(TypeError, match="index them in parts"):
        np.asarray(images)
    with pytest.raises(IndexError):
        images[70]


def test_the_first_error_ends_the_reading(threads):
    made, error_was_seen = [], threading.Event()

    def make(k: int) -> np.ndarray:
        if k >= 1_000:
            error_was_seen.wait(60)
        made.append(k)
        if k in (3, 40_000):
            raise ValueError(f"image {k} is damaged")
        return PIXELS[0]

    with pytest.raises(ValueError, match="image 3 is damaged"):
        Images(make, (100_000, 4, 4, 3))[:]
    error_was_seen.set()
    lazy.POOL.shutdown()   # what has begun ends
    assert len(made) < 2_000


@pytest.mark.parametrize("spare", [0, -1])
def test_sets_up_to_a_size_are_in_memory(monkeypatch, spare):
    monkeypatch.setattr(lazy, "LARGE", PIXELS.nbytes + spare)
    images = in_memory_if_small(lambda k: PIXELS[k], PIXELS.shape, "reading")
    assert isinstance(images, Images if spare else np.ndarray)
    assert np.array_equal(images[:], PIXELS)


def test_arrays_are_joined_without_a_copy():
    parts = [PIXELS[:1], PIXELS[1:30], PIXELS[30:]]
    images = joined(parts)
    assert np.array_equal(images[:], PIXELS) and np.shares_memory(images[29], PIXELS)


# ---- every kind of source ----------------------------------------------------------------------

def batches(root: Path, save: Callable) -> str:
    """Downsampled ImageNet in two files, which `save` writes."""
    (root / "imagenet32").mkdir()
    for k, part in enumerate((COLOUR[:2], COLOUR[2:]), 1):
        save(root / f"imagenet32/train_data_batch_{k}.npz", labels=np.full(len(part), k),
             data=part.transpose(0, 3, 1, 2).reshape(len(part), -1))
    return "imagenet32"


def npz(root: Path, save: Callable, images: np.ndarray) -> str:
    save(root / "mine.npz", images=images, labels=np.arange(5))
    return str(root / "mine.npz")


def mnist(root: Path) -> str:
    write({"train-images-idx3-ubyte": idx(GREY), "train-labels-idx1-ubyte": idx(np.arange(5))},
          root)
    return "mnist"


PICTURES = {f"a/{k}.png": encoded(image) for k, image in enumerate(COLOUR)}
SOURCES = {
    "folder": lambda root: write(PICTURES, root / "mine") or str(root / "mine"),
    "zip": lambda root: write({"mine.zip": zipped(PICTURES)}, root) or str(root / "mine.zip"),
    "mnist": mnist,
    "npz": functools.partial(npz, save=np.savez, images=GREY),
    "colour npz": functools.partial(npz, save=np.savez, images=COLOUR),
    "column-major npz": functools.partial(npz, save=np.savez, images=np.asfortranarray(COLOUR)),
    "compressed npz": functools.partial(npz, save=np.savez_compressed, images=GREY),
    "imagenet32": functools.partial(batches, save=np.savez),
    "compressed imagenet32": functools.partial(batches, save=np.savez_compressed),
}


@pytest.mark.parametrize("image_size, channels", [(28, 1), (32, 1), (32, 3), (9, 3)])
@pytest.mark.parametrize("kind", SOURCES)
def test_large_sets_have_the_images_of_small_ones(tmp_path, large, kind, image_size, channels):
    source = SOURCES[kind](tmp_path)
    small = load(source, "train", str(tmp_path), image_size, channels)
    large()
    found = load(source, "train", str(tmp_path), image_size, channels)
    assert isinstance(small.images, np.ndarray)
    assert found.images.shape == small.images.shape
    assert np.array_equal(found.images[:], small.images)
    assert np.array_equal(found.images[[3, 0]], small.images[[3, 0]])
    assert np.array_equal(found.labels, small.labels)


@pytest.mark.parametrize("kind, mapped", [
    ("npz", True), ("colour npz", True), ("compressed npz", False)])
def test_large_arrays_are_mapped_and_their_files_kept(tmp_path, large, kind, mapped):
    source = SOURCES[kind](tmp_path)
    before = Path(source).read_bytes()
    large()
    size, channels = (28, 1) if kind != "colour npz" else (32, 3)
    images = load(source, "train", image_size=size, channels=channels).images
    assert (f"{source}" in Path("/proc/self/maps").read_text()) == mapped
    images[0] = 0   # into the array, not into the file
    assert not images[0].any() and Path(source).read_bytes() == before


def test_a_damaged_mapped_npz_is_refused(tmp_path, large):
    path = Path(npz(tmp_path, np.savez, COLOUR))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("images.npy").header_offset + 1000] ^= 1
    path.write_bytes(content)
    large()
    with pytest.raises(ValueError, match="mine.npz is no readable .npz of images: Bad CRC"):
        load(str(path), "train", channels=3)


def test_what_a_large_set_holds_is_said_when_met(tmp_path, large, threads, capsys):
    levels, file = np.array([[0, 65_535]] * 2, np.uint16), io.BytesIO()
    Image.new("L", (8, 8)).save(file, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8))])
    write({"a/0.png": plain(1), "a/1.png": plain(2, (4, 6)), "a/2.png": encoded(levels),
           "a/3.tif": file.getvalue(), "a/4.png": b"damaged", "b.txt": b""}, tmp_path / "pets")
    large()
    images = load(str(tmp_path / "pets"), "train", image_size=8, is_public=True).images
    assert capsys.readouterr().out.splitlines() == [
        "pets: 5 images, 1 class; left out: 1 .txt", "pets: 5 of each class"]
    for chosen, line in ((slice(2), "converted to 8x8 in grey"), (2, "grey of 16 bits"),
                         (3, "of several frames the first is taken")):
        images[chosen]
        images[chosen]
        printed = capsys.readouterr().out
        assert line in printed and printed.count("\n") == 1
    with pytest.raises(ValueError, match="cannot read the image a/4.png"):
        images[:]
