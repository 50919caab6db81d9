"""Images that are made when they are indexed: a set may be larger than the memory.

A set of at most LARGE bytes is made at once and stays in memory. Threads make several images
together, as Pillow and the disk let others work meanwhile.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

LARGE = 2**29   # bytes of images that stay in memory
THREADS = torch.get_num_threads()   # as many as there are cores, or OMP_NUM_THREADS
POOL = ThreadPoolExecutor(THREADS)
PIECE = 16      # images that a thread makes at a time


def fits(shape: tuple[int, ...]) -> bool:
    """Whether images uint8 of this shape stay in memory."""
    return math.prod(shape) <= LARGE


class Images:
    """Images uint8 [N, H, W, C]; make(k) makes the k-th, whenever it is asked for.

    They are indexed by their number alone: an int, a slice, or an array of ints or bools, which
    gives an array. No array of all is made unless [:] asks for it. Errors are those of make, and
    IndexError.
    """
    dtype = np.dtype(np.uint8)

    def __init__(self, make: Callable[[int], np.ndarray], shape: tuple[int, ...]):
        self.make, self.shape = make, shape
        self.numbers = np.arange(shape[0])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        chosen = self.numbers[index]
        if not chosen.ndim:
            return self.make(int(chosen))
        return self.read(chosen.ravel().tolist()).reshape(*chosen.shape, *self.shape[1:])

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), PIECE * THREADS):
            yield from self[start:start + PIECE * THREADS]

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("these images may be larger than the memory: index them in parts")

    def read(self, numbers: list[int], title: str = "") -> np.ndarray:
        """The images of these numbers, with a progress bar if it has a title and they take long."""
        found = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        size = max(1, min(PIECE, len(numbers) // THREADS))   # two images are two threads' work

        def fill(start: int) -> int:
            piece = numbers[start:start + size]
            for place, k in enumerate(piece, start):
                found[place] = self.make(k)
            return len(piece)

        in_order = POOL.map if THREADS > 1 else map   # an error cancels what has not begun
        with tqdm(total=len(numbers), desc=title, delay=2, disable=not title) as progress:
            for done in in_order(fill, range(0, len(numbers), size)):
                progress.update(done)
        return found


def in_memory_if_small(make: Callable[[int], np.ndarray], shape: tuple[int, ...],
                       title: str) -> np.ndarray | Images:
    """Images uint8 `shape`, of which make(k) makes the k-th: all at once if they are few."""
    images = Images(make, shape)
    return images.read(range(len(images)), title) if fits(shape) else images


def joined(parts: list[np.ndarray]) -> Images:
    """The images of several arrays, one array after the other."""
    ends = np.cumsum([len(part) for part in parts])

    def make(k: int) -> np.ndarray:
        which = int(np.searchsorted(ends, k, "right"))
        return parts[which][k - ends[which]]   # counted from the end of its array

    return Images(make, (int(ends[-1]), *parts[0].shape[1:]))
