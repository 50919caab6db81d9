"""Published data sets, in small files of exactly the publishers' formats; captions; sizes and channels."""

import gzip
import io
import json
import string
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

import formats
from data import load, save_arrays, starting_classes
from formats import Dataset
from glyphs import LETTERS

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def plain(colour, size: tuple[int, int] = (8, 8)) -> bytes:
    return encoded(np.full((*size, *np.shape(colour)), colour, np.uint8))


def write(files: dict[str, bytes], root: Path) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_zip(files: dict[str, bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(files: dict[str, bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# ---- IDX: Fashion-MNIST, EMNIST --------------------------------------------------------------------

SMALL = RNG.integers(0, 256, (5, 28, 28)).astype(np.uint8)
MNIST_FILES = {"train-images-idx3-ubyte.gz": gzip.compress(idx(SMALL)),
               "train-labels-idx1-ubyte.gz": gzip.compress(idx(np.array([9, 0, 3, 1, 2])))}


def test_fashion_mnist(tmp_path):
    write(MNIST_FILES, tmp_path / "fashion-mnist")
    dataset = load("fashion-mnist", "train", str(tmp_path), image_size=28)
    assert np.array_equal(dataset.images[..., 0], SMALL)
    assert [dataset.classes[k] for k in dataset.labels] == ["Ankle boot", "T-shirt/top", "Dress", "Trouser", "Pullover"]


@pytest.mark.parametrize("data_dir", ["", "mnist"])
def test_mnist_is_not_taken_for_fashion_mnist(tmp_path, data_dir):
    write(MNIST_FILES, tmp_path / "mnist")
    write(MNIST_FILES, tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/fashion-mnist/train-images-.* is missing.*--get fashion"):
        load("fashion-mnist", "train", str(tmp_path / data_dir))


def test_fashion_mnist_is_not_taken_for_mnist(tmp_path):
    write(MNIST_FILES, tmp_path / "fashion-mnist")
    with pytest.raises(ValueError, match=f"{tmp_path}/mnist/train-images-idx3-ubyte.* is missing"):
        load("mnist", "train", str(tmp_path / "fashion-mnist"))


@pytest.mark.parametrize("place", ["", "mnist"])
def test_files_of_mnist_in_its_folder_or_in_the_data_dir_itself(tmp_path, place):
    write(MNIST_FILES, tmp_path / place)
    assert load("mnist", "train", str(tmp_path)).labels.tolist() == [9, 0, 3, 1, 2]
    assert load("mnist", "train", str(tmp_path / place)).labels.tolist() == [9, 0, 3, 1, 2]


def test_every_named_set_is_found_beside_the_one_that_data_dir_names(tmp_path):
    write(MNIST_FILES, tmp_path / "mnist")
    write(MNIST_FILES, tmp_path / "fashion-mnist")
    assert load("fashion-mnist", "train", str(tmp_path / "mnist")).classes[0] == "T-shirt/top"


@pytest.mark.parametrize("packed", [True, False])
def test_emnist_letters_are_turned_upright_and_named(tmp_path, packed):
    files = {f"gzip/emnist-letters-{split}-{part}-ubyte.gz": gzip.compress(idx(array))
             for split, n in (("train", 5), ("test", 2))
             for part, array in (("images-idx3", SMALL[:n]), ("labels-idx1", 5 * np.arange(1, n + 1)))}
    if packed:
        write_zip({**files, "gzip/emnist-digits-train-images-idx3-ubyte.gz": b""}, tmp_path / "emnist-letters/gzip.zip")
    else:
        write({name.removeprefix("gzip/"): content for name, content in files.items()}, tmp_path / "emnist-letters")
    train, test = (load("emnist-letters", split, str(tmp_path), image_size=28) for split in ("train", "test"))
    assert np.array_equal(train.images[..., 0], SMALL.transpose(0, 2, 1)) and len(test.images) == 2
    assert train.classes == list(string.ascii_uppercase)
    assert [train.classes[k] for k in train.labels] == list("EJOTY")
    assert train.images.flags.c_contiguous and train.images.flags.writeable


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [27, 1, 2, 3, 4], [1, 2, 3, 4]])
def test_emnist_labels_are_from_1_to_26(tmp_path, labels):
    write({"emnist-letters-train-images-idx3-ubyte": idx(SMALL),
           "emnist-letters-train-labels-idx1-ubyte": idx(np.array(labels))}, tmp_path / "emnist-letters")
    with pytest.raises(ValueError, match="emnist-letters-train-images.*labels from 1 to 26"):
        load("emnist-letters", "train", str(tmp_path))


def test_a_damaged_zip_of_emnist_is_named(tmp_path):
    write({"gzip.zip": b"no zip"}, tmp_path / "emnist-letters")
    with pytest.raises(ValueError, match="gzip.zip is no readable archive"):
        load("emnist-letters", "train", str(tmp_path))
    write_zip({"gzip/readme": b""}, tmp_path / "emnist-letters" / "gzip.zip")
    with pytest.raises(ValueError, match="gzip.zip lacks gzip/emnist-letters-train-images"):
        load("emnist-letters", "train", str(tmp_path))


def test_digits_start_from_their_lookalikes_also_where_only_capitals_are_known():
    capitals = list(string.ascii_uppercase)
    assert [capitals[k] for k in starting_classes(list(string.digits), capitals)] == list("OLZBASBTBQ")
    assert [LETTERS[k] for k in starting_classes(list(string.digits), list(LETTERS))] == list("OlZBASbTBq")
    assert starting_classes(["cat"], capitals) is None


# ---- SVHN ------------------------------------------------------------------------------------------

COLOUR = RNG.integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)


def write_svhn(path: Path, images: np.ndarray = COLOUR, labels=(1, 10, 9, 2, 10, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]},
                     do_compression=True)


def test_svhn(tmp_path):
    write_svhn(tmp_path / "svhn" / "train_32x32.mat")
    write_svhn(tmp_path / "svhn" / "test_32x32.mat", COLOUR[:2], (10, 5))
    train, test = (load("svhn", split, str(tmp_path), channels=3) for split in ("train", "test"))
    assert np.array_equal(train.images, COLOUR) and np.array_equal(test.images, COLOUR[:2])
    assert train.labels.tolist() == [1, 0, 9, 2, 0, 3] and test.labels.tolist() == [0, 5]   # 10 stands for 0
    assert train.classes == list(string.digits)
    assert train.images.flags.c_contiguous and train.labels.dtype == np.int64


@pytest.mark.parametrize("images, labels", [(COLOUR[:, :20], [1] * 6), (COLOUR, [0] * 6), (COLOUR, [1] * 5),
                                            (COLOUR.astype(float), [1] * 6)],
                         ids=["not 32x32", "label 0", "a label short", "floats"])
def test_other_arrays_than_svhns_are_refused(tmp_path, images, labels):
    write_svhn(tmp_path / "svhn" / "train_32x32.mat", images, labels)
    with pytest.raises(ValueError, match="train_32x32.mat holds X"):
        load("svhn", "train", str(tmp_path), channels=3)


def test_damaged_mat_file_is_refused(tmp_path):
    path = tmp_path / "svhn" / "train_32x32.mat"
    write_svhn(path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[:100], whole[:1_000], whole[:-10], whole[:128] + whole[140:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="train_32x32.mat is no readable"):
            load("svhn", "train", str(tmp_path), channels=3)


# ---- CIFAR -----------------------------------------------------------------------------------------

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def records(images: np.ndarray, *labels) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)   # red, green, blue; each row by row
    return np.concatenate([*(np.array(column, np.uint8)[:, None] for column in labels), planes], 1).tobytes()


def cifar10_files() -> dict[str, bytes]:
    files = {f"cifar-10-batches-bin/data_batch_{k + 1}.bin": records(COLOUR[k:k + 1], [9 - k]) for k in range(5)}
    return {"cifar-10-batches-bin/test_batch.bin": records(COLOUR[4:], [3, 8]), **dict(reversed(files.items())),
            "cifar-10-batches-bin/batches.meta.txt": ("\n".join(CIFAR10) + "\n\n").encode()}


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10(tmp_path, packed):
    if packed:
        write_tar(cifar10_files(), tmp_path / "cifar10" / "cifar-10-binary.tar.gz")
    else:
        write(cifar10_files(), tmp_path / "cifar10")
    train, test = (load("cifar10", split, str(tmp_path), channels=3) for split in ("train", "test"))
    assert np.array_equal(train.images, COLOUR[:5]) and np.array_equal(test.images, COLOUR[4:])
    assert train.labels.tolist() == [9, 8, 7, 6, 5] and test.labels.tolist() == [3, 8]
    assert train.classes == CIFAR10 and train.labels.dtype == np.int64
    assert train.images.flags.c_contiguous and train.images.flags.writeable


def test_cifar100_has_fine_labels(tmp_path):
    fine = [f"fine{k}" for k in range(100)]
    write_tar({"cifar-100-binary/train.bin": records(COLOUR, [19] * 6, [99, 0, 1, 2, 3, 4]),
               "cifar-100-binary/test.bin": records(COLOUR[:1], [3], [50]),
               "cifar-100-binary/fine_label_names.txt": "\n".join(fine).encode(),
               "cifar-100-binary/coarse_label_names.txt": b"fish"}, tmp_path / "cifar100" / "cifar-100-binary.tar.gz")
    train, test = (load("cifar100", split, str(tmp_path), channels=3) for split in ("train", "test"))
    assert np.array_equal(train.images, COLOUR) and train.labels.tolist() == [99, 0, 1, 2, 3, 4]
    assert train.classes == fine and test.labels.tolist() == [50]


def test_damaged_cifar_archives_are_refused(tmp_path):
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz is missing.*--get cifar10"):
        load("cifar10", "train", str(tmp_path), channels=3)
    write_tar(cifar10_files(), path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[:len(whole) // 2], whole[:-9], whole[:5_000] + b"x" * 9 + whole[5_009:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cifar-10-binary.tar.gz is no readable archive"):
            load("cifar10", "train", str(tmp_path), channels=3)


@pytest.mark.parametrize("name, content, complaint", [
    ("data_batch_3.bin", None, "lacks cifar-10-batches-bin/data_batch_3.bin"),
    ("data_batch_3.bin", records(COLOUR[:1], [1])[:-1], "data_batch_3.bin is damaged: its records"),
    ("data_batch_3.bin", records(COLOUR[:1], [10]), "data_batch_3.bin is damaged: .* labels below 10"),
    ("batches.meta.txt", b"cat\ndog\n", "10 classes"),
])
def test_damaged_parts_of_cifar_are_named(tmp_path, name, content, complaint):
    files = {**cifar10_files(), f"cifar-10-batches-bin/{name}": content}
    write_tar({n: c for n, c in files.items() if c is not None}, tmp_path / "cifar10" / "cifar-10-binary.tar.gz")
    with pytest.raises(ValueError, match=complaint):
        load("cifar10", "train", str(tmp_path), channels=3)


# ---- ImageNet 32 and 64 ----------------------------------------------------------------------------

def write_imagenet(folder: Path, size: int, name: str, images: np.ndarray, labels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, data=images.transpose(0, 3, 1, 2).reshape(len(images), 3 * size * size),
             labels=np.array(labels), mean=np.zeros(3 * size * size))


@pytest.mark.parametrize("size", [32, 64])
def test_imagenet(tmp_path, size):
    images = RNG.integers(0, 256, (6, size, size, 3)).astype(np.uint8)
    folder = tmp_path / f"imagenet{size}" / f"Imagenet{size}_train_npz"
    for k, part in ((10, slice(4, 6)), (1, slice(0, 2)), (2, slice(2, 4))):
        write_imagenet(folder, size, f"train_data_batch_{k}.npz", images[part], [1 + part.start, 1000])
    write_imagenet(tmp_path / f"imagenet{size}", size, "val_data.npz", images[:1], [7])
    train, test = (load(f"imagenet{size}", split, str(tmp_path), size, 3) for split in ("train", "test"))
    assert np.array_equal(train.images, images) and np.array_equal(test.images, images[:1])
    assert train.labels.tolist() == [0, 999, 2, 999, 4, 999]   # batch 10 comes after batch 2
    assert test.labels.tolist() == [6] and train.classes[6] == "0007" and len(train.classes) == 1000


def test_imagenet_of_another_size_or_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no train_data_batch_K.npz.*--get imagenet64"):
        load("imagenet64", "train", str(tmp_path), 64, 3)
    write_imagenet(tmp_path / "imagenet64", 32, "train_data_batch_1.npz", COLOUR, [1] * 6)
    with pytest.raises(ValueError, match="train_data_batch_1.npz holds data"):
        load("imagenet64", "train", str(tmp_path), 64, 3)
    write_imagenet(tmp_path / "imagenet32", 32, "train_data_batch_1.npz", COLOUR, [0] * 6)
    with pytest.raises(ValueError, match="train_data_batch_1.npz holds data.*from 1 to 1000"):
        load("imagenet32", "train", str(tmp_path), 32, 3)


def peak_memory(function) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_imagenet_is_converted_batch_by_batch(tmp_path):
    batch = RNG.integers(0, 256, (100, 64, 64, 3)).astype(np.uint8)
    for k in range(8):
        write_imagenet(tmp_path / "imagenet64", 64, f"train_data_batch_{k + 1}.npz", batch, [1] * 100)
    peak = peak_memory(lambda: load("imagenet64", "train", str(tmp_path), 32, 3))
    assert peak < 8 * batch.nbytes   # less than the files' content in uint8, a quarter of it in float32


def test_pictures_are_never_all_in_memory_as_anything_but_the_result(tmp_path):
    write({f"a/{k}.png": plain((k, 0, 0), (64, 64)) for k in range(200)}, tmp_path)
    assert peak_memory(lambda: load(str(tmp_path), "train", image_size=64, channels=3)) < 1.5 * 200 * 64 * 64 * 3


# ---- .npz ------------------------------------------------------------------------------------------

def test_npz_of_images_and_labels(tmp_path):
    save_arrays(tmp_path / "mine.npz", images=COLOUR, labels=np.array([0, 2, 2, 0, 0, 0]))
    dataset = load(str(tmp_path / "mine.npz"), "train", channels=3)
    assert np.array_equal(dataset.images, COLOUR) and dataset.labels.tolist() == [0, 2, 2, 0, 0, 0]
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.dtype == np.int64
    with pytest.raises(ValueError, match="mine.npz has no test_images"):
        load(str(tmp_path / "mine.npz"), "test", channels=3)


def test_npz_with_both_splits(tmp_path):
    save_arrays(tmp_path / "mine.npz", train_images=SMALL, train_labels=np.arange(5)[:, None], test_images=SMALL[:1],
                test_labels=np.array([[6]], np.uint8))
    train, test = (load(str(tmp_path / "mine.npz"), split, image_size=28) for split in ("train", "test"))
    assert np.array_equal(train.images[..., 0], SMALL) and train.labels.tolist() == [0, 1, 2, 3, 4]
    assert test.labels.tolist() == [6] and train.classes == test.classes == list("0123456")


@pytest.mark.parametrize("arrays, complaint", [
    (dict(images=COLOUR), "no readable .npz"), (dict(labels=np.arange(6)), "no readable .npz"),
    (dict(images=COLOUR / 255, labels=np.arange(6)), "give uint8"),
    (dict(images=COLOUR.transpose(0, 3, 1, 2), labels=np.arange(6)), "give uint8"),
    (dict(images=COLOUR, labels=np.arange(6) / 2), "give integers"),
    (dict(images=COLOUR, labels=-np.arange(6)), "give integers"),
    (dict(images=COLOUR, labels=np.eye(6, dtype=int)), "give integers"),
    (dict(images=COLOUR, labels=np.arange(5)), "6 images but 5 labels"),
    (dict(images=COLOUR, labels=np.array(list("abcdef"), object)), "no readable .npz"),
])
def test_other_npz_files_are_refused(tmp_path, arrays, complaint):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=complaint):
        load(str(tmp_path / "mine.npz"), "train", channels=3)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, "
                                     b"'shape': (1,), }".ljust(128) + b"\n"], ids=["empty", "text", "npy"])
