"""Random trees of files: whatever a folder or zip holds is trained on, or a line says what is not.

    pytest tests/datasets/test_random_trees.py --trees 10000
"""

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from small_files import plain, write, zipped

from datasets import folders, listing, load

FOLDERS = ["cat", "dog", "Cat", "caf\u00e9", "cafe\u0301", "\u732b", "a b", "10", "2", "x.png",
           "train", "Train", "test", "TESTING", "val", "Validation", "valid", "digits", "photos",
           "@eaDir", "__MACOSX", "#recycle", ".git", "lost+found", "empty", "-rf", "~", "a{s}",
           "line\nbreak", "n" * 200]
FILES = ["0.png", "1.PNG", "2.jpeg", "3.tif", "4.ppm", "5.jfif", "6.avif", "7.GIF", "train.png",
         ".8.png", "._9.png", ".DS_Store", "Thumbs.db", "notes.txt", "READ.TXT", "ending", "a.heic",
         "0.png.bak", "x.png~", "\u732b.webp", "caf\u00e9.bmp", " .png", "test", "val", "a..png",
         "metadata.csv", "0.0.0", "%s.png", "{s}.png", "*.png", "?.png", "-.png"]
PICTURES = [plain(level, (1, 1)) for level in range(256)]   # readable whatever their ending


def random_tree(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """(at most 60 files, at most 9 folders that hold none): paths, no file named as a folder."""
    around = [""]
    for _ in range(rng.integers(9)):
        around.append(f"{rng.choice(around)}{rng.choice(FOLDERS)}/")
    few = rng.choice(around, max(1, len(around) // 2))   # some others stay empty
    files = {f"{rng.choice(few)}{rng.choice(FILES)}" for _ in range(rng.integers(1, 60))}
    files = {file for file in files if f"{file}/" not in around}
    return sorted(files), sorted({*around[1:]} - {f for file in files for f in
                                                  listing.folders_of(file)})


def outcome(source: Path) -> Iterator[object]:
    """Levels, labels, classes and what is left out of both splits; or why they are refused."""
    for split in ("train", "test"):
        try:
            found = load(str(source), split, image_size=1)
            yield (found.images.ravel().tolist(), found.labels.tolist(), found.classes,
                   found.left_out)
        except ValueError as error:
            yield str(error).replace(str(source), "SOURCE")


def accounted(found: listing.Listing, files: list[str]) -> Counter:
    """How often each of the files is an image, or left out by itself or with a folder around it."""
    left_out = Counter(path for path, _ in found.left_out)
    images = Counter(image.file for image in found.images)
    return Counter({file: images[file] + left_out[file] + sum(
        left_out[folder] for folder in listing.folders_of(file) if listing.is_hidden(
            folder.rstrip("/").rpartition("/")[2])) for file in files})


def check_tree(files: list[str], empty: list[str], root: Path) -> str:
    """AssertionError if a file is lost; returns whether the tree is loaded or refused."""
    levels = dict(zip(files, itertools.cycle(range(256))))
    contents = {file: PICTURES[level] for file, level in levels.items()}
    folder, archive = root / "images", root / "images.zip"
    write(contents, folder)
    for name in empty:
        (folder / name).mkdir(parents=True, exist_ok=True)
    archive.write_bytes(zipped({**contents, **dict.fromkeys(empty, b"")}))
    train, test = outcome(folder)
    assert [train, test] == list(outcome(archive))   # by the same code
    try:
        found = listing.list_classes(folders.open_tree(folder).names, "images")
    except ValueError as error:
        assert train == test == f"SOURCE: {error}"
        return "refused"
    assert accounted(found, files) == dict.fromkeys(files, 1)
    for split, other, result in (("train", "test", train), ("test", "train", test)):
        numbers = Counter(reason for _, reason in found.left_out)
        if others := sum(image.split == other for image in found.images):
            numbers[f"{other} image{{s}}"] = others
        chosen = [image for image in found.images if image.split == split]
        if not chosen:
            assert f"no images for {split}" in result
            assert listing.in_words(numbers) in result
            continue
        images, labels, classes, left_out = result
        assert images == [levels[image.file] for image in chosen]
        assert [classes[label] for label in labels] == [image.label for image in chosen]
        assert left_out == numbers
    return "loaded" if found.images else "empty"


def test_no_file_of_a_random_tree_is_lost(request, tmp_path):
    outcomes = Counter()
    for seed in range(request.config.getoption("--trees")):
        files, empty = random_tree(np.random.default_rng(seed))
        outcomes[check_tree(files, empty, tmp_path)] += 1
        shutil.rmtree(tmp_path / "images")
    assert min(outcomes["loaded"], outcomes["refused"]) > 0.1 * outcomes.total()
