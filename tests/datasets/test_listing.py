"""Which files are images, of which class and split: the rules of docs/data.md, case by case."""

import re
from collections import Counter

import pytest

from datasets import listing
from datasets.listing import Listing

# name: (paths, what is said of them). The root is called "mine".
CASES = {
    # classes
    "class folders": ("cat/0.png dog/0.png dog/1.png", "train cat 1, dog 2"),
    "one class": ("cat/0.png cat/1.png", "train cat 2"),
    "no folder": ("0.png 1.png", "train mine 2"),
    "folders around classes": ("all/of/cat/0.png all/of/dog/0.png", "train cat 1, dog 1"),
    "sessions of a class": ("cat/s1/0.png cat/s2/0.png dog/s1/0.png", "train cat 2, dog 1"),
    "sessions and loose ones": ("cat/s1/0.png cat/0.png dog/0.png", "train cat 2, dog 1"),
    "classes of classes": ("animals/cat/0.png animals/dog/0.png plants/0.png",
                           "train animals 2, plants 1"),
    "a class named as a set": ("digits/0.png letters/0.png", "train digits 1, letters 1"),
    "a class named as a picture": ("a.png/0.png b/0.png", "train a.png 1, b 1"),
    "classes valid and invalid": ("valid/0.png invalid/0.png", "train invalid 1, valid 1"),
    "an accent as a part of its letter or not": (
        "train/caf\u00e9/0.png test/cafe\u0301/0.png", "train caf\u00e9 1; test caf\u00e9 1"),
    "numbers as classes": ("10/0.png 2/0.png", "train 10 1, 2 1"),
    # splits
    "train and test": ("train/cat/0.png test/cat/0.png test/dog/1.png",
                       "train cat 1; test cat 1, dog 1"),
    "capitals": ("Train/cat/0.png TEST/cat/0.png", "train cat 1; test cat 1"),
    "other words": ("training/cat/0.png testing/cat/0.png", "train cat 1; test cat 1"),
    "splits without classes": ("train/0.png test/1.png", "train mine 1; test mine 1"),
    "splits in a folder": ("photos/train/0.png photos/test/1.png",
                           "train photos 1; test photos 1"),
    "only training": ("train/cat/0.png train/dog/0.png", "train cat 1, dog 1"),
    "only testing": ("test/cat/0.png", "test cat 1"),
    "validation": ("train/cat/0.png Val/cat/0.png Val/cat/1.png",
                   "train cat 1; left out: 2 images of Val"),
    "validation in two folders": (
        "train/a/0.png test/a/0.png valid/a/0.png validation/a/0.png",
        "train a 1; test a 1; left out: 1 image of valid, 1 image of validation"),
    "sessions in splits": ("train/cat/s1/0.png train/cat/s2/0.png test/cat/0.png",
                           "train cat 2; test cat 1"),
    "a logo beside splits": ("train/cat/0.png test/cat/0.png logo.png",
                             "train cat 1; test cat 1; left out: 1 image beside test and train"),
    "loose ones in a split": ("train/cat/0.png train/dog/0.png train/1.png",
                              "train cat 1, dog 1; left out: 1 image beside the class folders"),
    # endings
    "endings": ("a/0.tif a/1.TIFF a/2.jfif a/3.avif a/4.ppm a/5.JPG a/6.webp a/7.jpe a/8.pgm",
                "train a 9"),
    "other files": ("a/0.png a/notes.txt READ.TXT a/0.json",
                    "train a 1; left out: 2 .txt, 1 .json"),
    "unreadable pictures": ("a/0.png a/1.heic a/2.heic a/3.svg",
                            "train a 1; left out: 2 .heic, 1 .svg"),
    "no ending": ("a/0.png a/1 Makefile", "train a 1; left out: 2 files without ending"),
    "endings behind endings": ("a/0.png a/0.png.bak a/1.png~ a/2.tar.gz",
                               "train a 1; left out: 1 .bak, 1 .gz, 1 .png~"),
    "an ending alone": ("a/0.png a/.png b/0.png", "train a 1, b 1; left out: 1 hidden file"),
    # folders without images
    "an empty class": ("cat/0.png dog/1.png owl/",
                       "train cat 1, dog 1; left out: 1 folder without images"),
    "a class of other files": ("cat/0.png dog/1.png owl/a.heic owl/deep/b.heic",
                               "train cat 1, dog 1; left out: 2 .heic, 1 folder without images"),
    "an empty folder in a class": ("cat/0.png cat/new/ dog/1.png",
                                   "train cat 1, dog 1; left out: 1 folder without images"),
    "an empty class in a split": ("train/cat/0.png train/owl/ test/owl/0.png",
                                  "train cat 1; test owl 1; left out: 1 folder without images"),
    "an empty folder beside one class": ("cat/0.png owl/",
                                         "train cat 1; left out: 1 folder without images"),
    # what systems leave
    "hidden files": ("a/0.png a/._0.png .DS_Store a/.b.png", "train a 1; left out: 3 hidden files"),
    "hidden folders": ("a/0.png .git/x .git/y/z.png a/.thumbs/0.png",
                       "train a 1; left out: 2 hidden folders"),
    "a photo manager": ("a/0.png a/@eaDir/0.png/THUMB_M.jpg a/@eaDir/1.png/THUMB_M.jpg",
                        "train a 1; left out: 1 system folder"),
    "copies of network drives": ("a/0.png ~snapshot/a/0.png RECYCLER/1.png",
                                 "train a 1; left out: 2 system folders"),
    "network drives": ("a/0.png @Recycle/1.png #recycle/2.png $RECYCLE.BIN/3.png @tmp/4.png",
                       "train a 1; left out: 4 system folders"),
    "a Mac's zip": ("photos/a/0.png __MACOSX/photos/a/._0.png photos/a/.DS_Store",
                    "train a 1; left out: 1 hidden file, 1 system folder"),
    "a file with an at sign": ("@home.png b.png", "train mine 2"),
    "Windows": ("a/0.png a/Thumbs.db desktop.ini", "train a 1; left out: 1 .db, 1 .ini"),
    # loose pictures
    "loose ones beside classes": (
        "cat/0.png dog/0.png 1.png 2.png",
        "train cat 1, dog 1; left out: 2 images beside the class folders"),
    # what cannot be told
    "a loose one beside one folder": ("cat/0.png 1.png", "refused: 1.png lies beside .* cat/"),
    "a banner beside all": ("data/cat/0.png data/dog/0.png banner.png",
                            "refused: banner.png lies beside .* data/"),
    "one class and loose ones in splits": ("train/cat/0.png train/1.png test/cat/0.png",
                                           "refused: train/1.png lies beside .* cat/"),
    "a folder beside splits": ("train/a/0.png test/a/0.png extra/0.png",
                               "refused: extra/ lies beside test and train"),
    "a class called train": ("train/0.png car/0.png plane/0.png",
                             "refused: car/ lies beside train"),
    "two folders for training": ("Train/a/0.png train/a/0.png", "refused: more than one .* train"),
    "splits below classes": ("cat/train/0.png cat/test/0.png dog/train/0.png",
                             "refused: cat/test/0.png: test/ must stand above"),
    "a split in a split": ("train/train/cat/0.png test/test/cat/0.png",
                           "refused: test/ must stand above"),
    "validation below classes": ("cat/0.png cat/val/0.png dog/0.png",
                                 "refused: cat/val/0.png: val/ must stand above"),
    "years": ("train2017/a/0.png val2017/a/0.png", "refused: train2017/ and val2017/ look like"),
    "sets": ("training_set/a/0.png Test_Set/a/0.png", "refused: training_set/ and Test_Set/ look"),
    "words in front": ("seg_train/a/0.png seg_test/a/0.png seg_pred/0.png", "refused: look like"),
    "words behind": ("asl-Train/a/0.png asl-Test/a/0.png", "refused: look like splits"),
    "sets in one word": ("trainset/a/0.png testset/a/0.png", "refused: look like splits"),
    "a class of trains": ("train_station/0.png airport/0.png", "train airport 1, train_station 1"),
    "a class of rain": ("strained/0.png protests/0.png", "train protests 1, strained 1"),
    "nothing": ("", ""),
    "no picture": ("a/readme.txt", "left out: 1 .txt, 1 folder without images"),
}


