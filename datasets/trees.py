"""All files below a folder or in a zip, by the same names. Nothing is unpacked to the disk."""

import os
import posixpath
import stat
import zipfile
from collections.abc import Callable, Iterable
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
    has_links: bool = False

    def read(self, name: str) -> bytes:
        """The content of a file. ValueError naming it if that cannot be had."""
        try:
            return self.content(name)
        except (*UNREADABLE, RuntimeError) as error:
            missing = isinstance(error, FileNotFoundError | KeyError)
            raise ValueError(f"cannot read {name} of {self.root}: "
                             f"{'there is none' if missing else error}") from error

    def check_links(self, files: Iterable[str]) -> None:
        """ValueError if links lead to one of these files in two ways."""
        places: dict[str, str] = {}
        for name in files if self.has_links else ():
            place = os.path.realpath(self.root / name)
            if places.setdefault(place, name) != name:
                raise ValueError(f"{name} and {places[place]} of {self.root} are one file: it "
                                 "would count twice, but privacy is promised for one example")

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
    """A folder; links are followed."""
    def content(name: str) -> bytes:
        check_size((root / name).stat().st_size)
        return (root / name).read_bytes()

    tree, todo = Tree(root, [], content), [("", (os.path.realpath(root),))]
    while todo:
        folder, around = todo.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name, is_link = folder + entry.name, entry.is_symlink()
                tree.has_links |= is_link
                if os.path.isdir(entry.path):
                    real = os.path.realpath(entry.path)
                    if real in around:
                        tree.left_out.append((f"{name}/", "link{s} to a folder around it"))
                        continue
                    tree.names.append(f"{name}/")
                    if not listing.is_hidden(entry.name):
                        todo.append((f"{name}/", (*around, real)))
                elif os.path.isfile(entry.path):
                    tree.names.append(name)
                else:
                    tree.left_out.append((name, "broken link{s}" if is_link else "special file{s}"))
    return tree


def open_zip(root: Path) -> Tree:
    """A zip; of several files of one name it has the last."""
    archive, members, left_out = zipfile.ZipFile(root), {}, []

    def content(name: str) -> bytes:
        return read_member(archive, members[name])

    for member in archive.infolist():
        slashes = spelled(member).replace("\\", "/")   # as Windows writes them
        name = posixpath.normpath(slashes).lstrip("/") + "/" * slashes.endswith("/")
        if name == "./":   # the root itself
            continue
        if stat.S_ISLNK(member.external_attr >> 16):
            left_out.append((name, "link{s} in the zip"))
            continue
        if name in members and name[-1] != "/":
            left_out.append((name, "repeated name{s}"))
        members[name] = member
    return Tree(root, list(listing.all_folders(members).union(members)), content, left_out)


def spelled(member: zipfile.ZipInfo) -> str:
    """The name of a file in a zip. Macs write UTF-8 and do not say so: it is read as cp437 then."""
    try:
        says_so = member.flag_bits & 0x800
        return member.filename if says_so else member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename
