"""Pictures in folders and zips: classes, captions, CelebA; damaged pictures are refused by name."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_files import encoded, metadata, peak_memory, plain, write, zipped

from datasets import Dataset, folders, load

FLAT = {"dog/b.png": plain(40), "cat/a.png": plain(10), "dog/a.png": plain(30),
        "ant/x.bmp": plain(5, kind="BMP")}


def grey_levels(dataset: Dataset) -> list[int]:
    assert (dataset.images == dataset.images[:, :1, :1]).all()   # every image has one colour
    return dataset.images[:, 0, 0, 0].tolist()


# ---- classes -----------------------------------------------------------------------------------

def test_classes_are_sorted_sub_folders(tree):
    others = {"readme.txt": b"no image", "dog/notes.txt": b"", "dog/._a.png": b"made by a Mac"}
    dataset = load(tree({**FLAT, **others}), "train", image_size=8)
    assert dataset.classes == ["ant", "cat", "dog"]
    assert dataset.labels.tolist() == [0, 1, 2, 2]
    assert dataset.images.shape == (4, 8, 8, 1) and dataset.images.dtype == np.uint8
    assert grey_levels(dataset) == [5, 10, 30, 40]   # the right image for each label


@pytest.mark.parametrize("top", ["", "cifar10/", "some/where/"])
def test_train_and_test_folders(tree, top):
    source = tree({f"{top}train/dog/0.png": plain(1), f"{top}train/cat/0.png": plain(2),
                   f"{top}train/cat/1.png": plain(3), f"{top}test/cat/0.png": plain(4)})
    train, test = (load(source, split, image_size=8) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]   # though no dog is in test
    assert (grey_levels(train), train.labels.tolist()) == ([2, 3, 1], [0, 0, 1])
    assert (grey_levels(test), test.labels.tolist()) == ([4], [0])


@pytest.mark.parametrize("top", ["", "train/"])
def test_training_images_are_never_used_for_testing(tree, top):
    source = tree({f"{top}{name}": content for name, content in FLAT.items()})
    assert len(load(source, "train", image_size=8).images) == len(FLAT)
    with pytest.raises(ValueError, match="no class sub-folders with images for test"):
        load(source, "test")


def test_colour_and_grey(tree):
    source = tree({"a/colour.png": plain((200, 100, 50)), "a/grey.png": plain(70)})
    colour = load(source, "train", image_size=8, channels=3).images
    assert colour.shape == (2, 8, 8, 3)
    assert colour[:, 0, 0].tolist() == [[200, 100, 50], [70, 70, 70]]
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50   # ITU-R 601, as PIL documents
    assert grey_levels(load(source, "train", image_size=8)) == [round(luma), 70]


def test_other_sizes_are_resized(tree):
    source = tree({"a/0.png": plain(9, (31, 17)), "a/1.jpg": plain(90, (64, 64), "JPEG"),
                   "a/2.png": plain(200)})
    images = load(source, "train", image_size=16).images
    assert images.shape == (3, 16, 16, 1)
    assert np.allclose(images.mean(axis=(1, 2, 3)), [9, 90, 200], atol=1)


def test_pictures_stand_as_their_camera_was_held(tree):
    exif = Image.Exif()
    exif[0x0112] = 6   # orientation: to be turned by 90 degrees clockwise
    picture = np.zeros((32, 32), np.uint8)
    picture[:16, :16] = 255
    files = {"a/as_is.png": encoded(picture), "a/turned.jpg": encoded(picture, "JPEG", exif=exif)}
    as_is, turned = load(tree(files), "train", image_size=16).images[..., 0]
    assert as_is[:7, :7].min() > 200 and as_is[:, 9:].max() < 50
    assert turned[:7, 9:].min() > 200 and turned[:, :7].max() < 50


def test_pictures_in_memory_take_a_byte_per_value(tmp_path):
    write({f"a/{k}.png": plain((k, 0, 0), (64, 64)) for k in range(200)}, tmp_path)
    peak = peak_memory(lambda: load(str(tmp_path), "train", image_size=64, channels=3))
    assert peak < 1.5 * 200 * 64 * 64 * 3


def bomb() -> bytes:
    """A PNG that claims to be 60,000 pixels high and wide."""
    content = bytearray(plain(3))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


DEEP = encoded(np.full((8, 8), 40_000, np.uint16))   # 16 bits
NO_CLASSES, NO_FOLDERS = "holds no class sub-folders", "images directly in .*train: put"
REFUSED = {
    "an empty picture": ({**FLAT, "cat/broken.jpg": b""}, "cat/broken.jpg"),
    "text": ({**FLAT, "cat/broken.jpg": b"no image"}, "cat/broken.jpg"),
    "half a picture": ({**FLAT, "cat/broken.jpg": plain(3, (64, 64), "JPEG")[:-100]},
                       "cat/broken.jpg"),
    "a bomb": ({**FLAT, "cat/broken.png": bomb()}, "cat/broken.png"),
    "16 bits": ({**FLAT, "dog/deep.png": DEEP}, "deep.png .*more than 8 bits"),
    "no image": ({"readme.txt": b"text", "a/readme.txt": b"text"}, NO_CLASSES),
    "no sub-folder": ({"top.png": plain(1)}, NO_CLASSES),
    "splits without classes": ({"train/0.png": plain(1), "test/0.png": plain(1)}, NO_FOLDERS),
    "a split without classes": ({"train/0.png": plain(1)}, NO_FOLDERS),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_folders_and_pictures_are_refused(tree, case):
    files, complaint = REFUSED[case]
    with pytest.raises(ValueError, match=complaint):
        load(tree(files), "train", image_size=8)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zip_is_refused(tmp_path, method):
    path = tmp_path / "images.zip"
    noise = np.random.default_rng(0).integers(0, 4, (32, 32), np.uint8)
    content = zipped({"a/0.bmp": encoded(noise, "BMP")}, method)   # zipping compresses a BMP
    for position in range(50, 450, 20):
        path.write_bytes(content[:position] + b"\xff" * 8 + content[position + 8:])
        with pytest.raises(ValueError, match="a/0.bmp"):
            load(str(path), "train")
    directory = content.rindex(b"PK\1\2")   # where "needs version 25.3 to extract" can stand
    newer = content[:directory + 6] + b"\xfd" + content[directory + 7:]
    for bad in (newer, b"not a zip"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="images.zip is no readable folder or zip"):
            load(str(path), "train")


# ---- captions ----------------------------------------------------------------------------------

def test_captions_come_with_their_images(tree):
    text = "one\u2028two\x85 \"three\"\n, très calme"   # a caption may hold any character
    source = tree({"b.png": plain(20), "sub/a.png": plain(10), "unnamed.png": plain(99),
                   "metadata.jsonl": metadata({"file_name": "b.png", "text": text},
                                              {"file_name": "sub/a.png", "text": "night"}) + b"\n"})
    dataset = load(source, "train", image_size=8)
    assert grey_levels(dataset) == [20, 10] and dataset.captions == [text, "night"]
    assert dataset.labels.tolist() == [0, 0] and dataset.classes == ["image"]
    with pytest.raises(ValueError, match="names no images for test"):
        load(source, "test", image_size=8)


@pytest.mark.parametrize("where", ["one file above", "a file in each"])
def test_captions_of_train_and_test(tree, where):
    names = ["train/0.png", "train/1.png", "test/0.png"]
    pictures = {name: plain(10 * k) for k, name in enumerate(names)}
    texts = {name: f"of {name}" for name in names}
    if where == "one file above":
        files = {"metadata.jsonl": metadata(*({"file_name": name, "text": text}
                                              for name, text in texts.items()))}
    else:
        files = {f"{split}/metadata.jsonl": metadata(*(
            {"file_name": name.split("/")[1], "text": text}
            for name, text in texts.items() if split in name)) for split in ("train", "test")}
    source = tree({**pictures, **files})
    train, test = (load(source, split, image_size=8) for split in ("train", "test"))
    assert train.captions == ["of train/0.png", "of train/1.png"]
    assert test.captions == ["of test/0.png"]
    assert grey_levels(train) == [0, 10] and grey_levels(test) == [20]


@pytest.mark.parametrize("labels, classes", [(["cat", "ant"], ["ant", "cat"]),
                                             ([10, 9], ["9", "10"])])
@pytest.mark.parametrize("text", [{"text": "x"}, {}])
def test_labels_with_and_without_captions(tree, labels, classes, text):
    entries = [{"file_name": f"{k}.png", "label": label, **text} for k, label in enumerate(labels)]
    files = {"0.png": plain(1), "1.png": plain(2), "metadata.jsonl": metadata(*entries)}
    dataset = load(tree(files), "train", image_size=8)
    assert dataset.classes == classes and dataset.labels.tolist() == [1, 0]
    assert dataset.captions == (["x", "x"] if text else None)


@pytest.mark.parametrize("line, complaint", [
    (b"not json", "line 2 of .*metadata.jsonl"),
    (b"[1]", "line 2 of"),
    (b'{"text": "x"}', "line 2 of"),
    (b'{"file_name": 3}', "line 2 of"),
    (b'{"file_name": "0.png", "text": 4}', "line 2 of"),
    (b'{"file_name": "0.png", "text": "x", "label": -1}', "line 2 of"),
    (b"\xff\xfe", "cannot read metadata.jsonl"),
    (b'{"file_name": "1.png"}', "some lines have a text and some have none"),
    (b'{"file_name": "1.png", "text": "x", "label": 1}', "some lines have a label and some have"),
    (b'{"file_name": "../0.png", "text": "x"}', "line 2 of .*../0.png is outside its folder"),
    (b'{"file_name": "a/../../0.png", "text": "x"}', "line 2 of .*is outside its folder"),
    (b'{"file_name": "/0.png", "text": "x"}', "line 2 of .*/0.png is outside its folder"),
    (b'{"file_name": "1.png", "text": "x"}', "cannot read the image 1.png"),
])
def test_damaged_metadata_is_refused_by_line(tree, line, complaint):
    first = metadata({"file_name": "0.png", "text": "x"})
    with pytest.raises(ValueError, match=complaint):
        load(tree({"0.png": plain(1), "metadata.jsonl": first + line}), "train", image_size=8)


@pytest.mark.parametrize("spelling", ["0.png", "./0.png", "a/../0.png"])
def test_an_image_named_twice_is_refused_by_lines(tree, spelling):
    lines = metadata(*({"file_name": name} for name in ("1.png", "0.png", spelling)))
    files = {"0.png": plain(1), "1.png": plain(2), "a/0.png": plain(3), "metadata.jsonl": lines}
    with pytest.raises(ValueError, match="line 3 of .* names 0.png, as line 2 of .* does"):
        load(tree(files), "train", image_size=8)


def test_an_image_named_in_two_files_is_refused(tree):
    files = {"a/0.png": plain(1), "metadata.jsonl": metadata({"file_name": "a/0.png"}),
             "a/metadata.jsonl": metadata({"file_name": "0.png"})}
    with pytest.raises(ValueError, match="names a/0.png, as line 1 of .*a/metadata.jsonl does"):
        load(tree(files), "train", image_size=8)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_repeats_a_name_has_one_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("a/0.png", "a/1.png", "a/0.png"):
            archive.writestr(name, plain(1))
    assert len(load(str(tmp_path / "images.zip"), "train", image_size=8).images) == 2


def test_damaged_captions_in_a_zip_are_named(tmp_path):
    content = zipped({"0.png": plain(1),
                      "metadata.jsonl": metadata({"file_name": "0.png", "text": "a sofa"})})
    (tmp_path / "images.zip").write_bytes(content.replace(b"sofa", b"soda"))
    with pytest.raises(ValueError, match="cannot read metadata.jsonl of .*images.zip"):
        load(str(tmp_path / "images.zip"), "train", image_size=8)


# ---- CelebA ------------------------------------------------------------------------------------

ATTRIBUTES = ("4\nEyeglasses Male Smiling \n000001.jpg -1  1 -1\n000002.jpg  1 -1 -1\n"
              "000003.jpg -1 -1  1\n000004.jpg -1  1  1\n")
PARTITION = "000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n"


def face(level: int) -> bytes:
    """218 high and 178 wide; white above and below the central square, in blocks of JPEG."""
    picture = np.full((218, 178, 3), 255, np.uint8)
    picture[16:200] = level
    return encoded(picture, "JPEG")


FACES = {f"img_align_celeba/00000{k}.jpg": face(level)
         for k, level in enumerate((10, 80, 150, 220), 1)}


@pytest.fixture(params=["folder", "zip"])
def celeba(request, tmp_path) -> Path:
    """The four faces, in a folder or a zip, with both lists."""
    faces = FACES if request.param == "folder" else {"img_align_celeba.zip": zipped(FACES)}
    write({**faces, "list_attr_celeba.txt": ATTRIBUTES.encode(),
           "list_eval_partition.txt": PARTITION.encode()}, tmp_path / "celeba")
    return tmp_path / "celeba"


def test_celeba_shows_central_squares_by_attribute(celeba):
    train, test = (folders.load_celeba(celeba, split, 16, 3) for split in ("train", "test"))
    assert train.images.shape == (2, 16, 16, 3) and test.images.shape == (1, 16, 16, 3)
    for image, level in zip([*train.images, *test.images], [10, 80, 220], strict=True):
        assert np.allclose(image, level, atol=3)   # nothing of the white border
    assert train.classes == ["not Male", "Male"]
    assert train.labels.tolist() == [1, 0] and test.labels.tolist() == [1]


def test_celeba_by_another_attribute(celeba):
    dataset = load("celeba:Eyeglasses", "train", str(celeba.parent), channels=3)
    assert dataset.labels.tolist() == [0, 1]
    assert dataset.classes == ["not Eyeglasses", "Eyeglasses"]


def test_without_its_partition_celeba_is_for_training(celeba, capsys):
    (celeba / "list_eval_partition.txt").unlink()
    assert len(folders.load_celeba(celeba, "train", 16, 3).images) == 4
    assert "list_eval_partition.txt is missing: all images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="list_eval_partition.txt is missing"):
        folders.load_celeba(celeba, "test", 16, 3)


ATTR, PART = "list_attr_celeba.txt", "list_eval_partition.txt"
BAD_CELEBA = {
    "no faces": ({}, "must hold img_align_celeba .*--get celeba"),
    "an empty list": ({**FACES, ATTR: b""}, "no attribute 'Male'"),
    "no attributes": ({**FACES, ATTR: b"3\n"}, "no attribute 'Male'"),
    "other attributes": ({**FACES, ATTR: ATTRIBUTES.replace("Male", "Bald").encode()},
                         "no attribute 'Male' but Eyeglasses, Bald, Smiling"),
    "label 0": ({**FACES, ATTR: ATTRIBUTES.replace("-1", "0").encode()}, f"{ATTR} is damaged"),
    "labels short": ({**FACES, ATTR: ATTRIBUTES[:-8].encode()}, f"{ATTR} is damaged"),
    "another face": ({**FACES, ATTR: ATTRIBUTES.encode(), PART: b"000009.jpg 0"},
                     "do not agree on 000009.jpg"),
    "no face": ({**FACES, ATTR: ATTRIBUTES.encode(), PART: b""}, "do not agree on any image"),
    "half a face": ({**FACES, ATTR: ATTRIBUTES.encode(),
                     "img_align_celeba/000003.jpg": face(1)[:500]}, "cannot read .* 000003.jpg"),
    "a face twice": ({**FACES, ATTR: ATTRIBUTES.encode(), PART: PARTITION.encode() * 2},
                     "names the image .*000001.jpg 2 times"),
    "a face short": ({**dict(list(FACES.items())[:3]), ATTR: ATTRIBUTES.encode()},
                     "cannot read the image 000004.jpg"),
}


@pytest.mark.parametrize("case", BAD_CELEBA)
def test_damaged_celeba_is_refused_by_name(tmp_path, case):
    files, complaint = BAD_CELEBA[case]
    write(files, tmp_path)
    with pytest.raises(ValueError, match=complaint):
        folders.load_celeba(tmp_path, "train", 16, 3)


def test_celebahq_as_published_or_with_metadata(tmp_path):
    folder = tmp_path / "celebahq"
    with pytest.raises(ValueError, match="celebahq is missing: .*--get celebahq"):
        load("celebahq", "train", str(tmp_path), channels=3)
    for k in (0, 2, 10):
        write({f"CelebA-HQ-img/{k}.jpg": plain((20 * k,) * 3, (64, 64), "JPEG"),
               f"sketch/{k}.jpg": plain((255, 255, 255)),
               f"celeba-caption/{k}.txt": f"Face {k} smiles. \nShe is {k}.\n".encode()}, folder)
    dataset = load("celebahq", "train", str(tmp_path), channels=3)
    assert dataset.captions == ["Face 0 smiles.", "Face 2 smiles.", "Face 10 smiles."]
    assert np.allclose(dataset.images.mean((1, 2, 3)), [0, 40, 200], atol=2)
    (folder / "CelebA-HQ-img" / "2.jpg").unlink()
    with pytest.raises(ValueError, match="celeba-caption/2.txt has no picture"):
        load("celebahq", "train", str(tmp_path), channels=3)
    entry = {"file_name": "CelebA-HQ-img/10.jpg", "text": "ten"}
    write({"metadata.jsonl": metadata(entry)}, folder)
    assert load("celebahq", "train", str(tmp_path), channels=3).captions == ["ten"]
