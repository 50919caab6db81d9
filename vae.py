"""The autoencoders of Latent Diffusion, KL and VQ (Rombach et al. 2022, arXiv 2112.10752, section 3.1).

Images x [B, C, H, W] in [-1, 1]  --Encoder-->  moments [B, 2*embed_dim, h, w]  (mean, log variance)
latents z [B, embed_dim, h, w]    --Decoder-->  images, with H/h = W/w = 2 ** (len(ch_mult) - 1).

Sub-modules carry the names of the official state dict, so that official weights load with strict=True.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm with the official 32 groups, or with groups of at least 4 channels in narrower layers.

    A group of one channel would erase that channel's mean, which a 16-channel layer can hardly spare.
    """
    groups = 32 if channels % 32 == 0 else math.gcd(channels, max(1, channels // 4))
    return nn.GroupNorm(groups, channels, eps=eps)


class ResnetBlock(nn.Module):
    """x [B, in, H, W] -> skip(x) + conv(silu(norm(conv(silu(norm(x)))))) [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions of x [B, C, H, W], added to x."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # [B, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve H and W by a strided convolution padded on the right and below only, as in the official code."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by nearest-neighbour repetition and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def images_at_once(image_size: int) -> int:
    """How many images to encode or decode together: their widest feature maps hold as many numbers at every size.

    A map of VQ-f4 has 128 channels of 256x256: 33 MB per image.
    """
    return max(1, 250 * 32**2 // image_size**2)


def middle(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels)
    mid.attn_1 = AttnBlock(channels)
    mid.block_2 = ResnetBlock(channels, channels)
    return mid


def run_level(level: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """The residual blocks of one resolution, each followed by attention where the level has it."""
    for i, block in enumerate(level.block):
        h = block(h)
        if len(level.attn):
            h = level.attn[i](h)
    return h


class Encoder(nn.Module):
    """x [B, in_channels, H, W] -> [B, 2 * z_channels, h, w], or z_channels only without double_z."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, resolution, z_channels,
                 double_z=True):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                level.block.append(ResnetBlock(width, ch * mult))
                width = ch * mult
                if resolution in attn_resolutions:
                    level.attn.append(AttnBlock(width))
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
                resolution //= 2
            self.down.append(level)
        self.mid = middle(width)
        self.norm_out = group_norm(width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = run_level(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """z [B, z_channels, h, w] -> images [B, out_ch, H, W]; `up[i]` is the level of down[i]'s resolution."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, out_ch, resolution, z_channels):
        super().__init__()
        width = ch * ch_mult[-1]
        resolution //= 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = middle(width)
        levels = []
        for i in reversed(range(len(ch_mult))):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.block.append(ResnetBlock(width, ch * ch_mult[i]))
                width = ch * ch_mult[i]
                if resolution in attn_resolutions:
                    level.attn.append(AttnBlock(width))
            if i > 0:
                level.upsample = Upsample(width)
                resolution *= 2
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            h = run_level(level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class DiagonalGaussian:
    """q(z|x) = N(mean, diag(std^2)), from moments [B, 2*C, h, w]; log variance clamped to [-30, 20]."""

    def __init__(self, moments: torch.Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """z = mean + std * noise (reparametrised); fresh standard normal noise unless it is given."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def kl(self) -> torch.Tensor:
        """KL(q(z|x) || N(0, I)) in nats, summed over each image's latent: [B]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """The autoencoder; arguments as in the official `ddconfig`, with `embed_dim` latent channels.

    `attn_resolutions` lists the feature-map sizes (for an input of `resolution`) that get attention.
    """

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int, attn_resolutions: list[int],
                 in_channels: int, resolution: int, z_channels: int, embed_dim: int):
        super().__init__()
        shared = (ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, resolution, z_channels)
        self.encoder = Encoder(*shared)
        self.decoder = Decoder(*shared)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] in [-1, 1] -> moments [B, 2*embed_dim, h, w] (see DiagonalGaussian)."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Unscaled latents [B, embed_dim, h, w] -> images [B, C, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def loss(self, x: torch.Tensor, kl_weight: float) -> torch.Tensor:
        """Mean L1 + L2 reconstruction error per pixel plus kl_weight times the mean KL per latent number.

        Rombach et al. add a perceptual (LPIPS) and an adversarial (patch discriminator) loss. They are
        left out: LPIPS needs VGG weights, which a machine without a network does not have.
        """
        posterior = DiagonalGaussian(self.encode(x))
        error = self.decode(posterior.sample()) - x
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + kl_weight * kl


class VectorQuantizer(nn.Module):
    """A codebook of n_embed vectors (van den Oord et al. 2017): z [B, C, h, w] -> the nearest code at every pixel."""

    def __init__(self, n_embed: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, dim)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Indices int [B, h, w] of the codes at the smallest Euclidean distance."""
        codes = self.embedding.weight
        # One image at a time: h * w * n_embed distances are 128 MiB for one of VQ-f4's. And without matrix products,
        # whose rounding exceeds the distance between close codes.
        return torch.stack([torch.cdist(pixels.flatten(1).T, codes, compute_mode="donot_use_mm_for_euclid_dist")
                            .argmin(1).unflatten(0, pixels.shape[1:]) for pixels in z])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.embedding(self.nearest(z)).movedim(-1, 1)


class AutoencoderVQ(nn.Module):
    """The autoencoder with a codebook of n_embed vectors, for official weights: it is not trained here.

    The other arguments are AutoencoderKL's. Latent diffusion works on latents that are not quantised yet; decoding
    begins with the quantisation, so that small errors of the sampler vanish. There is no posterior: `encode`
    returns the latents as a distribution without spread, so that what takes an AutoencoderKL takes this one too.
    """

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int, attn_resolutions: list[int],
                 in_channels: int, resolution: int, z_channels: int, embed_dim: int, n_embed: int):
        super().__init__()
        shared = (ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, resolution, z_channels)
        self.encoder = Encoder(*shared, double_z=False)
        self.decoder = Decoder(*shared)
        self.quantize = VectorQuantizer(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] in [-1, 1] -> moments [B, 2*embed_dim, h, w]: the latents, and log variance -30.

        That is DiagonalGaussian's least.
        """
        z = self.quant_conv(self.encoder(x))
        return torch.cat([z, torch.full_like(z, -30.0)], dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, embed_dim, h, w] -> their nearest codes -> images [B, C, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.quantize(z)))
