"""The official code's numbers, which lie beside this file, and how tests compare with them."""

import inspect
import json
from functools import cache
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).parent


@cache
def oracle(name: str) -> dict:
    """The content of a file of this folder: .json or .pt."""
    path = FOLDER / name
    if path.suffix == ".json":
        return json.loads(path.read_text("utf-8"))
    return torch.load(path, weights_only=True)


def build(constructor: type, config: dict) -> nn.Module:
    """A module from the official configuration, without the keys that it has no use for."""
    given = {**config.get("ddconfig", {}), **config}
    names = inspect.signature(constructor).parameters
    return constructor(**{name: given[name] for name in names if name in given})


def load_strictly(module: nn.Module, weights: dict) -> nn.Module:
    """`module` with official weights, whose names and order must be its own."""
    assert list(module.state_dict()) == list(weights)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False)


def randomised(module: nn.Module) -> nn.Module:
    """Redraws all parameters, so that the zero-initialised layers have an effect, too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return module.eval()


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
