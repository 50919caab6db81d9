"""Files that are whole or absent, and arrays in them."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runtime.distributed import is_first_process

# What readers of arrays, zips, tars and compressed bytes raise when a file is damaged.
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, NotImplementedError, struct.error,
              zlib.error, zipfile.BadZipFile, tarfile.TarError)


@contextmanager
def atomic_write(path: Path, on_commit: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write `path` into: at every moment `path` is absent, old, or new and whole.

    on_commit is called when the new file is complete on the disk and has yet to replace the old
    one. Only the first of torchrun's processes writes.
    """
    if not is_first_process():
        yield io.BytesIO()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        on_commit()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz of the named arrays."""
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path, names: Sequence[str] = ("images", "labels")) -> list[np.ndarray]:
    """The named arrays of an .npz. ValueError naming the file if it lacks them or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except UNREADABLE as error:
        wanted = " and ".join(names)
        raise ValueError(f"{path} is no readable .npz of {wanted}: {error}") from error


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an .npz. ValueError naming the file if it is unreadable."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays.files
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable .npz: {error}") from error
