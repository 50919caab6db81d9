"""The latents of a whole data set: images are encoded once, before the training."""

import numpy as np
import torch
from tqdm import trange

from ldm import LatentDiffusion, images_at_once, normalize_images


@torch.no_grad()
def encode_dataset(model: LatentDiffusion, images: np.ndarray,
                   device: torch.device) -> torch.Tensor:
    """Scaled latents z_0 [N, C, h, w] of all images, kept in memory for the whole training."""
    batch = images_at_once(images.shape[1])
    starts = trange(0, len(images), batch, desc="encoding images", disable=len(images) < 8 * batch)
    return torch.cat([model.encode(normalize_images(images[i:i + batch], device))
                      for i in starts])
