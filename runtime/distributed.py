"""Several processes (torchrun): one run, one noise.

Each process clips its share of every batch; the sums are added up; all processes add the same
noise.
"""

import copy
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import dp_sgd
from dp_sgd import Batch, Tensors


def is_first_process() -> bool:
    """Whether this process writes files and prints: the first of torchrun's, or the only one."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK", "0") == "0"


@functools.cache
def log_once(line: str) -> None:
    """Print a line the first time that it occurs, in the first process only."""
    if is_first_process():
        print(line)


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of torchrun, if there are any; all but the first are silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()   # gloo for tensors on a CPU, nccl on GPUs
    with ExitStack() as stack:
        # gloo's threads need time to end: an exit before that aborts a process that shares a core.
        stack.callback(time.sleep, 0.5)
        stack.callback(dist.destroy_process_group)
        if dist.get_rank() > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        yield


def wait_for_all() -> None:
    """Return once every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Add up every tensor over all processes, in place; the result is the same bits everywhere."""
    if dist.is_initialized():
        tensors = list(tensors)
        flat = torch.cat([t.flatten() for t in tensors])   # one message instead of many
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


# ---- the private loop: drop-ins for dp_sgd's functions -----------------------------------------

def secure_generator(insecure_seed: int | None = None) -> np.random.Generator:
    """dp_sgd.secure_generator, the same in all processes: the first chooses the seed."""
    seed = [np.random.SeedSequence(insecure_seed).entropy]
    if dist.is_initialized():
        dist.broadcast_object_list(seed)
    return dp_sgd.secure_generator(seed[0])


def summed(clipped_sum: Callable) -> Callable:
    """`clipped_sum` with the batch shared out among the processes; unchanged without torchrun."""
    rank, world = rank_and_world()
    if world == 1:
        return clipped_sum

    def sum_of_shares(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
        total = clipped_sum(model, parameters, tuple(x[rank::world] for x in batch), C)
        sum_over_processes(total.values())
        return total

    return sum_of_shares


class SharedStop:
    """True once any process was asked to stop: all have to stop after the same step."""

    def __init__(self, asked: list):
        self.asked = asked

    def __bool__(self) -> bool:
        flag = torch.tensor([float(bool(self.asked))])
        sum_over_processes([flag])
        return flag.item() > 0


def shared_stop(asked: list) -> object:
    """`asked`, which is true once it is filled, for all processes; unchanged without torchrun."""
    return SharedStop(asked) if dist.is_initialized() else asked


# ---- the public loop ---------------------------------------------------------------------------

def local_batch_size(batch: int) -> int:
    """This process's part of a public batch."""
    return -(-batch // rank_and_world()[1])


def local_batches(config: object) -> object:
    """A copy of the settings whose public batches are this process's part."""
    config = copy.deepcopy(config)
    for settings in (config.public, config.autoencoder):
        settings.batch = local_batch_size(settings.batch)
    return config


@contextmanager
def averaged_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, every backward pass leaves the mean gradient over all processes."""
    world = rank_and_world()[1]

    def average(parameter: nn.Parameter) -> None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world

    hooks = [p.register_post_accumulate_grad_hook(average) for p in parameters if world > 1]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
