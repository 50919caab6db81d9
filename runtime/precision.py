"""bfloat16 for the network's call alone: losses, norms, sums, noise and weights stay float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import nn


def in_bfloat16(forward: Callable) -> Callable:
    """`forward` under autocast; a floating-point result gets float32 back."""
    @wraps(forward)
    def wrapped(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = forward(x, *others)
        return y.float() if isinstance(y, torch.Tensor) else y
    return wrapped


@contextmanager
def bfloat16(*modules: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside, the modules compute in bfloat16."""
    for module in modules if enabled else ():
        module.forward = in_bfloat16(module.forward)
    try:
        yield
    finally:
        for module in modules if enabled else ():
            del module.forward   # the class's own method is back