def test_damaged_npz_is_refused(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match="mine.npz is no readable .npz"):
        load(str(tmp_path / "mine.npz"), "train")


@pytest.mark.parametrize("damage", range(0, 60, 3))
def test_npz_with_a_damaged_directory_is_refused(tmp_path, damage):
    save_arrays(tmp_path / "mine.npz", images=COLOUR, labels=np.arange(6))
    content = bytearray((tmp_path / "mine.npz").read_bytes())
    directory = content.index(b"PK\1\2")
    content[directory + damage:directory + damage + 3] = b"\xfd\xfd\xfd"
    (tmp_path / "mine.npz").write_bytes(content)
    try:
        dataset = load(str(tmp_path / "mine.npz"), "train", channels=3)
    except ValueError as error:
        assert "mine.npz" in str(error)
    else:   # of dates, attributes and the like nothing depends
        assert np.array_equal(dataset.images, COLOUR)


# ---- CelebA ----------------------------------------------------------------------------------------

FACES = {"000001.jpg": 10, "000002.jpg": 80, "000003.jpg": 150, "000004.jpg": 220}
ATTRIBUTES = ("4\nEyeglasses Male Smiling \n000001.jpg -1  1 -1\n000002.jpg  1 -1 -1\n"
              "000003.jpg -1 -1  1\n000004.jpg -1  1  1\n")
