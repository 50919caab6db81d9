"""Rendered glyphs, IDX files, folders and zips of images, pictures, atomic writing.

The tests of real data read ../shared/data beside the repository and are skipped where it is absent.
"""

import dataclasses
import gzip
import io
import string
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import formats
from data import LOOKALIKES, Dataset, load
from glyphs import LETTERS, STYLES, Style, render

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


# ---- rendered glyphs -------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["letters", "digits"])
def glyphs(request) -> tuple[str, np.ndarray, np.ndarray]:
    characters = {"letters": LETTERS, "digits": string.digits}[request.param]
    return (characters, *render(characters, STYLES[request.param], 215, seed=0))


@pytest.fixture
def small_cache(tmp_path, monkeypatch) -> Path:
    """Few glyphs, cached in an empty folder instead of the repository's."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "COUNTS", {"letters": {"train": 60, "test": 30}, "digits": {"train": 40, "test": 40}})
    return tmp_path / "cache"


def test_glyph_arrays(glyphs):
    characters, images, labels = glyphs
    assert images.shape == (215, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (215,) and labels.dtype == np.int64
    counts = np.bincount(labels, minlength=len(characters))
    assert len(counts) == len(characters) and np.ptp(counts) <= 1
    assert not np.array_equal(labels, np.sort(labels)) and not np.array_equal(labels[:52], np.arange(52))


def test_glyphs_have_ink_in_the_middle_and_little_at_the_border(glyphs):
    _, images, _ = glyphs
    assert (images.max(axis=(1, 2)) > 150).all()
    ink = images.mean(axis=(1, 2)) / 255
    assert ink.min() > 0.003 and ink.max() < 0.55
    border = np.concatenate([images[:, [0, -1], :].reshape(215, -1), images[:, :, [0, -1]].reshape(215, -1)], 1)
    assert (border > 127).mean() < 0.005
    assert (border.max(1) > 127).mean() < 0.12      # few images touch it at all
    positions = np.arange(28) - 13.5
    for axis in (1, 2):
        profile = images.sum(axis=3 - axis, dtype=float)
        centres = profile @ positions / profile.sum(1)
        assert abs(centres.mean()) < 0.7 and abs(centres).max() < 9.0


def test_glyphs_follow_the_seed():
    first = render("abc", STYLES["letters"], 12, seed=3)
    again, other = (render("abc", STYLES["letters"], 12, seed=s) for s in (3, 4))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert len({image.tobytes() for image in (*first[0], *other[0])}) == 24


def test_images_show_their_characters():
    # With plain looks the mean images of two characters differ by their shapes alone.
    plain = dataclasses.replace(STYLES["letters"], aspect=(1, 1), rotation=(0, 0), shear=(0, 0), weight=(0, 0),
                                warp=(0, 0))
    images, labels = render("lO", plain, 40, seed=0)
    upright, round_ = (images[labels == k].mean(0) for k in (0, 1))
    assert np.ptp(np.flatnonzero(upright.max(0) > 100)) < np.ptp(np.flatnonzero(upright.max(1) > 100)) / 2
    assert round_[13:15, 13:15].mean() < 30 < 100 < upright[13:15, 13:15].mean()    # O has a hole, l has none
    assert upright[:13].sum() == pytest.approx(upright[15:].sum(), rel=0.3)


def test_looks_do_what_they_say():
    still = dict(height=(18, 18), aspect=(1, 1), rotation=(0, 0), shear=(0, 0), weight=(0, 0), softness=(1, 1),
                 warp=(0, 0))

    def mean_image(**changes):
        return render("I", Style(**{**still, **changes}), 40, seed=0)[0].mean(0, dtype=float)

    def lean(image):   # how far the top is to the right of the bottom
        columns = np.arange(28)
        top, bottom = image[:13].sum(0), image[15:].sum(0)
        return top @ columns / top.sum() - bottom @ columns / bottom.sum()

    base = mean_image()
    assert mean_image(weight=(1, 1)).sum() > 1.3 * base.sum() > 1.3**2 * mean_image(weight=(-0.5, -0.5)).sum()
    assert mean_image(height=(9, 9)).sum() < 0.5 * base.sum()
    assert abs(lean(base)) < 0.3 < 2 < lean(mean_image(shear=(0.4, 0.4)))
    assert abs(lean(mean_image(rotation=(15, 15)))) > 1.5


@pytest.mark.parametrize("source", ["letters", "digits"])
def test_stroke_weights_vary(source):
    images, _ = render("I", dataclasses.replace(STYLES[source], height=(18, 18)), 60, seed=0)
    ink = images.sum(axis=(1, 2), dtype=float)
    assert np.quantile(ink, 0.95) > 1.25 * np.quantile(ink, 0.05)


def test_letters_hold_no_digits():
    assert len(set(LETTERS)) == 52 and not set(LETTERS) & set(string.digits)
    assert set(LOOKALIKES) == set(string.digits) and set(LOOKALIKES.values()) <= set(LETTERS)


def test_train_and_test_glyphs_differ(small_cache):
    train, test = (load("digits", split) for split in ("train", "test"))
    assert len(train.images) == len(test.images) == 40   # as many: with one seed they would be equal
    assert train.classes == test.classes == list(string.digits)
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}


def test_glyphs_are_padded_all_around(small_cache):
    small = load("letters", "train", image_size=28).images
    assert small.shape == (60, 28, 28, 1) and small.dtype == np.uint8
    for size, before in ((32, 2), (31, 1)):
        padded = load("letters", "train", image_size=size).images
        assert padded.shape == (60, size, size, 1)
        assert np.array_equal(padded[:, before:before + 28, before:before + 28], small)
        assert padded.sum() == small.sum()   # nothing but zeros around


def test_glyphs_come_from_the_cache_the_second_time(small_cache, monkeypatch):
    first = load("letters", "train")
    assert [p.suffix for p in small_cache.iterdir()] == [".npz"]
    monkeypatch.setattr(data, "render", lambda *args: pytest.fail("rendered again"))
    second = load("letters", "train")
    assert np.array_equal(first.images, second.images) and np.array_equal(first.labels, second.labels)
    assert first.classes == second.classes == list(LETTERS)


def test_damaged_cache_is_refused(small_cache):
    load("digits", "test")
    path, = small_cache.iterdir()
    path.write_bytes(b"not an npz")
    with pytest.raises(ValueError, match=path.name):
        load("digits", "test")


@pytest.mark.parametrize("source, options, message", [
    ("letters", dict(channels=2), "2 channels"), ("digits", dict(image_size=0), "at size 0"),
    ("no such data", {}, "unknown data 'no such data'"),
])
def test_impossible_requests_are_refused(small_cache, source, options, message):
    with pytest.raises(ValueError, match=message):
        load(source, "train", **options)


def test_grey_images_fill_three_channels(small_cache):
    grey, colour = (load("digits", "test", channels=channels).images for channels in (1, 3))
    assert colour.shape == (*grey.shape[:3], 3) and (colour == grey).all() and grey.any()


def test_dataset_needs_a_label_per_image():
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        Dataset(np.zeros((3, 4, 4, 1), np.uint8), np.zeros(2, np.int64), ["a"])


# ---- IDX files -------------------------------------------------------------------------------------

IMAGES = (np.arange(5 * 28 * 28) % 251).astype(np.uint8).reshape(5, 28, 28)
LABELS = np.array([3, 0, 9, 1, 3], np.uint8)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """As yann.lecun.com/exdb/mnist describes: 0 0 kind rank, big-endian sizes, bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(params=["plain", "gz"])
def mnist(request, tmp_path):
    """A function that writes the two files of a split, and the paths that it writes to."""
    ending = "" if request.param == "plain" else ".gz"
    paths = [tmp_path / f"{name}{ending}" for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")]

    def write(*contents: bytes):
        for path, content in zip(paths, contents):
            path.write_bytes(gzip.compress(content, mtime=0) if ending else content)
    return write, paths


def load_from(paths: list[Path]) -> Dataset:
    return load("mnist", "train", str(paths[0].parent), image_size=28)


def test_idx_files_are_read(mnist):
    write, paths = mnist
    write(idx(IMAGES), idx(LABELS))
    dataset = load_from(paths)
    assert np.array_equal(dataset.images, IMAGES[..., None]) and dataset.images.dtype == np.uint8
    assert np.array_equal(dataset.labels, LABELS) and dataset.labels.dtype == np.int64
    assert dataset.classes == list(string.digits)


def test_test_split_is_t10k(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS))
    assert load("mnist", "test", str(tmp_path)).images.shape == (5, 32, 32, 1)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        load("mnist", "train", str(tmp_path))


