"""Outputs are refused before any work where they cannot be written, or would replace something."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.files import save_arrays
from runtime.outputs import check_outputs, check_suffix
from runtime.pictures import save_grid

PIXELS = np.zeros((1, 1, 8, 8, 3), np.uint8)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: data in `pets`, `pets.zip` and `pets.npz`, links, and odd files."""
    monkeypatch.chdir(tmp_path)
    Path("pets/cat").mkdir(parents=True)
    Image.fromarray(PIXELS[0, 0]).save("pets/cat/0.png")
    with zipfile.ZipFile("pets.zip", "w") as archive:
        archive.write("pets/cat/0.png")
    np.savez("pets.npz", images=PIXELS[0], labels=np.zeros(1))
    Path("folder.png").mkdir()
    os.mkfifo("pipe.json")
    for link, target in (("link", "pets"), ("link.npz", "pets.npz"), ("null.json", "/dev/null"),
                         ("nowhere", "missing"), ("in.png", "pets/cat/1.png"),
                         ("pets/out.png", "../1.png"), ("closed.png", "/proc/1.png")):
        Path(link).symlink_to(target)
    os.link("pets.zip", "hard.png")
    return tmp_path


REFUSED = [
    # outputs, inputs, what is said
    ("pets.npz", "pets.npz", "pets.npz is what this command reads"),
    ("./pets/../pets.npz", "pets.npz", "is what this command reads"),
    ("pets.npz", "link.npz", "is what this command reads"),
    ("link.npz", "pets.npz", "is what this command reads"),
    ("hard.png", "digits pets.zip", "is what this command reads"),
    ("pets/cat/1.png", "pets", "lies in pets, which is read as data"),
    ("pets/new/1.png", "digits ./pets/", "lies in pets, which is read as data"),
    ("link/cat/1.png", "pets", "lies in pets, which is read as data"),
    ("pets/cat/1.png", "link", "lies in link, which is read as data"),
    ("in.png", "pets", "in.png lies in pets, which is read as data"),
    ("pets/out.png", "pets", "out.png lies in pets, which is read as data"),
    ("closed.png", "", "closed.png cannot be written"),
    ("new.png", ".", "lies in ., which is read as data"),
    ("new.png ./new.png", "", "new.png would be written twice"),
    ("pets/new.png link/new.png", "", "would be written twice"),
    ("folder.png", "", "folder.png is no file"),
    ("pipe.json", "", "pipe.json is no file"),
    ("null.json", "", "null.json is no file"),
    ("pets.zip/new.png", "", "new.png cannot be written: pets.zip is no folder"),
    ("pets.zip/a/b/new.png", "", "new.png cannot be written: pets.zip is no folder"),
    ("nowhere/new.png", "", "new.png cannot be written: nowhere is no folder"),
    ("/proc/new.png", "", "/proc/new.png cannot be written"),
    ("/proc/a/b/new.png", "", "/proc/a/b/new.png cannot be written"),
    (f"{'n' * 250}.png", "", "cannot be written: File name too long"),
    (f"{'n' * 300}/new.png", "", "cannot be written: File name too long"),
]


@pytest.mark.parametrize("outputs, inputs, complaint", REFUSED)
def test_what_must_not_be_written_is_refused(place, outputs, inputs, complaint):
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError) as caught:
        check_outputs(map(Path, outputs.split()), inputs.split())
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("outputs, inputs", [
    ("new.png", "pets pets.npz digits"), ("new/deep/a.png new/deep/b.png", "pets"),
    ("pets/new.png", "missing pets/cat"), ("pets.png", "pets pets.zip")])
def test_what_may_be_written_leaves_no_trace(place, outputs, inputs):
    before = sorted(place.rglob("*"))
    check_outputs(map(Path, outputs.split()), inputs.split())
    assert sorted(place.rglob("*")) == before


def foreign(path: Path, kind: str) -> None:
    """Put somebody else's file of this kind at `path`."""
    if kind == "picture":
        Image.fromarray(PIXELS[0, 0]).save(path, format="PNG")
    elif kind == "arrays":
        with open(path, "wb") as file:
            np.savez(file, images=PIXELS)
    elif kind == "weights":
        torch.save({"model": {}, "config": {}, "epoch": 3}, path)
    else:
        path.write_text({"notes": "notes", "list": "[1]", "nested": "[" * 100_000,
                         "object": '{"results": 1, "ledger": 2}'}[kind])


@pytest.mark.parametrize("suffix", [".png", ".npz", ".json", ".pt", ".privacy.json", ""])
@pytest.mark.parametrize("kind", ["picture", "arrays", "weights", "notes", "list", "nested",
                                  "object"])
def test_somebody_else_s_file_is_not_replaced(tmp_path, suffix, kind):
    path = tmp_path / f"x{suffix}"
    foreign(path, kind)
    with pytest.raises(ValueError, match="was not made by this program"):
        check_outputs([path])


@pytest.mark.parametrize("suffix", [".png", ".npz", ".json", ".pt"])
def test_an_empty_file_may_be_replaced(tmp_path, suffix):
    (tmp_path / f"x{suffix}").touch()
    check_outputs([tmp_path / f"x{suffix}"])


def test_this_program_s_own_files_may_be_replaced(public, private, tmp_path):
    save_grid(tmp_path / "x.png", [("", PIXELS, ["a"])])
    save_arrays(tmp_path / "x.npz", images=PIXELS[0], origin=np.array("{}"))
    (tmp_path / "x.json").write_text('{"test_images": 9}')   # as test_evaluate_program finds it
    shutil.copytree(private.parent, tmp_path / "run")
    shutil.copy(public / "autoencoder.pt", tmp_path)
    outputs = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(outputs) == 7
    check_outputs(outputs)


def test_the_name_of_another_kind_is_refused():
    check_suffix(Path("a/b.png"), ".png")
    check_suffix(None, ".png")
    for name in ("b.jpg", "b", "b.png.npz", ".png"):
        with pytest.raises(ValueError, match="must be the name of a .png file"):
            check_suffix(Path(name), ".png")