PARTITION = "000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n"


def face(level: int) -> bytes:
    """218 high and 178 wide; white above and below the central square (in whole blocks of JPEG)."""
    picture = np.full((218, 178, 3), 255, np.uint8)
    picture[16:200] = level
    return encoded(picture, "JPEG")


@pytest.fixture(params=["folder", "zip"])
def celeba(request, tmp_path) -> Path:
    faces = {f"img_align_celeba/{name}": face(level) for name, level in FACES.items()}
    root = tmp_path / "celeba"
    if request.param == "zip":
        write_zip(faces, root / "img_align_celeba.zip")
    else:
        write(faces, root)
    write({"list_attr_celeba.txt": ATTRIBUTES.encode(), "list_eval_partition.txt": PARTITION.encode()}, root)
    return root


def test_celeba(tmp_path, celeba):
    train, test = (load("celeba", split, str(tmp_path), image_size=16, channels=3) for split in ("train", "test"))
    assert train.images.shape == (2, 16, 16, 3) and test.images.shape == (1, 16, 16, 3)
    for image, level in zip([*train.images, *test.images], [10, 80, 220]):   # the central square, nothing of the border
        assert np.allclose(image, level, atol=3)
    assert train.classes == ["not Male", "Male"]
    assert train.labels.tolist() == [1, 0] and test.labels.tolist() == [1]


