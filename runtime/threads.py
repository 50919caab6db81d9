"""How many threads a program computes on: as many as have enough to do.

Where the operations of a model are small, a second thread brings little. Beside another busy
process it makes the program several times slower than one thread: at the end of each operation the
threads wait for the one that the system has not yet let run.
"""

import os

import torch

from ldm import LatentDiffusion
from runtime.config import Config
from runtime.distributed import log_once

PER_THREAD = 200_000   # numbers: a guess, until benchmarks/threads.py has been run in quiet


def choose(numbers: int, device: torch.device) -> None:
    """Compute on one thread for each PER_THREAD `numbers`, on at most all cores; say so once.

    numbers: in the first feature map of a batch. OMP_NUM_THREADS is obeyed, if it is set: torchrun
    sets it. On a GPU nothing changes.
    """
    cores = torch.get_num_threads()
    threads = max(1, min(cores, numbers // PER_THREAD))
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and threads < cores:
        torch.set_num_threads(threads)
        log_once(f"computing on {threads} of {cores} cores: OMP_NUM_THREADS={cores} takes all")


def of_training(config: Config) -> int:
    """The numbers in the larger first feature map of a step: the autoencoder's or the U-Net's."""
    side = config.data.image_size
    latent = side // 2 ** (len(config.vae.ch_mult) - 1)
    autoencoder = config.autoencoder.batch * config.vae.ch * (config.autoencoder.crop or side) ** 2
    return max(autoencoder, config.public.batch * config.unet.model_channels * latent ** 2)


def of_unet(model: LatentDiffusion, batch: int) -> int:
    """The numbers in the first feature map of the U-Net."""
    return batch * model.unet.model_channels * model.vae.latent_shape[-1] ** 2
