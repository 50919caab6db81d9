"""All files below a folder or in a zip, by the same names. Nothing is unpacked to the disk."""

import os
import posixpath
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import listing
from datasets.formats import check_size, read_member
from datasets.listing import LeftOut
from runtime.files import UNREADABLE


@dataclass
class Tree:
    """All files below a folder or in a zip; of hidden folders the name alone."""
    root: Path
    names: list[str]                 # paths below the root; those of folders end with "/"
    content: Callable[[str], bytes]
    left_out: LeftOut = field(default_factory=list)   # what is no readable file at all

    def read(self, name: str) -> bytes:
        """The content of a file. ValueError naming it if that cannot be had."""
        try:
            return self.content(name)
        except (*UNREADABLE, RuntimeError) as error:
            missing = isinstance(error, FileNotFoundError | KeyError)
            raise ValueError(f"cannot read {name} of {self.root}: "
                             f"{'there is none' if missing else error}") from error

    def lines(self, name: str) -> list[str]:
        """A text file's lines, in UTF-8. ValueError naming it if it is damaged."""
        try:
            return self.read(name).decode("utf-8-sig").split("\n")
        except UnicodeError as error:
            raise ValueError(f"cannot read {name} of {self.root}: {error}") from error


def open_tree(root: Path) -> Tree:
    """The files of a folder or a zip. ValueError naming it if it is neither, or unreadable."""
    try:
        return open_zip(root) if root.is_file() else open_folder(root)
    except UNREADABLE as error:
        raise ValueError(f"{root} is no readable folder or zip: {error}") from error


def open_folder(root: Path) -> Tree:
    """A folder; links are followed. ValueError for a picture that two links lead to."""
    def content(name: str) -> bytes:
        check_size((root / name).stat().st_size)
        return (root / name).read_bytes()

    tree, places, todo = Tree(root, [], content), {}, [("", (os.path.realpath(root),))]
    while todo:
        folder, around = todo.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name, real = folder + entry.name, os.path.join(around[-1], entry.name)
                if entry.is_symlink():
                    real = os.path.realpath(real)
                if entry.is_dir():
                    if real in around:
                        tree.left_out.append((f"{name}/", "link{s} to a folder around it"))
                        continue
                    tree.names.append(f"{name}/")
                    if not listing.is_hidden(entry.name):
                        todo.append((f"{name}/", (*around, real)))
                elif not entry.is_file():
                    kind = "broken link{s}" if entry.is_symlink() else "special file{s}"
                    tree.left_out.append((name, kind))
                elif places.setdefault(real, name) != name and listing.is_picture(name):
                    raise ValueError(f"{name} and {places[real]} are one file: it would count "
                                     "twice, but privacy is promised for one example")
                else:
                    tree.names.append(name)
    return tree


def open_zip(root: Path) -> Tree:
    """A zip; of several files of one name it has the last."""
    archive, members, left_out = zipfile.ZipFile(root), {}, []

    def content(name: str) -> bytes:
        return read_member(archive, members[name])

    for member in archive.infolist():
        slashes = member.filename.replace("\\", "/")   # as Windows writes them
        name = posixpath.normpath(slashes).lstrip("/") + "/" * slashes.endswith("/")
        if stat.S_ISLNK(member.external_attr >> 16):
            left_out.append((name, "link{s} in the zip"))
            continue
        if name in members and name[-1] != "/":
            left_out.append((name, "repeated name{s}"))
        members[name] = member
    return Tree(root, list(listing.all_folders(members).union(members)), content, left_out)