def test_celeba_by_another_attribute(tmp_path, celeba):
    dataset = load("celeba:Eyeglasses", "train", str(tmp_path), channels=3)
    assert dataset.labels.tolist() == [0, 1] and dataset.classes == ["not Eyeglasses", "Eyeglasses"]
    with pytest.raises(ValueError, match="no attribute 'Bald' but Eyeglasses, Male, Smiling"):
        load("celeba:Bald", "train", str(tmp_path), channels=3)


def test_celeba_without_its_partition_has_no_test_images_and_says_so(tmp_path, celeba, capsys):
    (celeba / "list_eval_partition.txt").unlink()
    assert len(load("celeba", "train", str(tmp_path), channels=3).images) == 4
    assert "list_eval_partition.txt is missing: all images are taken for training" in capsys.readouterr().out
    with pytest.raises(ValueError, match="list_eval_partition.txt is missing"):
        load("celeba", "test", str(tmp_path), channels=3)


@pytest.mark.parametrize("file, content, complaint", [
    ("list_attr_celeba.txt", "", "no attribute 'Male'"), ("list_attr_celeba.txt", "3\n", "no attribute 'Male'"),
    ("list_attr_celeba.txt", ATTRIBUTES.replace("-1", "0"), "list_attr_celeba.txt is damaged"),
    ("list_attr_celeba.txt", ATTRIBUTES[:-8], "list_attr_celeba.txt is damaged"),
    ("list_eval_partition.txt", PARTITION.replace("000002", "000009"), "do not agree on 000009.jpg"),
    ("list_eval_partition.txt", "", "do not agree"),
])
def test_damaged_lists_of_celeba_are_refused(tmp_path, celeba, file, content, complaint):
    (celeba / file).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load("celeba", "train", str(tmp_path), channels=3)


