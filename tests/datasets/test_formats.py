"""Published data sets are read from small files of exactly the publishers' formats."""

import gzip
import string
import zipfile

import numpy as np
import pytest
from small_files import (
    cifar,
    idx,
    imagenet,
    mnist,
    npz,
    peak_memory,
    plain,
    svhn,
    tarred,
    write,
    zipped,
)

from datasets import Dataset, formats, load

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 28, 28)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILES = {
    "cifar-10-batches-bin/test_batch.bin": cifar(COLOUR[4:], [3, 8]),
    **{f"cifar-10-batches-bin/data_batch_{k}.bin": cifar(COLOUR[k - 1:k], [10 - k])
       for k in (5, 4, 3, 2, 1)},
    "cifar-10-batches-bin/batches.meta.txt": ("\n".join(CIFAR10) + "\n\n").encode()}
EMNIST_FILES = {
    f"gzip/emnist-letters-{split}-{part}-ubyte.gz": gzip.compress(idx(array))
    for split, n in (("train", 5), ("test", 2))
    for part, array in (("images-idx3", GREY[:n]), ("labels-idx1", 5 * np.arange(1, n + 1)))}


@pytest.mark.parametrize("values", [
    {"labels": np.zeros(2, np.int64)}, {"labels": np.zeros(3, np.int64), "captions": ["a", "b"]}])
def test_labels_and_captions_are_as_many_as_images(values):
    with pytest.raises(ValueError, match=f"3 images but 2 {list(values)[-1]}"):
        Dataset(np.zeros((3, 4, 4, 1), np.uint8), classes=["a"], **values)


# ---- every format ------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_plain_and_gzipped(tmp_path, ending):
    for prefix, n in (("train", 5), ("t10k", 3)):
        files = mnist(GREY[:n], [9, 0, 3, 1, 2][:n], prefix)
        if not ending:
            files = {name[:-3]: gzip.decompress(content) for name, content in files.items()}
        write(files, tmp_path)
    train, test = (formats.load_mnist(tmp_path, split) for split in ("train", "test"))
    assert np.array_equal(train.images, GREY[..., None]) and train.images.dtype == np.uint8
    assert train.labels.tolist() == [9, 0, 3, 1, 2] and train.labels.dtype == np.int64
    assert train.classes == list(string.digits) and len(test.images) == 3


def test_fashion_mnist_names_its_classes(tmp_path):
    write(mnist(GREY, [9, 0, 3, 1, 2]), tmp_path / "fashion-mnist")
    dataset = load("fashion-mnist", "train", str(tmp_path), image_size=28)
    assert [dataset.classes[k] for k in dataset.labels] == [
        "Ankle boot", "T-shirt/top", "Dress", "Trouser", "Pullover"]


@pytest.mark.parametrize("packed", [True, False])
def test_emnist_letters_are_turned_upright_and_named(tmp_path, packed):
    if packed:
        others = {"gzip/emnist-digits-train-images-idx3-ubyte.gz": b""}
        write({"gzip.zip": zipped(EMNIST_FILES | others)}, tmp_path)
    else:
        write({name[5:]: content for name, content in EMNIST_FILES.items()}, tmp_path)
    train, test = (formats.load_emnist_letters(tmp_path, split) for split in ("train", "test"))
    assert np.array_equal(train.images[..., 0], GREY.transpose(0, 2, 1)) and len(test.images) == 2
    assert train.classes == list(string.ascii_uppercase)
    assert [train.classes[k] for k in train.labels] == list("EJOTY")
    assert train.images.flags.c_contiguous and train.images.flags.writeable


