"""`load` finds a source, and brings its images to the size and colours that are asked for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_files import cifar, imagenet, mnist, npz, plain, write

from datasets import load, same_source

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
GREY = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
LABELS = [9, 0, 3, 1, 2]
FILES = mnist(GREY, LABELS)


# ---- where a source is -------------------------------------------------------------------------

@pytest.mark.parametrize("place, data_dir", [("", ""), ("mnist", ""), ("mnist", "mnist"),
                                             ("mnist", "fashion-mnist")])
def test_mnist_is_in_its_folder_or_the_data_dir(tmp_path, place, data_dir):
    write(FILES, tmp_path / place)
    assert load("mnist", "train", str(tmp_path / data_dir)).labels.tolist() == LABELS


@pytest.mark.parametrize("there, asked, data_dir", [
    ("mnist", "fashion-mnist", ""), ("mnist", "fashion-mnist", "mnist"),
    ("fashion-mnist", "mnist", "fashion-mnist")])
def test_no_named_set_is_taken_for_another(tmp_path, there, asked, data_dir):
    write(FILES, tmp_path / there)
    write(FILES, tmp_path)   # with the same names
    with pytest.raises(ValueError, match=f"{tmp_path}/{asked}/train-images-.* is missing"):
        load(asked, "train", str(tmp_path / data_dir))


@pytest.mark.parametrize("source, options, complaint", [
    ("letters", {"channels": 2}, "2 channels"),
    ("digits", {"image_size": 0}, "at size 0"),
    ("digits", {"split": "all"}, "the split 'all'"),
    ("no such data", {}, "unknown data 'no such data': give letters, .*imagenet64, or an .npz"),
    ("mnist:Male", {}, "unknown data 'mnist:Male'"),
    ("missing.npz", {}, "unknown data 'missing.npz'"),
])
def test_impossible_requests_are_refused(source, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(source, **{"split": "train", **options})


def test_same_source_sees_through_paths_and_attributes(tmp_path, monkeypatch):
    (tmp_path / "mine.npz").write_bytes(b"")
    (tmp_path / "link.npz").symlink_to("mine.npz")
    monkeypatch.chdir(tmp_path)
    assert same_source("mine.npz", str(tmp_path / "mine.npz"))
    assert same_source("mine.npz", "link.npz")
    assert same_source("celeba:Male", "celeba:Smiling") and same_source("digits", "digits")
    assert not same_source("letters", "digits") and not same_source("mine.npz", "yours.npz")


# ---- sizes and colours -------------------------------------------------------------------------

@pytest.mark.parametrize("image_size, border", [(28, 0), (31, 1), (32, 2)])
def test_grey_28_gets_a_border_up_to_32(tmp_path, capsys, image_size, border):
    write(FILES, tmp_path)
    images = load("mnist", "train", str(tmp_path), image_size).images
    assert images.shape == (5, image_size, image_size, 1) and images.sum() == GREY.sum()
    assert np.array_equal(images[:, border:border + 28, border:border + 28, 0], GREY)
    assert "converted" not in capsys.readouterr().out


@pytest.mark.parametrize("image_size", [16, 64])
def test_other_sizes_are_resampled_with_the_same_border(tmp_path, image_size):
    write(FILES, tmp_path)
    images = load("mnist", "train", str(tmp_path), image_size).images
    framed = np.pad(GREY, ((0, 0), (2, 2), (2, 2)))
    size = (image_size, image_size)
    for image, original in zip(images[..., 0], framed, strict=True):
        wanted = Image.fromarray(original).resize(size, Image.Resampling.LANCZOS)
        assert np.array_equal(image, np.asarray(wanted))


@pytest.mark.parametrize("source", ["digits", "mnist", "mine.npz", "pictures", "cifar10",
                                    "imagenet32", "celebahq"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_source_has_the_asked_size(small_cache, tmp_path, monkeypatch, source,
                                                 channels):
    monkeypatch.chdir(tmp_path)
    colour = np.zeros((5, 32, 32, 3), np.uint8)
    write({f"mnist/{name}": content for name, content in FILES.items()}, tmp_path)
    write({"mine.npz": npz(images=GREY, labels=np.arange(5)), "pictures/a/0.png": plain(1),
           "cifar10/cifar-10-batches-bin/batches.meta.txt": b"class\n" * 10,
           **{f"cifar10/cifar-10-batches-bin/data_batch_{k}.bin": cifar(colour, LABELS)
              for k in range(1, 6)},
           "imagenet32/train_data_batch_1.npz": imagenet(colour, [1] * 5),
           "celebahq/a/0.png": plain((1, 2, 3))}, tmp_path)
    images = load(source, "train", str(tmp_path), image_size=40, channels=channels).images
    assert images.shape[1:] == (40, 40, channels) and images.dtype == np.uint8


def test_a_conversion_is_said_once(tmp_path, capsys):
    write(FILES, tmp_path)
    for _ in range(2):
        load("mnist", "train", str(tmp_path), image_size=64, channels=3)
    assert capsys.readouterr().out.count(
        "mnist: images of other sizes or colours are converted to 64x64 in colour\n") == 1
    write({"a/0.png": plain(1), "a/1.png": plain(2)}, tmp_path / "pictures")
    for _ in range(2):
        load(str(tmp_path / "pictures"), "train", image_size=4)
    assert capsys.readouterr().out.count(
        "pictures: images of other sizes or colours are converted to 4x4 in grey\n") == 1
    load(str(tmp_path / "pictures"), "train", image_size=8)   # as they are
    assert "converted" not in capsys.readouterr().out


PETS = {"train/cat/0.png": plain(1), "train/cat/1.png": plain(1, (4, 6)), "train/notes.txt": b"",
        "test/cat/0.png": plain(1), "test/owl/0.png": plain(1), ".git/config": b"", "READ.TXT": b""}


def said_of(files: dict[str, bytes], root: Path, capsys: pytest.CaptureFixture,
            split: str = "train", **options: object) -> list[str]:
    """The lines that loading `files` prints, without those of conversions."""
    write(files, root / "pets")
    load(str(root / "pets"), split, image_size=8, **options)
    return [line for line in capsys.readouterr().out.splitlines() if "converted" not in line]


def test_a_line_says_what_was_loaded_and_left_out(tmp_path, capsys):
    assert said_of(PETS, tmp_path, capsys) == [
        "pets: 2 images, 2 classes; left out: 2 .txt, 2 test images, 1 hidden folder",
        "pets: no image of owl for train"]
    assert said_of(PETS, tmp_path, capsys, "test") == [
        "pets (test): 2 images, 2 classes; left out: 2 .txt, 2 train images, 1 hidden folder"]


def test_names_break_no_line(tmp_path, capsys):
    files = {"train/a/0.png": plain(1), "test/b\n\x1b[1mc/0.png": plain(1)}
    assert said_of(files, tmp_path, capsys)[1] == r"pets: no image of b\n\x1b[1mc for train"


def test_one_image_of_one_class_is_singular(tmp_path, capsys):
    assert said_of({"cat/0.png": plain(1)}, tmp_path, capsys) == ["pets: 1 image, 1 class"]


def test_numbers_and_sizes_are_said_of_public_images_only(tmp_path, capsys):
    files = {**PETS, "train/owl/0.png": plain(2)}
    private = said_of(files, tmp_path, capsys)
    assert said_of(files, tmp_path, capsys, is_public=True) == [
        *private, "pets: 1 to 2 of each class; 4x6 to 8x8 pixels"]
    assert len(private) == 1 and "owl" not in private[0]


@pytest.mark.parametrize("name, source", [("digits", "digits"), ("mnist", "mnist"),
                                          ("celeba", "celeba:Smiling")])
def test_a_set_and_a_folder_of_one_name_are_told_apart(tmp_path, monkeypatch, name, source):
    monkeypatch.chdir(tmp_path)
    write({"cat/0.png": plain(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a set .*give ./{name} for the path"):
        load(source, "train")
    assert load(f"./{name}", "train").classes == ["cat"]


def test_a_set_s_own_folder_is_no_clash(tmp_path, monkeypatch):
    write({f"mnist/{name}": content for name, content in FILES.items()}, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(load("mnist", "train", ".").images) == 5


# ---- real data ---------------------------------------------------------------------------------

def test_real_mnist_has_its_published_counts():
    if not (REAL / "mnist").is_dir():
        pytest.skip("needs MNIST in ../shared/data/mnist")
    counts = {"train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
              "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]}
    for split, count in counts.items():
        dataset = load("mnist", split, str(REAL / "mnist"), image_size=28)
        assert dataset.images.shape == (sum(count), 28, 28, 1)
        assert np.bincount(dataset.labels).tolist() == count
        if split == "train":
            # The mean that everyone normalises by, and the first five digits.
            assert dataset.images.mean() == pytest.approx(0.1307 * 255, abs=0.02)
            assert dataset.labels[:5].tolist() == [5, 0, 4, 1, 9]
