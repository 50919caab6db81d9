"""What a folder or zip holds: each file is an image of a class and a split, or is left out.

Pure functions of paths, which are relative to the root; those of folders end with "/". docs/data.md
has the rules in one table. What is meant cannot be told: ValueError.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from posixpath import splitext
from typing import NamedTuple

ENDINGS = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp",
           ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"}
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
VALIDATION = {"val", "valid", "validation"}
# A hidden file or folder, or a folder of a file system, network drive or photo manager.
HIDDEN = re.compile(r"(?:^|/)(?:(\.[^/]*)|@[^/]*(?=/)|(?:__MACOSX|#recycle|#snapshot|~snapshot"
                    r"|\$RECYCLE\.BIN|RECYCLER|lost\+found|System Volume Information)(?=/))",
                    re.IGNORECASE)

LeftOut = list[tuple[str, str]]   # (path, reason with {s} where its plural has an s)


class Image(NamedTuple):
    """A file, and what it is an image of."""
    file: str
    label: str   # the name of its class
    split: str   # train or test


class Listing(NamedTuple):
    """Every file of a tree: an image, or left out by itself or with a folder around it."""
    images: list[Image]
    left_out: LeftOut


def is_picture(path: str) -> bool:
    return splitext(path)[1].lower() in ENDINGS


def is_hidden(folder: str) -> bool:
    """Whether a folder of this name is never looked into."""
    return HIDDEN.match(f"{folder}/") is not None


def visible(paths: Iterable[str]) -> tuple[list[str], LeftOut]:
    """The paths without hidden parts, sorted; and each hidden file or folder, once."""
    shown, left_out = [], {}
    for path in paths:
        if found := HIDDEN.search(path):
            is_folder = path[found.end():found.end() + 1] == "/"
            reason = ("hidden " if found[1] else "system ") + ("folder{s}" if is_folder else
                                                               "file{s}")
            left_out[path[:found.end() + is_folder]] = reason
        else:
            shown.append(path)
    return sorted(shown), list(left_out.items())


def others(shown: list[str], pictures: list[str], known: Iterable[str] = ()) -> LeftOut:
    """The files that are no pictures, nor `known`; and the outermost folders without pictures."""
    known = {*pictures, *known}
    left_out = [(path, splitext(path)[1].lower() or "file{s} without ending")
                for path in shown if path not in known and path[-1] != "/"]
    full, folders = all_folders(known), all_folders(shown)
    return left_out + [(folder, "folder{s} without images") for folder in sorted(folders - full)
                       if {*folders_of(folder[:-1])} <= full]


def all_folders(paths: Iterable[str]) -> set[str]:
    """The folders around any of the paths; a folder counts itself."""
    innermost = {path[:path.rfind("/") + 1] for path in paths}
    return {folder for path in innermost for folder in folders_of(path)}


def folders_of(path: str) -> Iterator[str]:
    """The folders around a path, from the root down; a folder counts itself."""
    end = path.find("/") + 1
    while end:
        yield path[:end]
        end = path.find("/", end) + 1


# ---- class folders -----------------------------------------------------------------------------

def list_classes(paths: Iterable[str], name: str) -> Listing:
    """The images of class folders, below train/ and test/ or not; name: of the root.

    Folders below a class's belong to it. Pictures without class folders are one class. ValueError
    for train/ or test/ where no split can be, and if all else cannot be told.
    """
    shown, left_out = visible(paths)
    pictures = [path for path in shown if is_picture(path)]
    left_out += others(shown, pictures)
    depth = folders_around(pictures)
    if depth:
        name = pictures[0].split("/")[depth - 1]
    splits = split_folders({path.split("/")[depth] for path in pictures
                            if path.count("/") > depth})
    below = depth + bool(splits)
    candidates = []
    for path in pictures:
        parts = path.split("/")
        split = splits.get(parts[depth], "") if splits else "train"
        if split in ("train", "test"):
            check_below(path, parts[below:-1])
            candidates.append((path, parts[below:-1], split))
        else:
            left_out.append((path, f"image{{s}} {split or 'beside ' + ' and '.join(splits)}"))
    check_loose(candidates)
    flat = not any(folders for _, folders, _ in candidates)
    images = [Image(path, normal(folders[0] if folders else name), split)
              for path, folders, split in candidates if folders or flat]
    return Listing(images, left_out + [(path, "image{s} beside the class folders")
                                       for path, folders, _ in candidates if not (folders or flat)])


def normal(name: str) -> str:
    """One spelling of a class: systems write an accent as a letter's part, or as its own."""
    return unicodedata.normalize("NFC", name)


def folders_around(pictures: list[str]) -> int:
    """How many folders stand around all pictures, one in the other: they say nothing."""
    depth = 0
    while True:
        tops = {path.split("/")[depth] for path in pictures}
        if len(tops) != 1 or tops.pop().lower() in SPLITS or any(
                path.count("/") <= depth for path in pictures):
            return depth
        depth += 1