def test_missing_and_corrupt_faces_are_named(tmp_path):
    with pytest.raises(ValueError, match="must hold img_align_celeba .*--get celeba"):
        load("celeba", "train", str(tmp_path), channels=3)
    faces = {f"img_align_celeba/{name}": face(level) for name, level in FACES.items()}
    write({**faces, "list_attr_celeba.txt": ATTRIBUTES.encode()}, tmp_path / "celeba")
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:500]), Path.unlink):
        damage(tmp_path / "celeba" / "img_align_celeba" / "000003.jpg")
        with pytest.raises(ValueError, match="cannot read the image 000003.jpg"):
            load("celeba", "train", str(tmp_path), channels=3)


# ---- captions --------------------------------------------------------------------------------------

def lines(*entries: dict) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


@pytest.fixture(params=["folder", "zip"])
def tree(request, tmp_path):
    """A function that makes a folder or a zip of the given files and returns its path."""
    def make(files: dict[str, bytes]) -> str:
        if request.param == "zip":
            write_zip(files, tmp_path / "images.zip")
            return str(tmp_path / "images.zip")
        write(files, tmp_path / "images")
        return str(tmp_path / "images")
    return make


def test_captions_come_with_their_images(tree):
    source = tree({"b.png": plain(20), "sub/a.png": plain(10), "unnamed.png": plain(99), "metadata.jsonl": lines(
        {"file_name": "b.png", "text": "a grey sea, très calme"}, {"file_name": "sub/a.png", "text": "night"}) + b"\n"})
    dataset = load(source, "train", image_size=8)
    assert dataset.images[:, 0, 0, 0].tolist() == [20, 10]
    assert dataset.captions == ["a grey sea, très calme", "night"]
    assert dataset.labels.tolist() == [0, 0] and dataset.classes == ["image"]
    with pytest.raises(ValueError, match="names no images for test"):
        load(source, "test", image_size=8)


