"""The U-Net of Latent Diffusion (Rombach et al. 2022; backbone of Dhariwal and Nichol 2021).

eps_hat = UNet(z_t [B, C, H, W], timesteps [B], context [B, L, context_dim] or None)   [B, C, H, W]

Conditional models attend to the context in SpatialTransformers; unconditional ones have AttentionBlocks.
Sub-modules carry the names of the official state dict, so that official weights load with strict=True.
`private_parameter_names` at the end says what DP-LDM trains on private data.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vae import Upsample, group_norm


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding [B] -> [B, dim] (dim even): the cosines, then the sines (Vaswani et al. 2017)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(layer: nn.Module) -> nn.Module:
    """Zero weights and bias: every residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for q [..., Lq, d] and k, v [..., Lk, d].

    Written out: the fused CPU kernel has no vmap rule, which per-example gradients need.
    """
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights @ v


def low_rank(inputs: int, outputs: int, rank: int) -> nn.Sequential | None:
    """What LoRA (Hu et al. 2022, arXiv 2106.09685) adds to a linear layer: x -> up(down(x)), zero at first."""
    if rank:
        return nn.Sequential(nn.Linear(inputs, rank, bias=False), zero_init(nn.Linear(rank, outputs, bias=False)))


class Linear(nn.Linear):
    """A linear layer, with LoRA of the given rank if it is not 0."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, lora_rank: int = 0):
        super().__init__(inputs, outputs, bias)
        self.lora = low_rank(inputs, outputs, lora_rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.lora is None else y + self.lora(x)


class PointwiseConv1d(nn.Conv1d):
    """The same for x [B, inputs, L], under the name of a convolution."""

    def __init__(self, inputs: int, outputs: int, lora_rank: int = 0):
        super().__init__(inputs, outputs, 1)
        self.lora = low_rank(inputs, outputs, lora_rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.lora is None else y + self.lora(x.mT).mT


class Downsample(nn.Module):
    """Halve H and W by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block that adds (or, with scale_shift, multiplies and adds) the time embedding.

    x [B, channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']; resample "up" or "down"
    doubles or halves H and W inside the block, without weights.
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, scale_shift: bool = False,
                 resample: str | None = None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(group_norm(channels, eps=1e-5), nn.SiLU(),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (1 + scale_shift)))
        # Dropout(0) keeps the official numbering of the layers.
        self.out_layers = nn.Sequential(group_norm(out_channels, eps=1e-5), nn.SiLU(), nn.Dropout(0.0),
                                        zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def change_size(self, x: torch.Tensor) -> torch.Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.change_size(activation(norm(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.change_size(x)) + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the H*W positions of x [B, C, H, W], added to x."""

    def __init__(self, channels: int, num_heads: int, lora_rank: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels, eps=1e-5)
        self.qkv = PointwiseConv1d(channels, 3 * channels, lora_rank)
        self.proj_out = zero_init(PointwiseConv1d(channels, channels, lora_rank))

    def forward(self, x: torch.Tensor, context: None = None) -> torch.Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))                                # [B, 3C, HW], head by head
        q, k, v = qkv.reshape(B, self.num_heads, 3, C // self.num_heads, H * W).transpose(-1, -2).unbind(2)
        h = attend(q, k, v).transpose(-1, -2).reshape(B, C, H * W)
        return x + self.proj_out(h).reshape(x.shape)


class CrossAttention(nn.Module):
    """Multi-head attention of x [B, L, query_dim] to context [B, M, context_dim], or to x itself."""

    def __init__(self, query_dim: int, context_dim: int, num_heads: int, dim_head: int, lora_rank: int = 0):
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * dim_head
        self.to_q = Linear(query_dim, inner, bias=False, lora_rank=lora_rank)
        self.to_k = Linear(context_dim, inner, bias=False, lora_rank=lora_rank)
        self.to_v = Linear(context_dim, inner, bias=False, lora_rank=lora_rank)
        self.to_out = nn.Sequential(Linear(inner, query_dim, lora_rank=lora_rank), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)       # [B, heads, L or M, dim_head]
                   for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear layer gated by an exact (erf) GELU (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a pre-norm and a residual connection."""

    def __init__(self, dim: int, num_heads: int, dim_head: int, context_dim: int, lora_rank: int = 0):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, num_heads, dim_head, lora_rank)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads, dim_head, lora_rank)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the H*W positions of x [B, C, H, W], attending to context; added to x."""

    def __init__(self, channels: int, num_heads: int, depth: int, context_dim: int, lora_rank: int = 0):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads, channels // num_heads, context_dim, lora_rank)
            for _ in range(depth))
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)              # [B, HW, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Stage(nn.Sequential):
    """Layers run in order, each given what it takes besides x: the time embedding or the context."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, AttentionBlock | SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The noise predictor eps_theta(z_t, t, context); argument names as in the official configuration.

    `attention_resolutions` lists downsampling factors (1 = full size) that get attention; `num_heads`
    is the number of heads, or `num_head_channels` their width. `context_dim` None: unconditional. `lora_rank`
    other than 0 gives the projections of the attention an addition of low rank, for private fine-tuning.
    """

    def __init__(self, in_channels: int, out_channels: int, model_channels: int, num_res_blocks: int,
                 attention_resolutions: list[int], channel_mult: list[int], num_heads: int = 1,
                 num_head_channels: int | None = None, transformer_depth: int = 1,
                 context_dim: int | None = None, use_scale_shift_norm: bool = False,
                 resblock_updown: bool = False, lora_rank: int = 0):
        super().__init__()
        self.model_channels = model_channels
        emb_channels = 4 * model_channels

        def res(channels, out, resample=None):
            return ResBlock(channels, emb_channels, out, use_scale_shift_norm, resample)

        def attention(channels):
            heads = channels // num_head_channels if num_head_channels else num_heads
            if context_dim is None:
                return AttentionBlock(channels, heads, lora_rank)
            return SpatialTransformer(channels, heads, transformer_depth, context_dim, lora_rank)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_channels), nn.SiLU(),
                                        nn.Linear(emb_channels, emb_channels))
        width, factor = model_channels, 1
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, width, 3, padding=1))])
        skips = [width]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [res(width, mult * model_channels)]
                width = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(width))
                self.input_blocks.append(Stage(*layers))
                skips.append(width)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(Stage(res(width, width, "down") if resblock_updown else Downsample(width)))
                skips.append(width)
                factor *= 2
        self.middle_block = Stage(res(width, width), attention(width), res(width, width))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res(width + skips.pop(), mult * model_channels)]
                width = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(width))
                if level > 0 and i == num_res_blocks:
                    layers.append(res(width, width, "up") if resblock_updown else Upsample(width))
                    factor //= 2
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(group_norm(width, eps=1e-5), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, out_channels, 3, padding=1)))

    def forward(self, z_t: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(z_t.dtype))
        h, skips = z_t, []
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


