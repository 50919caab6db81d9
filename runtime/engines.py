"""What clips and sums a private batch: the function that the settings ask for."""

from collections.abc import Callable

import numpy as np
import torch

import dp_sgd
from ldm import LatentDiffusion, sample_t_and_noise
from runtime import distributed
from runtime.config import Config
from runtime.memory import largest_physical_batch
from runtime.runs import showing_loss
from variants import ghost

ENGINES = {"vmap": dp_sgd.clipped_gradient_sum, "ghost": ghost.clipped_gradient_sum}


def clipping_engine(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor,
                    names: list[str], config: Config) -> Callable:
    """The function that clips and sums, in chunks of --physical-batch, shared by all processes."""
    clipped_sum = ENGINES[config.run.clipping]
    if config.run.physical_batch == "auto":
        model.requires_grad_(False)   # as in the loop: other gradients would take memory
        parameters = {name: model.get_parameter(name) for name in names}
        dummy = torch.zeros_like(z_0[:1]), torch.zeros_like(labels[:1])   # only shapes matter
        example = sample_t_and_noise(model, *dummy, config.private.noise_multiplicity, 0.0,
                                     np.random.default_rng())
        size = largest_physical_batch(clipped_sum, model, parameters, example,
                                      config.private.expected_batch)
    else:
        size = int(config.run.physical_batch)
    clipped_sum = distributed.summed(dp_sgd.in_chunks(clipped_sum, size))
    return showing_loss(clipped_sum, size) if config.run.show_private_loss else clipped_sum
