"""How many threads a program computes on: as many as bring something, tried at its start.

Where the operations of a model are small, a second thread brings little. Beside another busy
process it makes the program several times slower than one thread: at the end of each operation the
threads wait for the one that the system has not yet let run.
"""

import functools
import os
import statistics
import time

import torch
import torch.nn.functional as F

from ldm import LatentDiffusion
from runtime.config import Config
from runtime.distributed import log_once

CORES = torch.get_num_threads()   # before any choice
GAIN = 1.3       # twice the threads must bring so much
ROUNDS = 7       # of each number of threads
SECONDS = 0.02   # of a round
MOST = 2**20     # numbers


def choose(numbers: int, device: torch.device) -> None:
    """Double the threads while that brings GAIN to a convolution; say so once if cores stay free.

    numbers: in the first feature map of a batch. OMP_NUM_THREADS is obeyed, if it is set: torchrun
    sets it. On a GPU nothing changes.
    """
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    threads = 1
    while (more := min(2 * threads, CORES)) > threads and gain(numbers, threads, more) >= GAIN:
        threads = more
    torch.set_num_threads(threads)
    if threads < CORES:
        log_once(f"computing on {threads} of {CORES} cores, as more bring little now: "
                 f"OMP_NUM_THREADS={CORES} takes all")


@functools.cache   # a program may choose for several models of one size
def gain(numbers: int, few: int, many: int) -> float:
    """How many times as many convolutions of `numbers` a second as on `few` threads?

    Of at most MOST: a larger one takes longer and tells nothing more.
    """
    images = torch.ones(max(1, min(numbers, MOST) // (32 * 8 * 8)), 32, 8, 8)
    weight = torch.ones(32, 32, 3, 3)
    rates: dict[int, list[float]] = {few: [], many: []}
    for _ in range(ROUNDS):
        for threads, of_threads in rates.items():
            torch.set_num_threads(threads)
            start, count = time.perf_counter(), 0
            while time.perf_counter() < start + SECONDS:
                F.conv2d(images, weight, padding=1)
                count += 1
            of_threads.append(count / (time.perf_counter() - start))
    return statistics.median(rates[many]) / statistics.median(rates[few])


def of_training(config: Config) -> int:
    """The numbers in the larger first feature map of a step: the autoencoder's or the U-Net's."""
    side = config.data.image_size
    latent = side // 2 ** (len(config.vae.ch_mult) - 1)
    autoencoder = config.autoencoder.batch * config.vae.ch * (config.autoencoder.crop or side) ** 2
    return max(autoencoder, config.public.batch * config.unet.model_channels * latent ** 2)


def of_unet(model: LatentDiffusion, batch: int) -> int:
    """The numbers in the first feature map of the U-Net."""
    return batch * model.unet.model_channels * model.vae.latent_shape[-1] ** 2