def test_a_caption_may_hold_any_character(tree):
    text = "one\u2028two\x85 \"three\"\n"
    source = tree({"0.png": plain(1), "metadata.jsonl": lines({"file_name": "0.png", "text": text})})
    assert load(source, "train", image_size=8).captions == [text]


def test_damaged_captions_in_a_zip_are_named(tmp_path):
    path = tmp_path / "images.zip"
    write_zip({"0.png": plain(1), "metadata.jsonl": lines({"file_name": "0.png", "text": "a sofa"})}, path)
    path.write_bytes(path.read_bytes().replace(b"sofa", b"soda"))
    with pytest.raises(ValueError, match="cannot read metadata.jsonl of .*images.zip"):
        load(str(path), "train", image_size=8)


@pytest.mark.parametrize("where", ["one file above", "a file in each"])
def test_captions_of_train_and_test(tree, where):
    names = ["train/0.png", "train/1.png", "test/0.png"]
    pictures = {name: plain(10 * k) for k, name in enumerate(names)}
    entries = [{"file_name": name, "text": f"of {name}"} for name in names]
    if where == "one file above":
        source = tree({**pictures, "metadata.jsonl": lines(*entries)})
    else:
        source = tree({**pictures, **{f"{split}/metadata.jsonl": lines(*(
            {**e, "file_name": e["file_name"].split("/")[1]} for e in entries if split in e["file_name"]))
            for split in ("train", "test")}})
    train, test = (load(source, split, image_size=8) for split in ("train", "test"))
    assert sorted(train.captions) == ["of train/0.png", "of train/1.png"] and test.captions == ["of test/0.png"]
    assert train.images[:, 0, 0, 0].tolist() == [0, 10] and test.images[:, 0, 0, 0].tolist() == [20]


@pytest.mark.parametrize("labels, classes", [(["cat", "ant"], ["ant", "cat"]), ([10, 9], ["9", "10"])])
def test_captions_with_labels_and_labels_without_captions(tree, labels, classes):
    entries = [{"file_name": f"{k}.png", "text": "x", "label": label} for k, label in enumerate(labels)]
    pictures = {"0.png": plain(1), "1.png": plain(2)}
    dataset = load(tree({**pictures, "metadata.jsonl": lines(*entries)}), "train", image_size=8)
    assert dataset.classes == classes and dataset.labels.tolist() == [1, 0] and dataset.captions == ["x", "x"]
    for entry in entries:
        del entry["text"]
    dataset = load(tree({**pictures, "metadata.jsonl": lines(*entries)}), "train", image_size=8)
    assert dataset.captions is None and dataset.labels.tolist() == [1, 0]


@pytest.mark.parametrize("line, complaint", [
    (b"not json", "line 2 of .*metadata.jsonl"), (b"[1]", "line 2 of"), (b'{"text": "x"}', "line 2 of"),
    (b'{"file_name": 3}', "line 2 of"), (b'{"file_name": "0.png", "text": 4}', "line 2 of"),
    (b'{"file_name": "0.png", "text": "x", "label": -1}', "line 2 of"), (b"\xff\xfe", "cannot read metadata.jsonl"),
    (b'{"file_name": "0.png"}', "some lines have a text and some have none"),
    (b'{"file_name": "0.png", "text": "x", "label": 1}', "some lines have a label and some have none"),
    (b'{"file_name": "1.png", "text": "x"}', "cannot read the image 1.png"),
])
def test_damaged_metadata_is_refused_by_line(tree, line, complaint):
    source = tree({"0.png": plain(1), "metadata.jsonl": lines({"file_name": "0.png", "text": "x"}) + line})
    with pytest.raises(ValueError, match=complaint):
        load(source, "train", image_size=8)