PRIVATE_PARTS = ("attention", "lora", "resblocks", "all")


def private_parameter_names(model: nn.Module, blocks: str = "all", context_tokens: int = 1,
                            parts: str = "attention") -> list[str]:
    """Names of the parameters of `model` (with parts `unet`, `embedder`) that the private stage trains.

    The conditioning embedder and, of the U-Net, the attention modules (DP-LDM, section 3); or, as `parts`, only their
    "lora" (DP-LoRA, Tsai et al. 2025), the "resblocks", or "all". `blocks` chooses among the attention modules,
    numbered from 0 at the input: "all", "last:K" (the last K) or "from:K" (number K and all after it). Raises
    ValueError for anything else.

    With one context token (class conditioning) the cross-attention's softmax runs over a single key and
    is the constant 1: to_q, to_k and the norm before them cannot change the output. Their gradient is
    zero, so DP-SGD would train them on pure noise (as the authors' code does); they stay frozen.
    """
    kinds = {"resblocks": ResBlock, "all": UNet}.get(parts, AttentionBlock | SpatialTransformer)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    kind, _, number = blocks.partition(":")
    if blocks != "all" and (parts in ("resblocks", "all") or not (
            kind in ("last", "from") and number.isdecimal() and int(number) <= len(modules))):
        raise ValueError(f"attention blocks {blocks!r}: give all, last:K or from:K with K from 0 to the number of "
                         f"attention modules, {len(modules)}; and only with attention or lora as what is trained")
    if kind == "last":
        modules = modules[len(modules) - int(number):]
    elif kind == "from":
        modules = modules[int(number):]
    chosen = tuple(f"{module}." for module in modules)
    without_effect = ("attn2.to_q.", "attn2.to_k.", ".norm2.") if context_tokens == 1 else ()
    return [name for name, _ in model.named_parameters()
            if name.startswith("embedder.") or name.startswith(chosen) and (".lora." in name or parts != "lora")
            and not any(part in name for part in without_effect)]