@pytest.mark.parametrize("images", [
    b"", b"\0\0", idx(IMAGES)[:10], idx(IMAGES)[:-1], idx(IMAGES) + b"\0", idx(IMAGES, kind=0x0D),
    b"\1" + idx(IMAGES)[1:], b"\x89PNG\r\n\x1a\n" + bytes(100), idx(IMAGES)[4:],
], ids=["empty", "no header", "no sizes", "one byte short", "one byte more", "floats", "no leading zeros", "PNG",
        "no magic"])
def test_damaged_idx_file_is_refused(mnist, images):
    write, paths = mnist
    write(images, idx(LABELS))
    with pytest.raises(ValueError, match=paths[0].name):
        load_from(paths)


@pytest.mark.parametrize("missing", [0, 1], ids=["images", "labels"])
def test_missing_idx_file_is_refused(mnist, missing):
    write, paths = mnist
    write(idx(IMAGES), idx(LABELS))
    paths[missing].unlink()
    with pytest.raises(ValueError, match=paths[missing].name.removesuffix(".gz")):
        load_from(paths)


def test_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "images.gz"
    content = gzip.compress(idx(IMAGES))
    for size in (0, 5, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="images.gz"):
            formats.read_idx(path)
    path.write_bytes(idx(IMAGES))   # not gzipped at all
    with pytest.raises(ValueError, match="images.gz"):
        formats.read_idx(path)