def test_celebahq_with_metadata_and_as_published(tmp_path):
    folder = tmp_path / "celebahq"
    with pytest.raises(ValueError, match="celebahq is missing: .*--get celebahq"):
        load("celebahq", "train", str(tmp_path), channels=3)
    write({**{f"CelebA-HQ-img/{k}.jpg": encoded(np.full((64, 64, 3), 20 * k, np.uint8), "JPEG") for k in (0, 2, 10)},
           "sketch/2.jpg": plain((255, 255, 255)),
           **{f"celeba-caption/{k}.txt": f"Face {k} smiles. \nShe is {k}.\n".encode() for k in (0, 2, 10)}}, folder)
    dataset = load("celebahq", "train", str(tmp_path), channels=3)
    assert dataset.captions == ["Face 0 smiles.", "Face 2 smiles.", "Face 10 smiles."]
    assert np.allclose(dataset.images.mean((1, 2, 3)), [0, 40, 200], atol=2)
    with pytest.raises(ValueError, match="names no images for test"):
        load("celebahq", "test", str(tmp_path), channels=3)
    (folder / "CelebA-HQ-img" / "2.jpg").unlink()
    with pytest.raises(ValueError, match="celeba-caption/2.txt has no picture"):
        load("celebahq", "train", str(tmp_path), channels=3)
    write({"metadata.jsonl": lines({"file_name": "CelebA-HQ-img/10.jpg", "text": "ten"})}, folder)
    assert load("celebahq", "train", str(tmp_path), channels=3).captions == ["ten"]


def test_dataset_needs_a_caption_per_image():
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        Dataset(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), ["a"], ["x"])


# ---- sizes and channels ----------------------------------------------------------------------------

@pytest.fixture
def mnist(tmp_path) -> str:
    write(MNIST_FILES, tmp_path / "mnist")
    return str(tmp_path)


@pytest.mark.parametrize("image_size, border", [(28, 0), (31, 1), (32, 2)])
def test_grey_28_gets_a_border_up_to_32_and_nothing_is_said(mnist, capsys, image_size, border):
    images = load("mnist", "train", mnist, image_size).images
    assert images.shape == (5, image_size, image_size, 1) and images.sum() == SMALL.sum()
    assert np.array_equal(images[:, border:border + 28, border:border + 28, 0], SMALL)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("image_size", [16, 64])
def test_other_sizes_are_resampled_with_the_same_border(mnist, image_size):
    images = load("mnist", "train", mnist, image_size).images
    framed = np.pad(SMALL, ((0, 0), (2, 2), (2, 2)))
    for image, original in zip(images[..., 0], framed):
        wanted = Image.fromarray(original).resize((image_size, image_size), Image.Resampling.LANCZOS)
        assert np.array_equal(image, np.asarray(wanted))


def test_grey_becomes_colour_and_colour_grey(mnist, tmp_path):
    colour = load("mnist", "train", mnist, image_size=28, channels=3).images
    assert np.array_equal(colour, np.repeat(SMALL[..., None], 3, 3))
    save_arrays(tmp_path / "mine.npz", images=COLOUR, labels=np.zeros(6, int))
    grey = load(str(tmp_path / "mine.npz"), "train").images
    assert np.abs(grey[..., 0] - COLOUR @ [0.299, 0.587, 0.114]).max() < 1   # ITU-R 601, as for pictures


def test_a_conversion_is_said_once(mnist, tmp_path, capsys):
    formats.say_once.cache_clear()
    for _ in range(2):
        load("mnist", "train", mnist, image_size=64, channels=3)
    assert capsys.readouterr().out == "mnist: images of 32x32 pixels in grey are converted to 64x64 in colour\n"
    write({"a/0.png": plain(1), "a/1.png": plain(2)}, tmp_path / "pictures")
    for split_size in (4, 4):
        load(str(tmp_path / "pictures"), "train", image_size=split_size)
    assert capsys.readouterr().out == "pictures: images of other sizes or colours are converted to 4x4 in grey\n"
    load(str(tmp_path / "pictures"), "train", image_size=8)   # as they are
    assert capsys.readouterr().out == ""
