"""The latents of a whole data set: images are encoded once, before the training."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from ldm import LatentDiffusion, images_at_once, normalize_images
from runtime.fingerprint import each_digest
from runtime.memory import memory_of

AHEAD = 16   # batches of images that are read together: threads decode them


class MappedLatents:
    """Latents [N, C, h, w] for a training, in half precision in a file and not in memory.

    Indexing gives a float32 tensor on `device`. The file has no name, so nobody else opens it, and
    no crash leaves it behind: the latents may be private.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, folder: Path | None):
        """OSError if the folder, or the system's temporary one, has no room."""
        self.shape, self.device, self.factor = torch.Size(shape), device, 1.0
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                if hasattr(os, "posix_fallocate"):   # later a full disk would kill the process
                    os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
                mapped = np.memmap(file, np.float16, "r+", shape=self.shape)
            except OSError as error:
                raise OSError(f"{folder or tempfile.gettempdir()} has no room for "
                              f"{2 * math.prod(shape):,} bytes of latents: {error.strerror}"
                              ) from error
        self.values = torch.from_numpy(mapped)   # lives on without the open file

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | torch.Tensor) -> torch.Tensor:
        rows = self.values[index.cpu() if isinstance(index, torch.Tensor) else index]
        return rows.to(self.device).float() * self.factor

    def __setitem__(self, rows: slice, latents: torch.Tensor) -> None:
        self.values[rows] = (latents / self.factor).to("cpu", torch.half)

    def __imul__(self, factor: torch.Tensor | float) -> "MappedLatents":
        self.factor = self.factor * factor
        return self

    def std(self) -> torch.Tensor:
        """Their standard deviation, as Tensor.std() has it."""
        def total(of: Callable) -> torch.Tensor:
            return sum(of(part.double()).sum() for part in self.split(1024))

        count = math.prod(self.shape)
        mean = total(lambda z: z) / count
        return (total(lambda z: (z - mean).square()) / (count - 1)).sqrt().float()

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """All of them in parts of so many examples, as Tensor.split() has them."""
        return (self[start:start + size] for start in range(0, len(self), size))


@torch.no_grad()
def encode_dataset(model: LatentDiffusion, images: np.ndarray, device: torch.device,
                   folder: Path | None = None,
                   digests: list[bytes] | None = None) -> torch.Tensor | MappedLatents:
    """Scaled latents z_0 [N, C, h, w] of all images, kept for the whole training.

    Where they would take more than a quarter of the memory they are in a file in `folder`. Each
    image is read once; digests: a list, to which `each_digest` of all is added.
    """
    batch = images_at_once(images.shape[1])
    starts = trange(0, len(images), batch, desc="encoding images", disable=len(images) < 8 * batch)
    for start in starts:
        place = start % (AHEAD * batch)
        if not place:
            ahead = images[start:start + AHEAD * batch]
            if digests is not None:
                digests += each_digest(ahead)
        z = model.encode(normalize_images(ahead[place:place + batch], device))
        if not start:
            z_0 = room_for(z, len(images), folder)
        z_0[start:start + batch] = z
    return z_0


def room_for(z: torch.Tensor, count: int, folder: Path | None) -> torch.Tensor | MappedLatents:
    """`count` latents like z [B, C, h, w], yet to be filled in."""
    shape = count, *z.shape[1:]
    if math.prod(shape) * z.element_size() > memory_of(z.device) / 4:
        return MappedLatents(shape, z.device, folder)
    return z.new_empty(shape)
