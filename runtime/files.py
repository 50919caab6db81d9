"""Files that are whole or absent, locks on them, and arrays in them."""

import fcntl
import glob
import io
import math
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runtime.distributed import is_first_process

# What readers of arrays, zips, tars and compressed bytes raise when a file is damaged.
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, NotImplementedError,
              RecursionError, struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError)


@contextmanager
def atomic_write(path: Path, on_commit: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write `path` into: at every moment `path` is absent, old, or new and whole.

    on_commit is called when the new file is complete on the disk and has yet to replace the old
    one. A link stays: the file that it leads to is written. Only the first of torchrun's processes
    writes. OSError naming the file if the disk is full.
    """
    if not is_first_process():
        yield io.BytesIO()
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    partial = partial_name(path)
    with Disk(partial, "wb") as disk:
        try:
            with io.BufferedWriter(disk) as file:
                yield file
                file.flush()
                disk.sync()
            on_commit()
            os.replace(partial, path)
        except Exception as error:   # of any type: torch.save hides the system's
            if disk.failure is None:
                raise
            raise OSError(f"{path} cannot be written: {disk.failure.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)


class Disk(io.FileIO):
    """A file to write that remembers why the system refused."""
    failure: OSError | None = None

    def write(self, data: object) -> object:
        return self.remembering(super().write, data)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        self.remembering(os.fsync, self.fileno())

    def remembering(self, call: Callable, argument: object) -> object:
        try:
            return call(argument)
        except OSError as error:
            self.failure = error
            raise


def partial_name(path: Path) -> Path:
    """Where this process puts what is to become `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def remove_leftovers(path: Path) -> None:
    """Delete what killed writers of `path` left: partial files of processes that are no more."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        pid = partial.name[len(path.name) + 1:-len(".partial")]
        if pid.isdecimal() and not is_alive(int(pid)):
            partial.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number, whoever's it is."""
    try:
        os.kill(pid, 0)   # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process can lock `path`. ValueError if one has locked it already.

    The lock is on an empty file beside it; the system frees the lock when its process dies. A file
    of that name that is not empty is somebody's: ValueError. Under torchrun the first process locks
    for all.
    """
    if not is_first_process():
        yield
        return
    real = Path(os.path.realpath(path))   # two links to one file are one
    beside = real.with_name(f"{real.name}.lock")
    with created(beside.parent), open_locked(beside):
        try:
            yield
        finally:   # before the lock is freed: whoever locks the deleted file notices
            beside.unlink(missing_ok=True)


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """Inside, `folder` is there. Folders that are made for it go at the end if they are empty."""
    made = [part for part in (folder, *folder.parents) if not os.path.exists(part)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for part in made:
                part.rmdir()


def open_locked(path: Path) -> BinaryIO:
    """The file `path`, opened and locked until it is closed. ValueError if that is impossible."""
    while True:
        file = open(path, "ab")
        try:
            if os.fstat(file.fileno()).st_size:
                raise OSError(f"{path} is not empty, so it is no lock of this program")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samefile(path, file.fileno()):
                return file
        except FileNotFoundError:   # the one who had locked it has just deleted it
            pass
        except OSError as error:
            file.close()
            reason = "another run is making it" if isinstance(error, BlockingIOError) else error
            raise ValueError(f"cannot lock {path.with_suffix('')}: {reason}") from error
        file.close()


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz of the named arrays."""
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path, names: Sequence[str] = ("images", "labels")) -> list[np.ndarray]:
    """The named arrays of an .npz. ValueError naming the file if it lacks them or is damaged."""
    with reading(path, f".npz of {' and '.join(names)}"), np.load(path) as arrays:
        found = [arrays[name] for name in names]
        if not all(isinstance(array, np.ndarray) for array in found):   # a file of another kind
            raise ValueError("some of it is no array")
        return found


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an .npz. ValueError naming the file if it is unreadable."""
    with reading(path, ".npz"), np.load(path) as arrays:
        return arrays.files


def array_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in an .npz; its numbers are not read. ValueError as above."""
    with (reading(path, f".npz of {name}"), zipfile.ZipFile(path) as archive,
          archive.open(f"{name}.npy") as file):
        shape, _, dtype = read_header(file)
        return shape, dtype


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the first index runs fastest, type) of an .npy; the numbers come next."""
    formats = np.lib.format
    first = formats.read_magic(file) == (1, 0)
    return (formats.read_array_header_1_0 if first else formats.read_array_header_2_0)(file)


def map_array(path: Path, name: str) -> np.ndarray | None:
    """An array of an .npz, mapped into memory; None if the file holds it compressed.

    The system reads its pages when they are used, and forgets them when it needs the memory. What
    is written into the array does not reach the file. ValueError as above.
    """
    with reading(path, f".npz of {name}"), zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(member) as file:
            shape, column_major, dtype = read_header(file)
            head = file.tell()
            if head + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{name} has not as many bytes as its header says")
            while file.read(2**24):   # to the end, where zipfile compares the check sum
                pass
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)   # lengths of the name and of more, before the content
        start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + head
    return np.asarray(np.memmap(path, dtype, "c", start, shape, "F" if column_major else "C"))


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Inside, whatever goes wrong is a ValueError that names the file."""
    try:
        yield
    except Exception as error:   # damaged bytes can fail anywhere in numpy's reader
        raise ValueError(f"{path} is no readable {kind}: {error}") from error