def split_folders(tops: set[str]) -> dict[str, str]:
    """{folder: train, test or "of FOLDER"} if there is a train/ or test/; empty if there is none.

    tops: the outermost folders that pictures lie in.
    """
    folders = sorted(tops)
    found = {folder: SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS}
    if not found:
        check_lookalikes(folders)
        return {}
    twice = [split for split, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise ValueError(f"it has more than one folder for {twice[0]}: {', '.join(found)}")
    for folder in folders:
        if folder not in found:
            if folder.lower() not in VALIDATION:
                raise ValueError(f"{folder}/ lies beside {' and '.join(found)}: put its images "
                                 "into these, or take it away")
            found[folder] = f"of {folder}"
    return found


def check_lookalikes(folders: Iterable[str]) -> None:
    """ValueError if folders look like those of splits: train2017 and val2017, Training_Data and so.

    One of them alone may be a class: train_station.
    """
    def looks_like(words: str) -> list[str]:
        pattern = re.compile(rf"(?:{words})|.*(?:{words})(?:ing|set)*[^a-z]*$", re.IGNORECASE)
        return sorted(folder for folder in folders if pattern.match(folder))

    folders = {*folders}
    train, test = looks_like("train"), looks_like("test|val")
    if train and test:
        raise ValueError(f"{train[0]}/ and {test[0]}/ look like splits: call them train/ and "
                         "test/, or otherwise if they are classes")


def check_below(path: str, folders: list[str]) -> None:
    """ValueError if a class, or a folder of it, has the name of a split."""
    for position, folder in enumerate(folders):
        if folder.lower() in SPLITS or position and folder.lower() in VALIDATION:
            raise ValueError(f"{path}: {folder}/ must stand above the class folders, and once: is "
                             "it a split or a class?")


def check_loose(candidates: list[tuple[str, list[str], str]]) -> None:
    """ValueError if pictures lie beside a single folder: is it a class, or is all in it?"""
    tops = {folders[0] for _, folders, _ in candidates if folders}
    loose = [path for path, folders, _ in candidates if not folders]
    if len(tops) == 1 and loose:
        raise ValueError(f"{loose[0]} lies beside the only folder, {tops.pop()}/: put all images "
                         "into class folders, or none")


# ---- a list of files ---------------------------------------------------------------------------

def list_named(paths: Iterable[str], files: list[str], known: Iterable[str],
               reason: str) -> tuple[list[str], LeftOut]:
    """The split of each of `files`, which a list names; and what of the tree is left out.

    known: the lists themselves. reason: why pictures are left out that no list names. ValueError as
    of `split_of`, and for files outside train/ and test/ where there are such folders.
    """
    shown, left_out = visible(paths)
    named = {*files}
    around = named | all_folders(named)   # a list may name what is hidden
    left_out = [(path, why) for path, why in left_out if path not in around]
    pictures = [path for path in shown if path in named or is_picture(path)]
    left_out += others(shown, pictures, known)
    left_out += [(path, reason) for path in pictures if path not in named]
    splits = [split_of(file) for file in files]
    if not any(split in ("train", "test") for split in splits):
        check_lookalikes(folder for file in files for folder in file.split("/")[:-1])
        return ["train"] * len(files), left_out
    if "" in splits:
        raise ValueError(f"{files[splits.index('')]} lies in neither train/ nor test/, but other "
                         "images do")
    left_out += [(file, f"image{{s}} {split}") for file, split in zip(files, splits, strict=True)
                 if split.startswith("of ")]
    return splits, left_out


def split_of(file: str) -> str:
    """train, test or "of FOLDER" by a folder around the file; empty if none is a split's.

    ValueError for two such folders.
    """
    folders = file.split("/")[:-1]
    found = [SPLITS.get(folder.lower(), f"of {folder}") for folder in folders
             if folder.lower() in SPLITS or folder.lower() in VALIDATION]
    if len(found) > 1:
        raise ValueError(f"{file} lies in two folders of splits")
    return found[0] if found else ""


# ---- words -------------------------------------------------------------------------------------

def words(count: int, reason: str) -> str:
    """"3 hidden files": {s} and {es} in the reason are endings of the plural."""
    for ending in ("s", "es"):
        reason = reason.replace(f"{{{ending}}}", "" if count == 1 else ending)
    return f"{count:,} {reason}"


def in_words(left_out: Counter[str], most: int = 12) -> str:
    """"3 .txt, 1 hidden folder": numbers and reasons, the largest first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [words(count, reason) for reason, count in ordered[:most]]
    if rest := sum(count for _, count in ordered[most:]):
        parts.append(words(rest, "other{s}"))
    return ", ".join(parts)
