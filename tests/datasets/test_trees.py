"""Links, unreadable folders, zips of other systems, damaged and hostile zips."""

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_files import encoded, metadata, peak_memory, plain, write, zipped

from datasets import formats, load


def test_links_to_class_folders_and_images_are_followed(tmp_path):
    write({"store/a/0.png": plain(1), "store/b.png": plain(2), "own/c/0.png": plain(3)}, tmp_path)
    (tmp_path / "own/a").symlink_to(tmp_path / "store/a")
    (tmp_path / "own/c/1.png").symlink_to("../../store/b.png")
    dataset = load(str(tmp_path / "own"), "train", image_size=8)
    assert dataset.classes == ["a", "c"] and dataset.images[:, 0, 0, 0].tolist() == [1, 3, 2]


def test_links_that_lead_nowhere_are_left_out(tmp_path):
    write({"a/0.png": plain(1), "b/0.png": plain(2)}, tmp_path)
    (tmp_path / "a/around").symlink_to(tmp_path)
    (tmp_path / "a/1.png").symlink_to("missing.png")
    (tmp_path / "a/3.png").symlink_to("3.png")
    os.mkfifo(tmp_path / "a/2.png")
    assert load(str(tmp_path), "train", image_size=8).left_out == {
        "link{s} to a folder around it": 1, "broken link{s}": 2, "special file{s}": 1}


@pytest.mark.parametrize("link, target", [("b", "a"), ("a/1.png", "a/0.png")])
def test_an_image_that_two_links_lead_to_is_refused(tmp_path, link, target):
    write({"a/0.png": plain(1)}, tmp_path)
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="are one file: it would count twice"):
        load(str(tmp_path), "train", image_size=8)


def test_images_that_a_list_names_are_followed_too(tmp_path):
    names = ("a.dat", "b.dat")   # no endings of pictures
    write({"a.dat": plain(1), "metadata.jsonl": metadata(*({"file_name": n} for n in names))},
          tmp_path)
    (tmp_path / "b.dat").symlink_to("a.dat")
    with pytest.raises(ValueError, match="a.dat.* are one file: it would count twice"):
        load(str(tmp_path), "train", image_size=8)


def test_a_link_to_what_is_left_out_counts_once(tmp_path):
    write({"blobs/1f3e": plain(1), "blobs/2a4b": plain(2)}, tmp_path)   # as hubs keep files
    for name, blob in (("cat", "1f3e"), ("dog", "2a4b")):
        (tmp_path / "rev" / name).mkdir(parents=True)
        (tmp_path / "rev" / name / "0.png").symlink_to(tmp_path / "blobs" / blob)
    dataset = load(str(tmp_path), "train", image_size=8)
    assert dataset.classes == ["cat", "dog"]


def test_an_unreadable_folder_is_refused(tmp_path, monkeypatch):
    write({"a/0.png": plain(1), "b/0.png": plain(1)}, tmp_path)
    scandir = os.scandir   # as root, nothing is forbidden

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="no readable folder or zip: .*Permission denied: .*b"):
        load(str(tmp_path), "train", image_size=8)


def test_zips_of_windows_have_folders_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("train\\cat\\0.png", "./train/dog/0.png", "/test/cat/1.png"):
            archive.writestr(name, plain(1))
    dataset = load(str(tmp_path / "images.zip"), "train", image_size=8)
    assert dataset.classes == ["cat", "dog"] and dataset.left_out == {"test image{s}": 1}


def test_zips_of_macs_have_the_names_of_the_folder(tmp_path):
    content = zipped({"train/cafe\u0301/0.png": plain(1), "test/caf\u00e9/0.png": plain(1)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:   # Macs do not say that names are UTF-8
        offsets = [archive.start_dir, *(member.header_offset for member in archive.infolist())]
    content = bytearray(content)
    entry = offsets[0]
    for local in offsets[1:]:
        content[local + 7] &= ~0x08
        content[entry + 9] &= ~0x08
        entry = content.find(b"PK\1\2", entry + 1)
    (tmp_path / "images.zip").write_bytes(content)
    dataset = load(str(tmp_path / "images.zip"), "train", image_size=8)
    assert dataset.classes == ["caf\u00e9"]


def test_the_root_of_a_zip_is_not_left_out(tmp_path):
    (tmp_path / "images.zip").write_bytes(zipped({"./": b"", "./a/0.png": plain(1)}))
    assert not load(str(tmp_path / "images.zip"), "train", image_size=8).left_out


def test_links_in_a_zip_are_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/0.png", plain(1))
        link = zipfile.ZipInfo("a/1.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "0.png")
    dataset = load(str(tmp_path / "images.zip"), "train", image_size=8)
    assert dataset.left_out == {"link{s} in the zip": 1}


@pytest.mark.parametrize("claim", ["true", "too small"])
def test_zeros_that_unpack_to_much_are_refused(tmp_path, monkeypatch, claim):
    monkeypatch.setattr(formats, "LARGEST", 1_000_000)
    content = zipped({"a/0.bmp": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    if claim == "too small":
        content = content.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 900_000))
    (tmp_path / "images.zip").write_bytes(content)

    def refused() -> None:
        with pytest.raises(ValueError, match="a/0.bmp"):
            load(str(tmp_path / "images.zip"), "train")

    assert peak_memory(refused) < 5_000_000


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


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_repeats_a_name_has_one_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("a/0.png", "a/1.png", "a/0.png"):
            archive.writestr(name, plain(1))
    dataset = load(str(tmp_path / "images.zip"), "train", image_size=8)
    assert len(dataset.images) == 2 and dataset.left_out == {"repeated name{s}": 1}
