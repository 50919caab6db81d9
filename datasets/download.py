"""Fetches published data sets: resumable, verified, from the publisher's address or a mirror.

`get(NAME, DATA_DIR)` puts the files into DATA_DIR/NAME. A file has its own name only when all of it
is there and verified. Until then it is FILE.partial, with which the next attempt goes on.
"""

import hashlib
import os
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm


class Files(NamedTuple):
    """Where a data set lies, and every file's size in bytes and MD5.

    Each address is followed by the file's name.
    """
    addresses: tuple[str, ...]
    files: dict[str, tuple[int, str]]


# MD5 of mnist, emnist-letters and svhn: torchvision. MD5 of the others: the publishers' pages.
# Sizes: the publishers' pages; of emnist-letters: TensorFlow Datasets.
PUBLISHED = {
    "mnist": Files(   # torchvision's mirror comes first
        ("https://ossci-datasets.s3.amazonaws.com/mnist/",
         "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {"train-images-idx3-ubyte.gz": (9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
         "train-labels-idx1-ubyte.gz": (28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
         "t10k-images-idx3-ubyte.gz": (1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
         "t10k-labels-idx1-ubyte.gz": (4_542, "ec29112dd5afa0611ce80d1b7f02629c")}),
    "fashion-mnist": Files(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
         "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
        {"train-images-idx3-ubyte.gz": (26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
         "train-labels-idx1-ubyte.gz": (29_515, "25c81989df183df01b3e8a0aad5dffbe"),
         "t10k-images-idx3-ubyte.gz": (4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
         "t10k-labels-idx1-ubyte.gz": (5_148, "bb300cfdad3c16e7a12a480ee83cd310")}),
    "emnist-letters": Files(   # the zip holds EMNIST's other sets too
        ("https://biometrics.nist.gov/cs_links/EMNIST/",
         "https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/"),
        {"gzip.zip": (561_753_746, "58c8d27c78d21e728a6bc7b3cc06412e")}),
    "svhn": Files(
        ("http://ufldl.stanford.edu/housenumbers/",),
        {"train_32x32.mat": (182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
         "test_32x32.mat": (64_275_384, "eb5a983be6a315427106f1b164d9cef3")}),
    "cifar10": Files(
        ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
        {"cifar-10-binary.tar.gz": (170_052_171, "c32a1d4ab5d03f1284b67883e8d87530")}),
    "cifar100": Files(
        ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
        {"cifar-100-binary.tar.gz": (168_513_733, "03b5dce01913d631647c71ecec9e9cb8")}),
}
# Sets behind a login or an agreement: where to get them, and which files to put into DATA_DIR/NAME.
BY_HAND = {
    "celeba":
        "accept the agreement at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put "
        "img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt",
    "celebahq":
        "accept the agreement at https://github.com/IIGROUP/MM-CelebA-HQ-Dataset and put the "
        "folders CelebA-HQ-img and celeba-caption (or any images with a metadata.jsonl)",
    "imagenet32":
        "log in at https://image-net.org/download-images and put the unzipped files of "
        "Imagenet32_train_npz.zip and Imagenet32_val_npz.zip",
    "imagenet64":
        "log in at https://image-net.org/download-images and put the unzipped files of "
        "Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and "
        "Imagenet64_val_npz.zip",
}
NAMES = (*PUBLISHED, *BY_HAND)


def folder_of(name: str, data_dir: str | Path) -> Path:
    """DATA_DIR/NAME; if DATA_DIR is another named set's folder, NAME beside it."""
    root = Path(data_dir)
    return (root.parent if root.name in NAMES else root) / name


def size_of(path: Path) -> int:
    """A file's size in bytes; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def mismatch(path: Path, size: int, checksum: str) -> str | None:
    """What is wrong with a file that should have this size in bytes and this MD5 or SHA-256.

    None if nothing is wrong.
    """
    if size_of(path) != size:
        return f"{size_of(path):,} bytes instead of {size:,}"
    with open(path, "rb") as file:
        kind = "MD5" if len(checksum) == 32 else "SHA256"
        found = hashlib.file_digest(file, kind).hexdigest()
    return None if found == checksum else f"{kind} {found} instead of {checksum}"


def transfer(address: str, partial: Path, size: int, timeout: float) -> None:
    """Append to `partial` what it still lacks, or fetch all if the server knows no HTTP Range.

    OSError or HTTPException if the server refuses, offers another size, stalls for `timeout`
    seconds or ends early; what has arrived is kept.
    """
    start = size_of(partial)
    if start == size:
        return
    headers = {"User-Agent": "dp-ldm", **({"Range": f"bytes={start}-"} if start else {})}
    with urlopen(Request(address, headers=headers), timeout=timeout) as response:
        start = agreed_start(response, start, size)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab" if start else "wb") as file, tqdm(
                desc=partial.stem, total=size, initial=start, unit="B", unit_scale=True) as bar:
            while block := response.read1(1 << 16):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if size_of(partial) < size:
        raise OSError(f"the connection ended after {size_of(partial):,} of {size:,} bytes")


def agreed_start(response: HTTPResponse, asked: int, size: int) -> int:
    """Where the answer starts in the file: at the byte asked for, or at 0 without ranges.

    OSError if it starts elsewhere or does not end at `size`.
    """
    resumed = response.status == 206
    told = response.headers.get("Content-Range", "")
    if resumed and not told.startswith(f"bytes {asked}-"):
        raise OSError("the server sent another part of the file than it was asked for")
    start = asked if resumed else 0
    length = response.headers.get("Content-Length")
    if length is not None and int(length) + start != size:
        raise OSError(f"the server offers {int(length) + start:,} bytes instead of {size:,}")
    return start


def fetch(path: Path, addresses: list[str], size: int, checksum: str,
          timeout: float = 20.0) -> None:
    """Download `path` from the first of the addresses that delivers it.

    The file has to have the given size and checksum. A transfer that stalls or breaks off is taken
    up where it stopped, as long as something arrives each time; else it is the next address's turn.
    All have two turns. ValueError with the last problem if none delivers.
    """
    partial = path.with_name(path.name + ".partial")
    problem = ""
    for address in [*addresses] * 2:
        while True:
            start = size_of(partial)
            try:
                transfer(address, partial, size, timeout)
                if not (wrong := mismatch(partial, size, checksum)):
                    os.replace(partial, path)
                    return
                problem = f"{address}: {wrong}"
            except (OSError, HTTPException) as error:
                problem = f"{address}: {error}"
                if size_of(partial) > start:
                    continue
                if not (isinstance(error, HTTPError) and error.code == 416):
                    break
            partial.unlink(missing_ok=True)   # it is wrong, or longer than what the server has
            break
    raise ValueError(problem)


def get(name: str, data_dir: str | Path, timeout: float = 20.0) -> Path:
    """Download the files of a published data set that are not there yet; returns their folder.

    ValueError with the addresses and the folder if that is impossible, and if a file is there that
    is not the published one: nothing is overwritten.
    """
    folder = folder_of(name, data_dir)
    if name in BY_HAND:
        raise ValueError(f"{name} is not for programs to fetch: {BY_HAND[name]} into {folder}")
    if name not in PUBLISHED:
        raise ValueError(f"unknown data set {name!r}: give one of {', '.join(NAMES)}")
    addresses, files = PUBLISHED[name]
    for file, (size, md5) in files.items():
        path = folder / file
        if not path.exists():
            try:
                fetch(path, [address + file for address in addresses], size, md5, timeout)
            except ValueError as error:
                missing = ", ".join(f for f in files if not (folder / f).exists())
                raise ValueError(f"cannot fetch {name} ({error}); get {missing} from "
                                 f"{' or '.join(addresses)} and put into {folder}, or try again "
                                 "later") from error
        elif wrong := mismatch(path, size, md5):
            raise ValueError(f"{path} is there, but is not the published file ({wrong}): it is "
                             "left as it is; move it away to fetch the published one")
    return folder