def test_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "images.gz"
    content = gzip.compress(idx(IMAGES))
    for position in range(20, len(content) - 20, 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1:])
        with pytest.raises(ValueError, match="images.gz"):
            formats.read_idx(path)


@pytest.mark.parametrize("images, labels", [
    (IMAGES, LABELS[:4]), (LABELS, IMAGES), (IMAGES[:, :20], LABELS), (IMAGES, LABELS + 7),
], ids=["other length", "swapped", "not 28x28", "label above 9"])
def test_mismatched_idx_files_are_refused_by_name(mnist, images, labels):
    write, paths = mnist
    write(idx(images), idx(labels))
    with pytest.raises(ValueError, match="train-(images|labels)-idx"):
        load_from(paths)


# ---- folders and zips ------------------------------------------------------------------------------

def encoded(colour, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file, kind)
    return file.getvalue()


@pytest.fixture(params=["folder", "zip"])
def tree(request, tmp_path):
    """A function that makes a folder or a zip of the given files and returns its path."""
    def make(files: dict[str, bytes]) -> str:
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return str(tmp_path / "images.zip")
        for name, content in files.items():
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / name).write_bytes(content)
        return str(tmp_path / "images")
    return make


def grey_levels(dataset: Dataset) -> list[int]:
    assert (dataset.images == dataset.images[:, :1, :1]).all()   # every image has one colour
    return dataset.images[:, 0, 0, 0].tolist()


FLAT = {"dog/b.png": encoded(40), "cat/a.png": encoded(10), "dog/a.png": encoded(30),
        "ant/x.bmp": encoded(5, kind="BMP")}


def test_classes_are_sorted_sub_folders(tree):
    dataset = load(tree({**FLAT, "readme.txt": b"no image", "dog/notes.txt": b"no image"}), "train", image_size=8)
    assert dataset.classes == ["ant", "cat", "dog"]
    assert dataset.labels.tolist() == [0, 1, 2, 2]
    assert dataset.images.shape == (4, 8, 8, 1) and dataset.images.dtype == np.uint8
    assert grey_levels(dataset) == [5, 10, 30, 40]   # the right image for each label


@pytest.mark.parametrize("top", ["", "cifar10/", "some/where/"])
def test_train_and_test_folders(tree, top):
    source = tree({f"{top}train/dog/0000.png": encoded(1), f"{top}train/cat/0000.png": encoded(2),
                   f"{top}train/cat/0001.png": encoded(3), f"{top}test/cat/0000.png": encoded(4),
                   f"{top}test/dog/0000.png": encoded(5)})
    train, test = (load(source, split, image_size=8) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert (grey_levels(train), train.labels.tolist()) == ([2, 3, 1], [0, 0, 1])
    assert (grey_levels(test), test.labels.tolist()) == ([4, 5], [0, 1])


def test_without_split_folders_all_images_are_for_training(tree):
    source = tree(FLAT)
    assert len(load(source, "train", image_size=8).images) == len(FLAT)
    with pytest.raises(ValueError, match="no class sub-folders with images for test"):
        load(source, "test")


def test_images_of_sixteen_bits_are_refused_by_name(tree):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="deep.png .*more than 8 bits"):
        load(tree({**FLAT, "dog/deep.png": file.getvalue()}), "train", image_size=8)


