"""How much memory a private step takes, and the largest physical batch that fits."""

import os
import resource
import sys
from collections.abc import Callable

import torch
from torch import nn

from dp_sgd import Batch, Tensors
from runtime.distributed import is_one_of_several


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far, of the GPU or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_of(device: torch.device) -> float:
    """Bytes of the GPU's or the machine's memory, or of this process's share of them."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # The processes on this machine share its memory.
    return memory / (int(os.environ["LOCAL_WORLD_SIZE"]) if is_one_of_several() else 1)


def largest_physical_batch(clipped_sum: Callable, model: nn.Module, parameters: Tensors,
                           example: Batch, most: int) -> int:
    """The largest power of two of examples, below 2 * most, that half of the memory is enough for.

    example: tensors [1, K, ...], which are repeated. Only their shapes matter: make them up.
    """
    device = example[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)   # encoding the images may have needed more
    memory = memory_of(device)
    before, size = peak_memory(device), 1
    while True:
        repeated = tuple(x.expand(size, *x.shape[1:]) for x in example)
        clipped_sum(model, parameters, repeated, 1.0)
        # Twice the examples take twice as much.
        if size >= most or 2 * (peak_memory(device) - before) > memory / 2:
            return size
        size *= 2
