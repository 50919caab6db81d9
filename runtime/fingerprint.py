"""Which images a run is given, by their content: one set may have many names.

A checkpoint holds the digest of its public images. The digest of private images is keyed. It stays
with its key in the user's state folder until the run ends: whoever had both could test a guess.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from runtime.distributed import is_first_process

# What a missing, closed or damaged state file raises; RuntimeError: the user has no home.
NO_STATE = (OSError, RuntimeError, ValueError, KeyError, TypeError)


def each_digest(images: Iterable[np.ndarray]) -> list[bytes]:
    """SHA-256 of each image, uint8 [H, W, C]."""
    return [hashlib.sha256(np.ascontiguousarray(image)).digest() for image in images]


def set_digest(digests: list[bytes]) -> str:
    """One digest of all images, in whatever order, from `each_digest`."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def keyed_digest(key: bytes, dataset: object, digests: list[bytes]) -> str:
    """HMAC-SHA256 of a Dataset's images, labels and captions in their order.

    digests: `each_digest` of the images.
    """
    mac = hmac.new(key, repr(dataset.images.shape).encode(), "sha256")
    captions = dataset.captions or [None] * len(digests)
    for digest, label, text in zip(digests, dataset.labels.tolist(), captions, strict=True):
        mac.update(digest + repr((label, text)).encode())
    return mac.hexdigest()


def new_handle() -> str:
    """A random name of a run, which tells nothing else of it."""
    return secrets.token_hex(16)


def handle_of(unfinished: Path) -> str:
    """The name that an interrupted run saved; "" if there is none."""
    try:
        content = torch.load(unfinished, map_location="cpu", weights_only=True, mmap=True)
        return str(content["training"]["handle"])
    except Exception:   # damaged bytes can fail anywhere in torch's reader
        return ""


def state_file(handle: str) -> Path:
    """Where key and digest lie while the run can be resumed: on this machine, wherever it moves."""
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(folder, "dp-ldm", f"{hashlib.sha256(handle.encode()).hexdigest()}.json")


def can_check(handle: str) -> bool:
    """Whether `keep_data` can tell the private data of this run from all others."""
    try:
        return bool(read_state(handle))
    except NO_STATE:
        return False


def read_state(handle: str) -> tuple[bytes, str]:
    """(key, digest) of a run. One of NO_STATE if they are not here."""
    content = json.loads(state_file(handle).read_text())
    return bytes.fromhex(content["key"]), content["digest"]


def keep_data(unfinished: Path, handle: str, dataset: object, digests: list[bytes],
              resumed: bool) -> None:
    """Remember the private data of a new run; ValueError if a resumed one was begun with others.

    digests: `each_digest` of their images. Prints a line where that cannot be done. Under torchrun
    the first process does it for all.
    """
    if not is_first_process():
        return
    if resumed:
        check(unfinished, handle, dataset, digests)
    else:
        remember(unfinished, handle, dataset, digests)


def remember(unfinished: Path, handle: str, dataset: object, digests: list[bytes]) -> None:
    """Write key and digest of a new run's data, for its user's eyes only."""
    forget(unfinished)
    unfinished.unlink(missing_ok=True)   # an earlier run's, which was begun with other data
    key = secrets.token_bytes(32)
    content = {"run": str(unfinished), "key": key.hex(),
               "digest": keyed_digest(key, dataset, digests)}
    try:
        path = state_file(handle)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            json.dump(content, file)
    except NO_STATE as error:
        print(f"--resume will not notice if the private data change: {error}")


def check(unfinished: Path, handle: str, dataset: object, digests: list[bytes]) -> None:
    """ValueError if the data are not those that the run in `unfinished` was begun with."""
    try:
        key, digest = read_state(handle)
    except NO_STATE as error:
        print(f"whether the private data have changed could not be checked: {error}")
        return
    if keyed_digest(key, dataset, digests) != digest:
        raise ValueError(f"{unfinished} was begun with other images, labels or captions: the data "
                         "have changed")


def forget(unfinished: Path) -> None:
    """Delete key and digest of the run in `unfinished`: there will be nothing left to resume."""
    with suppress(*NO_STATE):
        state_file(handle_of(unfinished)).unlink()