def test_colour_and_grey(tree):
    source = tree({"a/colour.png": encoded((200, 100, 50)), "a/grey.png": encoded(70)})
    colour = load(source, "train", image_size=8, channels=3).images
    assert colour.shape == (2, 8, 8, 3)
    assert colour[:, 0, 0].tolist() == [[200, 100, 50], [70, 70, 70]]
    grey = load(source, "train", image_size=8).images
    assert grey.shape == (2, 8, 8, 1)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50   # ITU-R 601, as PIL documents
    assert grey[:, 0, 0, 0].tolist() == [round(luma), 70]


def test_other_sizes_are_resized(tree):
    source = tree({"a/0.png": encoded(9, (31, 17)), "a/1.jpg": encoded(90, (64, 64), "JPEG"), "a/2.png": encoded(200)})
    images = load(source, "train", image_size=16).images
    assert images.shape == (3, 16, 16, 1)
    assert np.allclose(images.mean(axis=(1, 2, 3)), [9, 90, 200], atol=1)


def test_resizing_keeps_the_orientation(tree):
    picture = np.zeros((8, 8), np.uint8)
    picture[:4, 4:] = 255   # upper right
    file = io.BytesIO()
    Image.fromarray(picture).resize((32, 32), Image.Resampling.NEAREST).save(file, "PNG")
    image = load(tree({"a/0.png": file.getvalue()}), "train", image_size=8).images[0, ..., 0]
    assert image[1, 6] > 200 and max(image[1, 1], image[6, 1], image[6, 6]) < 50


def test_pictures_stand_as_their_camera_was_held(tree):
    exif = Image.Exif()
    exif[0x0112] = 6   # orientation: to be turned by 90 degrees clockwise
    picture = np.zeros((16, 16), np.uint8)
    picture[:8, :8] = 255
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", exif=exif)
    image = load(tree({"a/0.jpg": file.getvalue()}), "train", image_size=16).images[0, ..., 0]
    assert image[:7, 9:].min() > 200 and image[:, :7].max() < 50


@pytest.mark.parametrize("files", [["train/0.png", "test/0.png"], ["train/0.png"]])
def test_splits_without_classes_are_not_taken_for_classes(tree, files):
    with pytest.raises(ValueError, match="images directly in .*train: put"):
        load(tree({name: encoded(1) for name in files}), "train")


def bomb() -> bytes:
    """A PNG that claims to be 60,000 pixels high and wide."""
    content = bytearray(encoded(3))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"no image", encoded(3, (64, 64), "JPEG")[:-100], bomb()],
                         ids=["empty", "text", "truncated", "bomb"])
def test_unreadable_image_is_refused(tree, content):
    source = tree({**FLAT, "cat/broken.jpg": content})
    with pytest.raises(ValueError, match="cat/broken.jpg"):
        load(source, "train", image_size=8)


@pytest.mark.parametrize("files", [{"readme.txt": b"text"}, {"top.png": encoded(1)}, {"a/readme.txt": b"text"}],
                         ids=["text", "no sub-folder", "text in a sub-folder"])
def test_source_without_images_is_refused(tree, files):
    with pytest.raises(ValueError, match="holds no class sub-folders"):
        load(tree(files), "train")


def test_a_source_with_training_images_only_has_no_test_images(tree):
    source = tree({f"train/{name}": content for name, content in FLAT.items()})
    with pytest.raises(ValueError, match="no class sub-folders with images for test"):
        load(source, "test")


def test_labels_agree_where_one_split_lacks_a_class(tree):
    source = tree({**{f"train/{name}": content for name, content in FLAT.items()}, "test/dog/a.png": encoded(30)})
    test = load(source, "test", image_size=8)
    assert test.classes == load(source, "train", image_size=8).classes == ["ant", "cat", "dog"]
    assert test.labels.tolist() == [2]


def test_hidden_files_are_passed_over(tree):
    assert len(load(tree({**FLAT, "dog/._a.png": b"made by a Mac"}), "train", image_size=8).images) == len(FLAT)


