"""LoRA (Hu et al. 2022, arXiv 2106.09685): low-rank additions to the U-Net's attention layers.

A layer y = W x becomes y = W x + up(down(x)), where down maps x to `rank` numbers. Private
fine-tuning may train the additions only (DP-LoRA, Tsai et al. 2025): noise falls on fewer numbers.
"""

import torch
from torch import nn

from unet import AttentionBlock, CrossAttention

# The layers of an attention that get an addition, by their names.
LAYERS = {CrossAttention: ("to_q", "to_k", "to_v", "to_out.0"),
          AttentionBlock: ("qkv", "proj_out")}


class LoRALinear(nn.Linear):
    """`layer` with the addition `lora`: x [..., inputs] -> [..., outputs]."""

    def __init__(self, layer: nn.Linear, lora: nn.Module):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias, self.lora = layer.weight, layer.bias, lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora(x)


class LoRAConv1d(nn.Conv1d):
    """`layer`, of kernel size 1, with the addition `lora`: x [B, inputs, L] -> [B, outputs, L]."""

    def __init__(self, layer: nn.Conv1d, lora: nn.Module):
        super().__init__(layer.in_channels, layer.out_channels, 1, device="meta")
        self.weight, self.bias, self.lora = layer.weight, layer.bias, lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora(x.mT).mT


def add_lora(unet: nn.Module, rank: int, seed: int = 0) -> None:
    """Add LoRA of this rank to the attention layers of `unet`, in place.

    The outputs stay as they are, since `up` starts at zero. `down` follows from the seed: it is
    public, and the same in all processes of a run. X.weight stays, X.lora.0.weight is down and
    X.lora.1.weight is up.
    """
    owners = [module for module in unet.modules() if type(module) in LAYERS]
    with torch.random.fork_rng(devices=[]):   # the caller's random numbers go on as they were
        torch.default_generator.manual_seed(seed)
        for owner in owners:
            for name in LAYERS[type(owner)]:
                layer = owner.get_submodule(name)
                owner.set_submodule(name, with_lora(layer, rank))


def with_lora(layer: nn.Linear | nn.Conv1d, rank: int) -> nn.Module:
    """A layer that shares the weights of `layer` and has a new addition."""
    outputs, inputs = layer.weight.shape[:2]
    down, up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    nn.init.zeros_(up.weight)
    new = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv1d
    lora = nn.Sequential(down, up).to(layer.weight)   # its device and precision
    return new(layer, lora).train(layer.training)