def said(found: Listing) -> str:
    """"train cat 1, dog 2; test cat 1; left out: 3 .txt"."""
    parts = []
    for split in ("train", "test"):
        counts = Counter(image.label for image in found.images if image.split == split)
        if counts:
            numbers = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            parts.append(f"{split} {numbers}")
    words = listing.in_words(Counter(reason for _, reason in found.left_out))
    return "; ".join([*parts, *([f"left out: {words}"] if words else [])])


@pytest.mark.parametrize("case", CASES)
def test_every_file_is_an_image_or_left_out(case):
    paths, expected = CASES[case]
    if expected.startswith("refused: "):
        with pytest.raises(ValueError, match=expected.removeprefix("refused: ")):
            listing.list_classes(paths.split(), "mine")
    else:
        assert said(listing.list_classes(paths.split(), "mine")) == expected


# name: (paths, the files that a list names, their splits, what is left out)
NAMED = {
    "some are not named": ("0.png 1.png 2.png list", "0.png", "train", "2 unnamed images"),
    "splits": ("train/0.png Test/1.png list", "train/0.png Test/1.png", "train test", ""),
    "a split above": ("x/TRAINING/y/0.png x/test/1.png list",
                      "x/TRAINING/y/0.png x/test/1.png", "train test", ""),
    "validation": ("train/0.png val/1.png list", "train/0.png val/1.png", "train of val",
                   "1 image of val"),
    "only validation": ("val/1.png list", "val/1.png", "train", ""),
    "named though hidden": (".a/0.png .b.png .c.png list", ".a/0.png .b.png", "train train",
                            "1 hidden file"),
    "named with any ending": ("a.heic b.heic list", "a.heic", "train", "1 .heic"),
    "other lists": ("0.png list labels.csv", "0.png", "train", "1 .csv"),
    "an empty folder": ("0.png list owl/", "0.png", "train", "1 folder without images"),
    "folders like splits": ("my_train/0.png my_test/1.png list", "my_train/0.png my_test/1.png",
                            "refused: my_train/ and my_test/ look like splits", ""),
    "one in no split": ("train/0.png 1.png list", "train/0.png 1.png",
                        "refused: 1.png lies in neither", ""),
    "one in two splits": ("train/test/0.png list", "train/test/0.png",
                          "refused: train/test/0.png lies in two folders of splits", ""),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_list_decides_what_is_an_image(case):
    paths, files, expected, rest = NAMED[case]
    arguments = paths.split(), files.split(), ["list"], "unnamed image{s}"
    if expected.startswith("refused: "):
        with pytest.raises(ValueError, match=expected.removeprefix("refused: ")):
            listing.list_named(*arguments)
        return
    splits, left_out = listing.list_named(*arguments)
    assert " ".join(splits) == expected
    assert listing.in_words(Counter(reason for _, reason in left_out)) == rest


def test_many_reasons_are_cut_short():
    counts = Counter({f".{letter}": number for number, letter in enumerate("abcdefghij", 1)})
    assert listing.in_words(counts, most=3) == "10 .j, 9 .i, 8 .h, 28 others"


def test_thousands_are_said_with_commas():
    words = listing.in_words(Counter({"hidden file{s}": 1, "link{s} to a folder": 12_000}))
    assert re.fullmatch("12,000 links to a folder, 1 hidden file", words)