def test_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="images.zip"):
        load(str(tmp_path / "images.zip"), "train")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_damaged_zip_is_refused(tmp_path, method):
    path = tmp_path / "images.zip"
    noise = np.random.default_rng(0).integers(0, 4, (32, 32), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "BMP")   # a format that zipping still compresses
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/0.bmp", file.getvalue())
    content = path.read_bytes()
    for position in range(50, 450, 20):
        path.write_bytes(content[:position] + b"\xff" * 8 + content[position + 8:])
        with pytest.raises(ValueError, match="a/0.bmp"):
            load(str(path), "train")
    directory = content.rindex(b"PK\1\2")
    path.write_bytes(content[:directory + 6] + b"\xfd" + content[directory + 7:])   # needs version 25.3 to extract
    with pytest.raises(ValueError, match="no readable folder or zip"):
        load(str(path), "train")


# ---- real data -------------------------------------------------------------------------------------

# Images per digit, 0 to 9, as published for MNIST.
MNIST_COUNTS = {"train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
                "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]}


@pytest.mark.parametrize("split", MNIST_COUNTS)
def test_real_mnist(split):
    if not (REAL / "mnist").is_dir():
        pytest.skip("needs ../shared/data/mnist")
    dataset = load("mnist", split, str(REAL / "mnist"), image_size=28)
    assert dataset.images.shape == ({"train": 60_000, "test": 10_000}[split], 28, 28, 1)
    assert np.bincount(dataset.labels).tolist() == MNIST_COUNTS[split]
    if split == "train":
        assert dataset.images.mean() == pytest.approx(0.1307 * 255, abs=0.02)   # the mean that everyone normalises by
        assert dataset.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_real_cifar10_zip():
    path = REAL / "cifar10" / "cifar10-subset.zip"
    if not path.is_file():
        pytest.skip("needs ../shared/data/cifar10/cifar10-subset.zip")
    dataset = load(str(path), "test", channels=3)   # 2,000 images; the training split has 10,000
    assert dataset.images.shape == (2000, 32, 32, 3)
    assert dataset.classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert np.bincount(dataset.labels).tolist() == [200] * 10
    # Skies are bluer than the animals' surroundings.
    blue_minus_red = [np.diff(dataset.images[dataset.labels == k][..., ::2].mean(axis=(0, 1, 2))).item()
                      for k in range(10)]
    assert max(blue_minus_red) == max(blue_minus_red[0], blue_minus_red[8])


# ---- pictures and writing --------------------------------------------------------------------------

def test_save_grid_writes_a_png(tmp_path):
    grey = np.full((2, 3, 8, 8, 1), 50, np.uint8)
    colour = np.full((1, 2, 8, 8, 3), (200, 0, 0), np.uint8)
    grey[1, 2] = 150
    path = tmp_path / "new" / "grid.png"
    data.save_grid(path, [("grey", grey, ["", ""]), ("colour", colour, [""])])
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # Around and between panels 8; without names a panel is 8 wider than its images, its title 22 high.
        assert picture.size == (8 + (8 + 3 * 8) + 8 + (8 + 2 * 8) + 8, 8 + (22 + 2 * 8) + 8)
        assert picture.getpixel((16, 30)) == (50, 50, 50)
        assert picture.getpixel((8 + 8 + 3 * 8 - 1, 8 + 22 + 2 * 8 - 1)) == (150, 150, 150)
        assert picture.getpixel((48 + 8, 30)) == (200, 0, 0)


def test_row_names_make_room(tmp_path):
    images = np.zeros((1, 1, 8, 8, 1), np.uint8)
    widths = []
    for name in ("", "airplane"):
        data.save_grid(tmp_path / "grid.png", [("", images, [name])])
        with Image.open(tmp_path / "grid.png") as picture:
            widths.append(picture.width)
    assert widths[1] > widths[0] + 30


def test_rows_by_class():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    dataset = Dataset(images, np.array([1, 0, 1, 0, 2, 0]), ["a", "b", "c"])
    chosen, names = data.rows_by_class(dataset, columns=2, rows=2)
    assert names == ["a", "b"] and chosen.reshape(2, 2).tolist() == [[1, 3], [0, 2]]
    chosen, _ = data.rows_by_class(dataset, columns=3)
    assert chosen.shape == (3, 3, 1, 1, 1) and chosen[2].ravel().tolist() == [4, 4, 4]   # too few: repeated


def test_atomic_write_replaces_at_the_end(tmp_path):
    path = tmp_path / "new" / "file"
    with data.atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    with data.atomic_write(path) as file:
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_on_an_exception(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), data.atomic_write(path) as file:
        file.write(b"half of the ne")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
