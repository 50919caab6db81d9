"""Files are whole or absent; arrays come back as they were, and damaged ones are refused."""

import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from runtime.checkpoints import save_checkpoint
from runtime.files import array_header, array_names, atomic_write, read_arrays, save_arrays
from runtime.pictures import save_grid
from tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
LABELS = np.arange(6)


def test_atomic_write_replaces_at_the_end(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_leads_to_is_written(tmp_path, there):
    link, path = tmp_path / "link", tmp_path / "deep/file"
    link.symlink_to("deep/file")
    if there:
        write_bytes(path, b"old")
    write_bytes(link, b"new")
    assert link.is_symlink() and path.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [path.parent, link] and [*path.parent.iterdir()] == [path]


def test_on_commit_is_called_before_the_file_is_replaced(tmp_path):
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")

    def on_commit() -> None:
        partial, = tmp_path.glob("*.partial")
        seen.append((path.read_bytes(), partial.read_bytes()))

    with atomic_write(path, on_commit) as file:
        file.write(b"new")
    assert seen == [(b"old", b"new")] and path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["while writing", "on commit"])
def test_an_exception_leaves_the_old_file(tmp_path, error, when):
    def fail() -> None:
        raise error

    path = tmp_path / "file"
    path.write_bytes(b"old")
    on_commit = fail if when == "on commit" else lambda: None
    with pytest.raises(error), atomic_write(path, on_commit) as file:
        file.write(b"half of the ne")
        if when == "while writing":
            fail()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


WRITERS = {
    "bytes": lambda path: write_bytes(path, bytes(50_000)),
    "few bytes": lambda path: write_bytes(path, bytes(1_500)),   # less than a buffer
    "arrays": lambda path: save_arrays(path, images=IMAGES),
    "picture": lambda path: save_grid(path, [("", IMAGES[None], ["a"])]),
    "checkpoint": lambda path: save_checkpoint(path, tiny_model(), classes=["a"])}


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk, kind):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(1_000), pytest.raises(OSError) as caught:
        WRITERS[kind](path)
    assert str(caught.value) == f"{path} cannot be written: File too large"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_fails_at_the_last_moment_is_named(tmp_path, monkeypatch):
    """Some file systems notice a full disk only when the bytes must be there."""
    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="file cannot be written: No space left on device"):
        write_bytes(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, pathlib, signal, sys
from runtime.files import atomic_write
with atomic_write(pathlib.Path(sys.argv[1])) as file:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed(tmp_path):
    path = tmp_path / "file"
    subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT)
    leftover, = tmp_path.glob("file.*.partial")
    others = [tmp_path / name for name in (
        "other" + leftover.name.removeprefix("file"), "file.zip.partial",
        f"file.{os.getppid()}.partial")]   # the last one's writer lives
    for other in others:
        other.write_bytes(b"")
    with atomic_write(path) as file:
        file.write(b"new")
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_only_the_first_process_writes(tmp_path, as_process):
    for rank, written in ((1, False), (0, True)):
        as_process(rank)
        with atomic_write(tmp_path / "file") as file:
            file.write(b"content")
        assert (tmp_path / "file").exists() == written


def test_arrays_come_back_as_they_were(tmp_path):
    path = tmp_path / "mine.npz"
    save_arrays(path, images=IMAGES, labels=LABELS)
    assert array_names(path) == ["images", "labels"]
    images, labels = read_arrays(path)
    assert np.array_equal(images, IMAGES) and images.dtype == np.uint8
    assert np.array_equal(labels, LABELS) and labels.dtype == LABELS.dtype
    with pytest.raises(ValueError, match="mine.npz is no readable .npz of mean and covariance"):
        read_arrays(path, ("mean", "covariance"))


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, LABELS)
    return file.getvalue()


@pytest.mark.parametrize("read", [array_names, read_arrays])
@pytest.mark.parametrize("content", [b"", b"text", npy()], ids=["empty", "text", "npy"])
def test_what_is_no_npz_is_refused(tmp_path, read, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match="mine.npz is no readable .npz"):
        read(tmp_path / "mine.npz")


@pytest.mark.parametrize("content", [
    b"text", b"\x93NUMPY\1\0\x06\0{'desc", b"\x93NUMPY\1\0\4\0(]\n\n"])
def test_a_member_that_is_no_array_is_refused(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("images.npy", content)
    for read in (lambda path: read_arrays(path, ["images"]),
                 lambda path: array_header(path, "images")):
        with pytest.raises(ValueError, match="mine.npz is no readable .npz of images"):
            read(tmp_path / "mine.npz")


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "mine.npz", images=np.array([{}], object))
    with pytest.raises(ValueError, match="mine.npz is no readable .npz of images"):
        read_arrays(tmp_path / "mine.npz", ["images"])


def test_arrays_larger_than_memory_are_refused(tmp_path):
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        claim, dict(descr="|u1", fortran_order=False, shape=(10**15,)))
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("images.npy", claim.getvalue())
    with pytest.raises(ValueError, match="mine.npz is no readable .npz of images: .*allocate"):
        read_arrays(tmp_path / "mine.npz", ["images"])


def damage(path: Path, at: int) -> None:
    """Overwrite three bytes of an .npz, the first of them `at` bytes behind its directory."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2") + at
    content[start:start + 3] = b"\xfd\xfd\xfd"
    path.write_bytes(content)


def test_a_damaged_directory_is_refused_or_harmless(tmp_path):
    refused = 0
    for at in range(0, 60, 3):
        save_arrays(tmp_path / "mine.npz", images=IMAGES, labels=LABELS)
        damage(tmp_path / "mine.npz", at)
        try:
            images, _ = read_arrays(tmp_path / "mine.npz")
        except ValueError as error:
            assert "mine.npz" in str(error)
            refused += 1
        else:   # of dates, attributes and the like nothing depends
            assert np.array_equal(images, IMAGES)
    assert 5 < refused < 20