def test_svhn_has_zeros_instead_of_tens(tmp_path):
    write({"train_32x32.mat": svhn(COLOUR, [1, 10, 9, 2, 10, 3]),
           "test_32x32.mat": svhn(COLOUR[:2], [10, 5])}, tmp_path)
    train, test = (formats.load_svhn(tmp_path, split) for split in ("train", "test"))
    assert np.array_equal(train.images, COLOUR) and np.array_equal(test.images, COLOUR[:2])
    assert train.labels.tolist() == [1, 0, 9, 2, 0, 3] and test.labels.tolist() == [0, 5]
    assert train.classes == list(string.digits)
    assert train.images.flags.c_contiguous and train.labels.dtype == np.int64


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_packed_and_unpacked(tmp_path, packed):
    files = {"cifar-10-binary.tar.gz": tarred(CIFAR10_FILES)} if packed else CIFAR10_FILES
    write(files, tmp_path)
    train, test = (formats.load_cifar(tmp_path, split, 10) for split in ("train", "test"))
    assert np.array_equal(train.images, COLOUR[:5]) and np.array_equal(test.images, COLOUR[4:])
    assert train.labels.tolist() == [9, 8, 7, 6, 5] and test.labels.tolist() == [3, 8]
    assert train.classes == CIFAR10 and train.labels.dtype == np.int64
    assert train.images.flags.c_contiguous and train.images.flags.writeable


def test_cifar100_has_fine_labels(tmp_path):
    fine = [f"fine{k}" for k in range(100)]
    write({"cifar-100-binary.tar.gz": tarred({
        "cifar-100-binary/train.bin": cifar(COLOUR, [19] * 6, [99, 0, 1, 2, 3, 4]),
        "cifar-100-binary/test.bin": cifar(COLOUR[:1], [3], [50]),
        "cifar-100-binary/fine_label_names.txt": "\n".join(fine).encode(),
        "cifar-100-binary/coarse_label_names.txt": b"fish"})}, tmp_path)
    train, test = (formats.load_cifar(tmp_path, split, 100) for split in ("train", "test"))
    assert np.array_equal(train.images, COLOUR) and train.labels.tolist() == [99, 0, 1, 2, 3, 4]
    assert train.classes == fine and test.labels.tolist() == [50]


@pytest.mark.parametrize("size", [32, 64])
def test_imagenet_batches_come_in_order_of_number(tmp_path, size):
    images = RNG.integers(0, 256, (6, size, size, 3)).astype(np.uint8)
    write({f"Imagenet_train_npz/train_data_batch_{k}.npz": imagenet(images[i:i + 2], [1 + i, 1000])
           for k, i in ((10, 4), (1, 0), (2, 2))}, tmp_path)
    write({"val_data.npz": imagenet(images[:1], [7])}, tmp_path)
    train, test = (formats.load_imagenet(tmp_path, split, size, size, 3)
                   for split in ("train", "test"))
    assert np.array_equal(train.images, images) and np.array_equal(test.images, images[:1])
    assert train.labels.tolist() == [0, 999, 2, 999, 4, 999]
    assert test.labels.tolist() == [6]
    assert train.classes[6] == "0007" and len(train.classes) == 1000


@pytest.mark.parametrize("first", [0, 1])
def test_npz_of_training_images_only(tmp_path, first):
    path = tmp_path / "mine.npz"
    path.write_bytes(npz(images=COLOUR, labels=np.array([0, 2, 1, 0, 0, 0]) + first))
    dataset = load(str(path), "train", channels=3)
    assert np.array_equal(dataset.images, COLOUR)
    assert dataset.classes == [str(first + k) for k in range(3)]
    assert dataset.labels.tolist() == [0, 2, 1, 0, 0, 0] and dataset.labels.dtype == np.int64
    with pytest.raises(ValueError, match="mine.npz has no test_images"):
        load(str(path), "test", channels=3)


def test_npz_with_both_splits(tmp_path):
    path = tmp_path / "mine.npz"
    path.write_bytes(npz(train_images=GREY, train_labels=np.arange(5)[:, None], images=GREY,
                         test_images=GREY[:1], test_labels=np.array([[5]], np.uint8)))
    train, test = (load(str(path), split, image_size=28) for split in ("train", "test"))
    assert np.array_equal(train.images[..., 0], GREY) and train.labels.tolist() == [0, 1, 2, 3, 4]
    assert test.labels.tolist() == [5] and train.classes == test.classes == list("012345")
    assert train.left_out == {"other array{s}": 1, "test image{s}": 1}


