"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1).

Diffusion runs on latents, small images of many channels. The default model (ch 8, ch_mult
(1, 1, 3, 6), z_channels 8) encodes a grey image as follows, and decodes it the same way backwards:

    image 32x32x1 -> conv_in 32x32x8 -> level 0 32x32x8 -> level 1 16x16x8 -> level 2 8x8x24
    -> level 3 4x4x48 -> mid 4x4x48 -> moments 4x4x16, mean and log variance -> latents 4x4x8

In general H/h = W/w = 2 ** (len(ch_mult) - 1), and
    images x [B, C, H, W] in [-1, 1]  --encode-->  moments [B, 2 * embed_dim, h, w]
    latents z [B, embed_dim, h, w]    --decode-->  images

Layers have the names of the official code, so that its weights load with strict=True.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AutoencoderKL(nn.Module):
    """Encoder and decoder with a normal posterior between them.

    ch_mult: width of each level, in units of ch. num_res_blocks: per level. attn_resolutions: sizes
    of the feature maps with attention. in_channels: 1 for grey, 3 for colour. resolution: height
    and width of an image. z_channels: between encoder and quant_conv. embed_dim: of the latents.
    """

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int,
                 attn_resolutions: list[int], in_channels: int, resolution: int, z_channels: int,
                 embed_dim: int):
        super().__init__()
        shared = ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, resolution
        self.encoder = Encoder(*shared, 2 * z_channels)   # of mean and log variance
        self.decoder = Decoder(*shared, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.resolution = resolution
        side = resolution // 2 ** (len(ch_mult) - 1)
        self.latent_shape = (embed_dim, side, side)

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> moments [B, 2*embed_dim, h, w] for DiagonalGaussian."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents [B, embed_dim, h, w] -> images [B, C, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def loss(self, x: Tensor, kl_weight: float) -> Tensor:
        """Mean L1 + L2 error per pixel, plus kl_weight times the mean KL per latent number.

        Rombach et al. add LPIPS, which needs a network's trained weights, and an adversarial loss.
        """
        posterior = DiagonalGaussian(self.encode(x))
        error = self.decode(posterior.sample()) - x
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + kl_weight * kl


class DiagonalGaussian:
    """q(z|x) = N(mean, diag(std^2)) from moments [B, 2*C, h, w]; log variance within [-30, 20]."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """z = mean + std * noise [B, C, h, w]. The noise is standard normal; None draws it."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def kl(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) in nats, summed over each image's latent: [B]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class Encoder(nn.Module):
    """x [B, in_channels, H, W] -> [B, out_channels, h, w]."""

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int,
                 attn_resolutions: list[int], in_channels: int, resolution: int, out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, width = nn.ModuleList(), ch
        for i, mult in enumerate(ch_mult):
            level = Level(width, ch * mult, num_res_blocks, resolution in attn_resolutions)
            width = ch * mult
            level.downsample = downsample(width) if i < len(ch_mult) - 1 else nn.Identity()
            resolution //= 2
            self.down.append(level)
        self.mid = middle(width)
        self.norm_out = group_norm(width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level.downsample(level(h))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """z [B, z_channels, h, w] -> images [B, out_channels, H, W]."""

    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int,
                 attn_resolutions: list[int], out_channels: int, resolution: int, z_channels: int):
        super().__init__()
        width, resolution = ch * ch_mult[-1], resolution // 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = middle(width)
        self.up = nn.ModuleList()   # up[i] has the size of the encoder's down[i]
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = Level(width, ch * mult, num_res_blocks + 1, resolution in attn_resolutions)
            width = ch * mult
            level.upsample = upsample(width) if i > 0 else nn.Identity()
            resolution *= 2
            self.up.insert(0, level)
        self.norm_out = group_norm(width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level.upsample(level(h))
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks at one size, with attention or without: x [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, channels: int, out_channels: int, num_blocks: int, attention: bool):
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for i in range(num_blocks):
            self.block.append(ResnetBlock(out_channels if i else channels, out_channels))
            self.attn.append(AttnBlock(out_channels) if attention else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return x


def middle(channels: int) -> nn.Sequential:
    """Two residual blocks with attention between them, at the smallest size."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels),
                                     attn_1=AttnBlock(channels),
                                     block_2=ResnetBlock(channels, channels)))


class ResnetBlock(nn.Module):
    """x [B, in, H, W] -> skip(x) + conv(silu(norm(conv(silu(norm(x)))))) [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions of x [B, C, H, W], added to x."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT for conv in (self.q, self.k, self.v))   # [B, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.mT.reshape(x.shape))


def downsample(channels: int) -> nn.Sequential:
    """Halve H and W by a strided convolution, which is padded on the right and below only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                     conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels: int) -> nn.Sequential:
    """Double H and W by nearest-neighbour repetition and a convolution."""
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0, mode="nearest"),
                                     conv=nn.Conv2d(channels, channels, 3, padding=1)))


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm with the official 32 groups, or with groups of at least 4 channels.

    A group of one channel would erase that channel's mean, which a narrow layer can hardly spare.
    """
    groups = 32 if channels % 32 == 0 else math.gcd(channels, max(1, channels // 4))
    return nn.GroupNorm(groups, channels, eps=eps)
