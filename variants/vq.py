"""The VQ autoencoder of latent diffusion: a drop-in for vae.AutoencoderKL, for official weights.

Its latents have no distribution. A codebook of vectors (van den Oord et al. 2017, arXiv 1711.00937)
bounds them instead. It is not trained here.
"""

import torch
from torch import nn

from vae import Decoder, Encoder


class VectorQuantizer(nn.Module):
    """A codebook of n_embed vectors: z [B, dim, h, w] -> the nearest vector at every pixel."""

    def __init__(self, n_embed: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, dim)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Indices int [B, h, w] of the vectors at the smallest Euclidean distance."""
        # One image at a time: the distances take 128 MiB for one of VQ-f4's. Without matrix
        # products: their rounding exceeds the distance between close vectors.
        return torch.stack([
            torch.cdist(pixels.flatten(1).T, self.embedding.weight,
                        compute_mode="donot_use_mm_for_euclid_dist")
            .argmin(1).unflatten(0, pixels.shape[1:]) for pixels in z])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.embedding(self.nearest(z)).movedim(-1, 1)


class AutoencoderVQ(nn.Module):
    """Encoder and decoder with a codebook of n_embed vectors between them.

    The other arguments are AutoencoderKL's. Diffusion runs on latents that are not quantised yet.
    Decoding begins with the quantisation, so that small errors of the sampler vanish.
    """

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int,
                 attn_resolutions: list[int], in_channels: int, resolution: int, z_channels: int,
                 embed_dim: int, n_embed: int):
        super().__init__()
        shared = ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, resolution, z_channels
        self.encoder = Encoder(*shared)
        self.decoder = Decoder(*shared)
        self.quantize = VectorQuantizer(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.resolution = resolution
        side = resolution // 2 ** (len(ch_mult) - 1)
        self.latent_shape = (embed_dim, side, side)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] in [-1, 1] -> moments [B, 2*embed_dim, h, w] without spread.

        The mean is the latents. The log variance is -30, DiagonalGaussian's least.
        """
        z = self.quant_conv(self.encoder(x))
        return torch.cat([z, torch.full_like(z, -30.0)], dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, embed_dim, h, w] -> nearest vectors -> images [B, C, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.quantize(z)))