def test_npz_with_names_of_classes(tmp_path):
    path = tmp_path / "mine.npz"
    path.write_bytes(npz(images=GREY, labels=np.array([0, 3, 3, 0, 0]),
                         classes=np.array(["ant", "bee", "cat", "dog", "owl"])))
    dataset = load(str(path), "train", image_size=28)
    assert dataset.classes == ["ant", "bee", "cat", "dog", "owl"] and not dataset.left_out
    assert dataset.labels.tolist() == [0, 3, 3, 0, 0]


# ---- what is damaged, missing or of another kind -----------------------------------------------

def cifar_with(name: str, content: bytes | None) -> dict[str, bytes]:
    files = {**CIFAR10_FILES, f"cifar-10-batches-bin/{name}": content}
    files = {name: content for name, content in files.items() if content is not None}
    return {"cifar-10-binary.tar.gz": tarred(files)}


def emnist_with(labels: list[int]) -> dict[str, bytes]:
    return {"emnist-letters-train-images-idx3-ubyte": idx(GREY),
            "emnist-letters-train-labels-idx1-ubyte": idx(np.array(labels))}


def first_batch(images: np.ndarray, label: int) -> dict[str, bytes]:
    return {"train_data_batch_1.npz": imagenet(images, [label] * len(images))}


