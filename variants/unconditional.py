"""No condition: a drop-in for ldm.ClassEmbedder where the U-Net has no cross-attention."""

import torch
from torch import nn


class NoEmbedder(nn.Module):
    """Labels int [B] -> no context. It has no parameters."""
    null_class = 0

    def forward(self, labels: torch.Tensor) -> None:
        return None

    def conditions(self, names: list[str]) -> torch.Tensor:
        """What `forward` takes for all the classes: int [N]."""
        return torch.arange(len(names))

    def rescale(self, scale: float) -> None:
        """There is nothing to rescale."""
