"""The U-Net of latent diffusion (Rombach et al. 2022; backbone of Dhariwal and Nichol 2021).

    eps_hat [B, C, h, w] = UNet(z_t [B, C, h, w], timesteps int [B], context [B, L, context_dim])

The time step reaches the residual blocks, the context the attention: SpatialTransformers, or in an
unconditional model AttentionBlocks. DP-LDM trains these and the embedder, which makes the context,
on private data. Layers have the official names, so that official weights load with strict=True.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae import group_norm, upsample


class UNet(nn.Module):
    """The noise predictor eps_theta(z_t, t, context), with the official names of arguments.

    channel_mult: width of each level in units of model_channels. num_res_blocks: per level.
    attention_resolutions: downsampling factors with attention, 1 at full size. num_head_channels:
    width of a head, in place of num_heads. context_dim: None is unconditional.
    use_scale_shift_norm, resblock_updown: variants of ResBlock.
    """

    def __init__(self, in_channels: int, out_channels: int, model_channels: int,
                 num_res_blocks: int, attention_resolutions: list[int], channel_mult: list[int],
                 num_heads: int = 1, num_head_channels: int | None = None,
                 transformer_depth: int = 1, context_dim: int | None = None,
                 use_scale_shift_norm: bool = False, resblock_updown: bool = False):
        super().__init__()
        self.model_channels = model_channels
        emb_channels = 4 * model_channels
        res = partial(ResBlock, emb_channels=emb_channels, scale_shift=use_scale_shift_norm)

        def attention(channels: int) -> nn.Module:
            heads = channels // num_head_channels if num_head_channels else num_heads
            return (SpatialTransformer(channels, heads, transformer_depth, context_dim)
                    if context_dim is not None else AttentionBlock(channels, heads))

        def layers(channels: int, out: int, level: int) -> list[nn.Module]:
            block = [res(channels, out)]
            return [*block, attention(out)] if 2**level in attention_resolutions else block

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_channels), nn.SiLU(),
                                        nn.Linear(emb_channels, emb_channels))
        conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([ConditionalSequential(conv_in)])
        kept = [model_channels]   # the widths of their outputs
        widths = [mult * model_channels for mult in channel_mult]
        for level, out in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(ConditionalSequential(*layers(kept[-1], out, level)))
                kept.append(out)
            if level < len(widths) - 1:
                down = res(out, out, resample="down") if resblock_updown else downsample(out)
                self.input_blocks.append(ConditionalSequential(down))
                kept.append(out)
        self.middle_block = ConditionalSequential(res(out, out), attention(out), res(out, out))
        self.output_blocks, width = nn.ModuleList(), out
        for level, out in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                block = layers(width + kept.pop(), out, level)   # of both, joined
                width = out
                if level > 0 and i == num_res_blocks:
                    block.append(res(out, out, resample="up") if resblock_updown else upsample(out))
                self.output_blocks.append(ConditionalSequential(*block))
        self.out = nn.Sequential(group_norm(width, eps=1e-5), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, out_channels, 3, padding=1)))

    def forward(self, z_t: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(z_t.dtype))
        h, kept = z_t, []   # kept outputs skip the smaller sizes, so that no detail is lost
        for block in self.input_blocks:
            h = block(h, emb, context)
            kept.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, kept.pop()], dim=1), emb, context)
        return self.out(h)


class ConditionalSequential(nn.Sequential):
    """Layers in order, each with what it takes besides x: the time embedding or the context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        arguments = {ResBlock: [emb], SpatialTransformer: [context]}
        for layer in self:
            x = layer(x, *arguments.get(type(layer), []))
        return x


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """[B] -> [B, dim], dim even: cosines, then sines (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Residual block that adds the time embedding, or with scale_shift multiplies and adds.

    x [B, channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']. resample "up" doubles
    H and W inside the block, "down" halves them, without weights.
    """

    def __init__(self, channels: int, out_channels: int, emb_channels: int,
                 scale_shift: bool = False, resample: str | None = None):
        super().__init__()
        self.scale_shift = scale_shift
        sizes = {"up": nn.Upsample(scale_factor=2.0, mode="nearest"), "down": nn.AvgPool2d(2)}
        self.change_size = sizes.get(resample, nn.Identity())
        self.in_layers = nn.Sequential(group_norm(channels, eps=1e-5), nn.SiLU(),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(),
                                        nn.Linear(emb_channels, out_channels * (1 + scale_shift)))
        conv_out = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(group_norm(out_channels, eps=1e-5), nn.SiLU(),
                                        nn.Dropout(0.0), conv_out)   # for the official numbers
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.change_size(activation(norm(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.change_size(x)) + h


def downsample(channels: int) -> nn.Sequential:
    """Halve H and W by a strided convolution."""
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def zero_init(layer: nn.Module) -> nn.Module:
    """Zero weights and bias: every residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [..., Lq, d] and k, v [..., Lk, d]."""
    # Written out: the fused CPU kernel has no vmap rule, which per-example gradients need.
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights @ v


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the H*W positions of x [B, C, H, W], added to x."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))                            # [B, 3C, HW]
        q, k, v = qkv.unflatten(1, (self.num_heads, 3, -1)).mT.unbind(2)   # [B, heads, HW, d]
        h = attend(q, k, v).mT.flatten(1, 2)                               # [B, C, HW]
        return x + self.proj_out(h).reshape(x.shape)


class SpatialTransformer(nn.Module):
    """Transformer blocks on the positions of x [B, C, H, W], attending to context; added to x."""

    def __init__(self, channels: int, num_heads: int, depth: int, context_dim: int):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads, channels // num_heads, context_dim)
            for _ in range(depth))
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).mT   # [B, HW, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.mT.reshape(x.shape))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with a pre-norm and a residual."""

    def __init__(self, dim: int, num_heads: int, dim_head: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, num_heads, dim_head)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads, dim_head)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """Multi-head attention of x [B, L, query_dim] to context [B, M, context_dim], or to x."""

    def __init__(self, query_dim: int, context_dim: int, num_heads: int, dim_head: int):
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * dim_head
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)   # [B, heads, L or M, d]
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """x [B, L, dim] -> [B, L, dim], through a GEGLU of four times the width."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """Linear layer gated by an exact GELU, of the error function (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
