"""Several processes (torchrun): one run, one noise.

Each process draws and clips examples of its own share. The sums are added up. The first process
adds the noise.
"""

import atexit
import copy
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dp_sgd import Batch, PrivacyPlan, Tensors


def is_one_of_several() -> bool:
    """Whether torchrun has started this process and others.

    Clusters leave WORLD_SIZE and RANK in the environment of programs that they start alone.
    """
    return dist.is_torchelastic_launched() and os.environ.get("WORLD_SIZE", "") not in ("", "1")


def is_first_process() -> bool:
    """Whether this process writes files and prints: the first of the group, or the only one."""
    return rank_and_world()[0] == 0


@functools.cache
def log_once(line: str) -> None:
    """Print a line the first time that it occurs, in the first process only."""
    if is_first_process():
        print(line)


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def may_speak() -> bool:
    """Whether this process may report an error: the first of torchrun's to ask, or the only one.

    A process that fails takes the others down with it: their errors tell nothing new.
    """
    if not is_one_of_several():
        return True
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=9)))
        return store.compare_set("speaker", "", str(rank)) == str(rank).encode()
    except (ValueError, RuntimeError):   # torchrun is no more
        return os.environ.get("RANK") == "0"


def lost_a_peer(error: Exception) -> bool:
    """Whether an exchange with the other processes failed: one of them has ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of torchrun, if there are any; all but the first are silent.

    The group lasts until the process ends: once it is left, the others fail. Errors come first.
    ValueError if another program than torchrun has started several: each would spend epsilon.
    """
    if not is_one_of_several():
        if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
            raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torchrun has not "
                             "started this program: start it by torchrun, or unset WORLD_SIZE")
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()   # gloo for tensors on a CPU, nccl on GPUs
    # gloo's threads need time to end: an exit before that aborts a process that shares a core.
    atexit.register(time.sleep, 0.5)
    atexit.register(dist.destroy_process_group)   # the last one registered is called first
    if dist.get_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        yield


def wait_for_all() -> None:
    """Return once every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Add up every tensor over all processes, in place; the result is the same bits everywhere."""
    if dist.is_initialized():
        in_one_message(tensors, dist.all_reduce)


def in_one_message(tensors: Iterable[torch.Tensor], exchange: Callable) -> None:
    """exchange, in place, all tensors at once: one message is faster than many."""
    tensors = list(tensors)
    flat = torch.cat([t.flatten() for t in tensors])
    exchange(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


# ---- the private loop: each function returns what it is given without torchrun -----------------

def of_share(sample: Callable) -> Callable:
    """`sample` in this process's share of the examples: every world-th one."""
    rank, world = rank_and_world()

    def sample_of_share(plan: PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
        chosen = sample(plan, rng)
        return chosen[chosen % world == rank]

    return sample_of_share if dist.is_initialized() else sample


def summed(clipped_sum: Callable) -> Callable:
    """`clipped_sum` of all processes' batches together."""
    def sum_of_all(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
        total = clipped_sum(model, parameters, batch, C)
        sum_over_processes(total.values())
        return total

    return sum_of_all if dist.is_initialized() else clipped_sum


def by_first_process(add_noise: Callable) -> Callable:
    """`add_noise` by the first process, which hands out the result: no seed is shared."""
    def noise_for_all(total: Tensors, plan: PrivacyPlan, rng: np.random.Generator) -> Tensors:
        if dist.get_rank() == 0:
            total = add_noise(total, plan, rng)
        in_one_message(total.values(), functools.partial(dist.broadcast, src=0))
        return total

    return noise_for_all if dist.is_initialized() else add_noise


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
def averaged_gradients() -> Iterator[None]:
    """Inside, every optimiser takes its steps by the mean gradient over all processes."""
    world = rank_and_world()[1]

    def average(optimizer: torch.optim.Optimizer, *details: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]
                     if p.grad is not None]
        sum_over_processes(gradients)
        torch._foreach_div_(gradients, world)

    hook = register_optimizer_step_pre_hook(average) if world > 1 else None
    try:
        yield
    finally:
        if hook:
            hook.remove()