SVHN, CIFAR = svhn(COLOUR, [1] * 6), tarred(CIFAR10_FILES)
NO_IDX, MISFIT = "train-images-idx3-ubyte is no", "train-images-idx3-ubyte and its labels"
REFUSED = {
    **{f"mnist, {what}": ("mnist", {"train-images-idx3-ubyte": content,
                                    "train-labels-idx1-ubyte": idx(np.arange(5))}, NO_IDX)
       for what, content in {
           "empty": b"", "no header": b"\0\0", "no sizes": idx(GREY)[:10],
           "one byte short": idx(GREY)[:-1], "one byte more": idx(GREY) + b"\0",
           "floats": idx(GREY, kind=0x0D), "no leading zeros": b"\1" + idx(GREY)[1:],
           "a PNG": plain(3), "no magic": idx(GREY)[4:]}.items()},
    **{f"mnist, {what}": ("mnist", mnist(images, labels), MISFIT)
       for what, (images, labels) in {
           "other length": (GREY, range(4)), "swapped": (np.arange(5), GREY),
           "not 28x28": (GREY[:, :20], range(5)), "label 10": (GREY, range(6, 11))}.items()},
    "mnist, no images": ("mnist", {"train-labels-idx1-ubyte": idx(np.arange(5))},
                         "train-images-idx3-ubyte.* is missing.*--get mnist"),
    "mnist, no labels": ("mnist", {"train-images-idx3-ubyte": idx(GREY)},
                         "train-labels-idx1-ubyte.* is missing"),
    "emnist, label 0": ("emnist-letters", emnist_with([0, 1, 2, 3, 4]), "labels from 1 to 26"),
    "emnist, label 27": ("emnist-letters", emnist_with([27, 1, 2, 3, 4]), "labels from 1 to 26"),
    "emnist, no zip": ("emnist-letters", {"gzip.zip": b"no zip"},
                       "gzip.zip is no readable archive"),
    "emnist, another zip": ("emnist-letters", {"gzip.zip": zipped({"gzip/readme": b""})},
                            "gzip.zip lacks gzip/emnist-letters-train-images"),
    **{f"svhn, {what}": ("svhn", {"train_32x32.mat": svhn(images, labels)},
                         "train_32x32.mat holds X")
       for what, (images, labels) in {
           "not 32x32": (COLOUR[:, :20], [1] * 6), "label 0": (COLOUR, [0] * 6),
           "a label short": (COLOUR, [1] * 5), "floats": (COLOUR * 1.0, [1] * 6)}.items()},
    **{f"svhn, {what}": ("svhn", {"train_32x32.mat": content}, "train_32x32.mat is no readable")
       for what, content in {
           "empty": b"", "text": b"text", "a head": SVHN[:100], "a start": SVHN[:1_000],
           "no end": SVHN[:-10], "a gap": SVHN[:128] + SVHN[140:]}.items()},
    "svhn, missing": ("svhn", {}, "train_32x32.mat is missing.*--get svhn"),
    **{f"cifar10, {what}": ("cifar10", {"cifar-10-binary.tar.gz": content},
                            "cifar-10-binary.tar.gz is no readable archive")
       for what, content in {
           "empty": b"", "text": b"text", "half": CIFAR[:len(CIFAR) // 2], "no end": CIFAR[:-9],
           "other bytes": CIFAR[:5_000] + b"x" * 9 + CIFAR[5_009:]}.items()},
    "cifar10, missing": ("cifar10", {}, "cifar-10-binary.tar.gz is missing.*--get cifar10"),
    "cifar10, no batch": ("cifar10", cifar_with("data_batch_3.bin", None),
                          "lacks cifar-10-batches-bin/data_batch_3.bin"),
    "cifar10, a byte more": ("cifar10", cifar_with("data_batch_3.bin", bytes(3074)),
                             "data_batch_3.bin is damaged: its records"),
    "cifar10, label 10": ("cifar10", cifar_with("data_batch_3.bin", cifar(COLOUR, [10] * 6)),
                          "data_batch_3.bin is damaged: .* labels that are not below 10"),
    "cifar10, two classes": ("cifar10", cifar_with("batches.meta.txt", b"cat\ndog\n"),
                             "batches.meta.txt is damaged: there are 10 classes"),
    "imagenet64, missing": ("imagenet64", {},
                            "holds no train_data_batch_K.npz.*--get imagenet64"),
    "imagenet64, 32x32": ("imagenet64", first_batch(COLOUR, 1),
                          "train_data_batch_1.npz holds data"),
    "imagenet32, label 0": ("imagenet32", first_batch(COLOUR, 0),
                            "train_data_batch_1.npz holds data.*from 1 to 1000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_or_missing_files_are_named(tmp_path, case):
    name, files, complaint = REFUSED[case]
    write(files, tmp_path / name)
    with pytest.raises(ValueError, match=complaint):
        load(name, "train", str(tmp_path), channels=3)


def test_damaged_gzip_is_refused(tmp_path):
    path, content = tmp_path / "images.gz", gzip.compress(idx(GREY))
    damaged = [content[:size] for size in (0, 5, 20, len(content) // 2, len(content) - 1)]
    damaged += [content[:k] + bytes([content[k] ^ 0x55]) + content[k + 1:]
                for k in range(20, len(content) - 20, 101)]
    for bad in [*damaged, idx(GREY)]:   # the last is not gzipped at all
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="images.gz is no readable IDX file"):
            formats.read_idx(path)


@pytest.mark.parametrize("test", [
    dict(test_images=COLOUR[:2], test_labels=np.arange(3)),
    dict(test_images=COLOUR[:2] / 255, test_labels=np.arange(2)), dict(test_images=COLOUR)])
def test_both_halves_of_an_npz_are_checked_before_training(tmp_path, test):
    np.savez(tmp_path / "mine.npz", train_images=COLOUR, train_labels=np.arange(6), **test)
    with pytest.raises(ValueError, match="test_(images|labels)"):
        load(str(tmp_path / "mine.npz"), "train", channels=3)


def test_labels_that_are_too_many_are_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "mine.npz", images=COLOUR, labels=np.zeros(10_000_000, int))

    def refused() -> None:
        with pytest.raises(ValueError, match="6 images but 10000000 labels"):
            load(str(tmp_path / "mine.npz"), "train", channels=3)

    assert peak_memory(refused) < 1_000_000


@pytest.mark.parametrize("name, pack", [
    ("images.gz", gzip.compress),
    ("b.zip", lambda zeros: zipped({"a/1.bin": zeros}, zipfile.ZIP_DEFLATED)),
    ("b.tar.gz", lambda zeros: tarred({"a/1.bin": zeros}))])
def test_zeros_that_unpack_to_much_are_refused_too(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr(formats, "LARGEST", 1_000_000)
    path = tmp_path / name
    path.write_bytes(pack(bytes(50_000_000)))

    def refused() -> None:
        with pytest.raises(ValueError, match=f"{name} .*more than 1,000,000 bytes"):
            if name == "images.gz":
                formats.read_idx(path)
            else:
                formats.read_members(path, ["a/1.bin"])

    assert peak_memory(refused) < 5_000_000


@pytest.mark.parametrize("arrays, complaint", [
    (dict(images=COLOUR), "no readable .npz"),
    (dict(labels=np.arange(6)), "no readable .npz"),
    (dict(images=COLOUR / 255, labels=np.arange(6)), "give uint8"),
    (dict(images=COLOUR.transpose(0, 3, 1, 2), labels=np.arange(6)), "give uint8"),
    (dict(images=COLOUR, labels=np.arange(6) / 2), "give integers"),
    (dict(images=COLOUR, labels=-np.arange(6)), "labels below 0: give integers"),
    (dict(images=COLOUR, labels=np.eye(6, dtype=int)), "give integers"),
    (dict(images=COLOUR, labels=np.array(3)), "give integers"),
    (dict(images=COLOUR, labels=np.arange(5)), "mine.npz has 6 images but 5 labels"),
    (dict(images=COLOUR, labels=np.array([0, 1, 255, 2, 2, 2])), "4 numbers from 0 to 255"),
    (dict(images=COLOUR, labels=np.array([2, 3, 2, 2, 2, 2])), "2 numbers from 2 to 3"),
    (dict(images=COLOUR, labels=np.array([0, 1, 2, 2, 2, -1]).astype(np.uint64)),
     "4 numbers from 0 to 18446744073709551615: count from 0 or 1"),
    (dict(images=COLOUR, labels=np.arange(6), classes=np.array(list("abcde"))), "6 or more"),
    (dict(images=COLOUR, labels=np.arange(6), classes=np.array(list("abcdee"))), "different"),
    (dict(images=COLOUR, labels=np.arange(6), classes=np.arange(6)), "strings"),
    (dict(images=COLOUR, labels=np.arange(6) % 2, classes=np.array(["e\u0301", "\u00e9"])),
     "different strings"),
    (dict(images=COLOUR, labels=np.arange(6), classes=np.array("abcdef")), "strings"),
    (dict(images=COLOUR, labels=np.array(list("abcdef"), object)), "object .*give integers"),
    (dict(images=COLOUR[:, :0], labels=np.arange(6)), "give uint8"),
])
def test_other_npz_files_are_refused(tmp_path, arrays, complaint):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=complaint):
        load(str(tmp_path / "mine.npz"), "train", channels=3)


# ---- sizes, channels, memory -------------------------------------------------------------------

def test_grey_becomes_colour_and_colour_grey():
    colour = formats.convert(GREY[..., None], 28, 3, "grey")
    assert np.array_equal(colour, np.repeat(GREY[..., None], 3, 3))
    grey = formats.convert(COLOUR, 32, 1, "colour")
    assert np.abs(grey[..., 0] - COLOUR @ [0.299, 0.587, 0.114]).max() < 1   # ITU-R 601


def test_what_fits_already_is_not_copied():
    assert formats.convert(COLOUR, 32, 3, "colour") is COLOUR


def test_imagenet_is_converted_batch_by_batch(tmp_path):
    batch = RNG.integers(0, 256, (100, 64, 64, 3)).astype(np.uint8)
    write(dict.fromkeys([f"train_data_batch_{k}.npz" for k in range(1, 9)],
                        imagenet(batch, [1] * 100)), tmp_path)
    peak = peak_memory(lambda: formats.load_imagenet(tmp_path, "train", 64, 32, 3))
    assert peak < 8 * batch.nbytes   # less than all files' bytes; a quarter of it in float32


def test_zip_members_are_read_compressed_too(tmp_path):
    files = {"a/1.bin": b"one" * 100, "a/2.bin": b"two" * 100}
    (tmp_path / "b.zip").write_bytes(zipped(files, zipfile.ZIP_DEFLATED))
    assert formats.read_members(tmp_path / "b.zip", ["a/2.bin"]) == {"a/2.bin": b"two" * 100}
