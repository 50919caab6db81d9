"""data.py, the program: --get, --show, and what it refuses."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

import data
from datasets import download, rendered
from runtime.cli import one_line_errors
from tiny import refuse, write_images


def test_get_says_where_the_files_are(tmp_path, monkeypatch, capsys):
    files = {"file.gz": (4, hashlib.md5(b"data").hexdigest())}
    monkeypatch.setitem(download.PUBLISHED, "svhn", download.Files((), files))
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "file.gz").write_bytes(b"data")   # there already
    data.main(["--get", "svhn", "--data-dir", str(tmp_path)])
    assert capsys.readouterr().out == f"svhn is in {tmp_path / 'svhn'}\n"


def test_show_writes_a_labelled_grid(tmp_path, capsys):
    for split, level in (("train", 50), ("test", 200)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (level, 0, 0)).save(folder / "0.png")
    out = tmp_path / "grid.png"
    data.main(["--show", str(tmp_path / "pets"), "--split", "test", "--out", str(out)])
    with Image.open(out) as picture:
        assert picture.width > 10 * 32 and picture.height > 2 * 32
        assert picture.getpixel((picture.width - 20, 50)) == (200, 0, 0)   # in colour
    assert f"wrote {out}" in capsys.readouterr().out


def test_show_names_its_picture_after_source_and_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rendered, "CACHE", tmp_path)
    monkeypatch.setattr(rendered, "COUNTS", {"letters": {"test": 60}})
    data.main(["--show", "letters", "--split", "test"])
    with Image.open("runs/letters-test.png") as picture:
        assert picture.height > 10 * 32


def test_show_writes_captions_beside_their_images(tmp_path):
    pets = tmp_path / "pets"
    pets.mkdir()
    Image.new("RGB", (32, 32)).save(pets / "0.png")
    widths = []
    for text in ("cat", "a cat that sleeps on a red sofa"):
        (pets / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "{text}"}}\n')
        _, images, names = data.show(str(pets), "train", "data", 32, 3)
        assert images.shape == (1, 1, 32, 32, 3) and names == [text]
        data.main(["--show", str(pets), "--out", str(tmp_path / "grid.png")])
        with Image.open(tmp_path / "grid.png") as picture:
            widths.append(picture.width)
    assert widths[1] > widths[0] + 60


@pytest.mark.parametrize("out, complaint", [
    ("pets.npz", "pets.npz must be the name of a .png file"),
    ("hard.png", "hard.png is what this command reads"),
    ("photo.png", "photo.png was not made by this program"),
    ("photo.png/new.png", "photo.png is no folder")])
def test_show_replaces_neither_data_nor_photos(tmp_path, monkeypatch, capsys, out, complaint):
    monkeypatch.chdir(tmp_path)
    np.savez("pets.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    os.link("pets.npz", "hard.png")
    Image.new("RGB", (9, 9)).save("photo.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert complaint in refuse(capsys, data.main, ["--show", "pets.npz", "--out", out])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_show_writes_no_picture_among_the_data(tmp_path, capsys):
    out = write_images(tmp_path / "pets", [2], seed=0) / "a" / "grid.png"
    assert "which is read as data" in refuse(
        capsys, data.main, ["--show", tmp_path / "pets", "--out", out])
    assert not out.exists()


@pytest.mark.parametrize("arguments, complaint", [
    ([], "nothing to do: give --get NAME or --show SOURCE"),
    (["--get", "nonsense"], "unknown data set 'nonsense': give one of mnist, fashion-mnist"),
    (["--get", "celeba"], "celeba is not for programs to fetch"),
    (["--show", "nonsense"], "unknown data 'nonsense'"),
    (["--show", "letters", "--split", "all"], "the split 'all'"),
    (["--show", "letters", "--channels", "2"], "2 channels"),
    (["--show", "letters", "--image-size", "big"], "invalid int value: 'big'"),
    (["--show", "mnist"], "train-images-idx3-ubyte[.gz] is missing"),
    (["--tell"], "unrecognized arguments: --tell (--help lists the options)"),
])
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        data.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert complaint in message
