"""CelebA by attributes, CelebA-HQ with captions: folders and zips, also damaged ones."""

from pathlib import Path

import numpy as np
import pytest
from small_files import encoded, metadata, plain, write, zipped

from datasets import load
from datasets.celeba import load_celeba

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
    train, test = (load_celeba(celeba, split, 16, 3) for split in ("train", "test"))
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
    assert len(load_celeba(celeba, "train", 16, 3).images) == 4
    assert "list_eval_partition.txt is missing: all images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="list_eval_partition.txt is missing"):
        load_celeba(celeba, "test", 16, 3)


def test_what_celeba_leaves_out_is_counted(tmp_path):
    more = {"img_align_celeba/000009.jpg": face(1), "img_align_celeba/._000001.jpg": b"",
            "img_align_celeba/notes.txt": b""}
    write({**FACES, **more, ATTR: ATTRIBUTES.encode(), PART: PARTITION.encode()}, tmp_path)
    assert load_celeba(tmp_path, "train", 16, 3).left_out == {
        "image{s} of other splits": 2, "image{s} without attributes": 1, ".txt": 1,
        "hidden file{s}": 1}


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
                     "cannot read 000004.jpg .*: there is none"),
}


@pytest.mark.parametrize("case", BAD_CELEBA)
def test_damaged_celeba_is_refused_by_name(tmp_path, case):
    files, complaint = BAD_CELEBA[case]
    write(files, tmp_path)
    with pytest.raises(ValueError, match=complaint):
        load_celeba(tmp_path, "train", 16, 3)


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
