"""Small files in exactly the publishers' formats, as bytes; and what reading them takes."""

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image


def write(files: dict[str, bytes], root: Path) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def plain(colour, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """An image file of one colour; size is (height, width)."""
    return encoded(np.full((*size, *np.shape(colour)), colour, np.uint8), kind)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """As yann.lecun.com/exdb/mnist describes: 0 0 kind rank, big-endian sizes, bytes."""
    head = struct.pack(f">4B{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def svhn(images: np.ndarray, labels: list[int]) -> bytes:
    """X [H, W, 3, N] and y [N, 1], where 10 stands for 0."""
    file = io.BytesIO()
    arrays = {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
    scipy.io.savemat(file, arrays, do_compression=True)
    return file.getvalue()


def cifar(images: np.ndarray, *labels: list[int]) -> bytes:
    """Records: the labels, then red, green, blue; each row by row."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    columns = [np.array(column, np.uint8)[:, None] for column in labels]
    return np.concatenate([*columns, planes], 1).tobytes()


def imagenet(images: np.ndarray, labels: list[int]) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return npz(data=planes, labels=np.array(labels), mean=np.zeros(planes.shape[1]))


def mnist(images: np.ndarray, labels: list[int], prefix: str = "train") -> dict[str, bytes]:
    """The two gzipped files of a split."""
    return {f"{prefix}-images-idx3-ubyte.gz": gzip.compress(idx(images)),
            f"{prefix}-labels-idx1-ubyte.gz": gzip.compress(idx(np.array(labels)))}


def metadata(*entries: dict) -> bytes:
    """The lines of a metadata.jsonl."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    return "".join(lines).encode()


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that a call takes at most."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
