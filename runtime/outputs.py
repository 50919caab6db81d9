"""What a program is about to write: it can be written, and nothing else is lost by it."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from runtime.distributed import is_first_process
from runtime.files import array_names, created, partial_name
from runtime.pictures import SOFTWARE

CHECKPOINT = {"architecture", "model", "classes", "config"}   # in every checkpoint
REPORT = {"guarantee", "test_images"}   # the former in each .privacy.json, the latter in --json's


def check_outputs(outputs: Iterable[Path], inputs: Iterable[str | Path] = ()) -> None:
    """ValueError, before any work, for files that a program cannot write or must not replace.

    Each output can be written. No two are one file. None is an input, or lies in a folder that is
    one. What is there already was made by this program, or is empty. inputs: paths, or names of
    data sets, which are no paths.
    """
    sources = [Path(name) for name in inputs if os.path.exists(name)]
    seen: list[Path] = []
    for path in outputs:
        check_no_input(path, sources)
        if any(same_file(path, other) for other in seen):
            raise ValueError(f"{path} would be written twice: give another name")
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is no file: give the name of one")
        if os.path.exists(path) and not is_own(path):
            raise ValueError(f"{path} was not made by this program, and is not replaced: give "
                             "another name, or move it away")
        check_writable(path)
        seen.append(path)


def check_suffix(path: Path | None, suffix: str) -> None:
    """ValueError for a name of another kind of file: a picture must not replace a checkpoint."""
    if path and path.suffix != suffix:
        raise ValueError(f"{path} must be the name of a {suffix} file")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, which need not be there."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def check_no_input(path: Path, sources: list[Path]) -> None:
    """ValueError if `path` is one of the sources, or lies in a folder that is one."""
    places = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent
    folders = {part for place in places for part in (place, *place.parents)}   # of link and file
    for source in sources:
        if same_file(path, source):
            raise ValueError(f"{path} is what this command reads: write to another name")
        if any(same_file(source, part) for part in folders):
            raise ValueError(f"{path} lies in {source}, which is read as data: write elsewhere")


def check_writable(path: Path) -> None:
    """ValueError if no file can be made at `path`. It is tried: permissions do not tell all."""
    if not is_first_process():   # of several processes, only that one will write
        return
    nearest = next(part for part in path.parents if os.path.lexists(part))
    if not os.path.isdir(nearest):
        raise ValueError(f"{path} cannot be written: {nearest} is no folder")
    try:
        real = Path(os.path.realpath(path))
        with created(real.parent):
            partial_name(real).touch()
            partial_name(real).unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def is_own(path: Path) -> bool:
    """Whether the file is empty, or its content says that a program of this project made it."""
    try:
        if not os.path.getsize(path):
            return True
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return content.keys() >= CHECKPOINT
        if path.suffix == ".npz":
            return "origin" in array_names(path)
        if path.suffix == ".png":
            with open(path, "rb") as file:
                return f"tEXtSoftware\0{SOFTWARE}".encode() in file.read(100)
        return bool(json.loads(path.read_text()).keys() & REPORT)
    except Exception:   # other programs' files can fail anywhere in a reader
        return False
