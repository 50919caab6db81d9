"""Ghost clipping with book-keeping: dp_sgd.clipped_gradient_sum without a gradient per example.

Let a linear layer y_t = W x_t + b be called for t = 1 ... T: all tokens or pixels of all draws of
one example, and all calls. Let g_t be the gradient of the example's loss in y_t. Then

    gradient of W     G_i = sum_t g_t x_t^T                              of b   sum_t g_t its norm
    ||G_i||^2 = sum_{t,s} (x_t . x_s) (g_t . g_s)      two T x T matrices, no G_i the clipped sum
    sum_i w_i G_i = sum_{i,t} (w_i g_t) x_t^T          one product for all examples

(Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679; Bu et al. 2023, arXiv
2210.00038). A convolution is a linear layer of the patch around each pixel. An embedding is one
whose x_t are one-hot. A normalisation y_t = w * x_t + b, with x_t its normalised input, has the
gradients sum_t g_t * x_t and sum_t g_t.

So one forward and one backward pass, which computes no gradient of a weight, gives the x_t and g_t
that norms and sums are made of.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from dp_sgd import Batch, Tensors, full_precision

# What is kept of one parameter: [x, g], or [gradient [B, size]] where that has fewer numbers.
Factors = list[torch.Tensor]


def clipped_gradient_sum(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
    """sum_i g_i min(1, C / ||g_i||), as dp_sgd.clipped_gradient_sum.

    B > 0. Parameters that the loss does not reach are left out.
    """
    factors = activations_and_backprops(model, parameters, batch)
    norms = joint_norms(factors)
    finite = norms.isfinite()
    weights = (C / norms[finite]).clamp(max=1.0)   # C / 0 is inf
    all_finite = finite.all().item()   # asked once, not per parameter: a GPU waits for it
    total = {}
    for name in list(factors):
        kept = factors.pop(name)   # its memory is free once it is summed
        if not all_finite:
            kept = [v[finite] for v in kept]
        total[name] = weighted_grad_sum(kept, weights, parameters[name].shape)
    return total


def layers_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """{path: layer} of the layers that own the parameters; ValueError if one has no rule."""
    layers = {path: model.get_submodule(path)
              for path in dict.fromkeys(name.rpartition(".")[0] for name in names)}
    for path, layer in layers.items():
        if not has_rule(layer):
            raise ValueError(f"ghost clipping has no rule for the layer {path}, {layer}")
    return layers


def has_rule(layer: nn.Module) -> bool:
    """Whether the formulas above hold for this layer."""
    if isinstance(layer, nn.Conv1d):
        return (layer.groups, *layer.kernel_size, *layer.stride, *layer.padding) == (1, 1, 1, 0)
    if isinstance(layer, nn.Conv2d):
        return ((layer.groups, *layer.dilation) == (1, 1, 1) and layer.padding_mode == "zeros"
                and not isinstance(layer.padding, str))
    if isinstance(layer, nn.LayerNorm):
        return len(layer.normalized_shape) == 1
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is None and not layer.scale_grad_by_freq
    return isinstance(layer, nn.Linear | nn.GroupNorm)


def activations_and_backprops(model: nn.Module, parameters: Tensors,
                              batch: Batch) -> dict[str, Factors]:
    """What norms and sums are made of, where example i's loss is the mean of model(*its K draws).

    batch: tensors [B, K, ...]. Returns {name: [x [B, T, inputs], g [B, T, outputs]]}, or {name:
    [gradient [B, size]]} of biases, of normalisations and where that is smaller. Each layer's part
    is taken as soon as the backward pass has reached it, so that its output can be freed.
    """
    B, K = batch[0].shape[:2]
    calls = {name: [] for name in parameters}   # one entry per call of the layer

    def record(layer: nn.Module, path: str, x: torch.Tensor, g: torch.Tensor) -> None:
        x, g = per_example_layout(layer, x, g, B)
        if (weight := f"{path}.weight") in calls:
            normalises = isinstance(layer, nn.LayerNorm | nn.GroupNorm)
            calls[weight].append([(x * g).sum(1)] if normalises else smaller_form(x, g))
        if (bias := f"{path}.bias") in calls:
            calls[bias].append([g.sum(1)])

    def add_hook(layer: nn.Module, arguments: tuple, output: torch.Tensor, path: str) -> None:
        if not output.requires_grad:   # nothing before it is trained: the graph begins here
            output.requires_grad_()
        output.register_hook(partial(record, layer, path, arguments[0].detach()))

    hooks = [layer.register_forward_hook(partial(add_hook, path=path))
             for path, layer in layers_of(model, parameters).items()]
    try:
        losses = functional_call(model, parameters, tuple(x.flatten(0, 1) for x in batch))
    finally:
        for hook in hooks:
            hook.remove()
    (losses.sum() / K).backward()
    return {name: merge_calls(entries) for name, entries in calls.items() if entries}


def smaller_form(x: torch.Tensor, g: torch.Tensor) -> Factors:
    """[x, g], or [their product, flat], whichever has fewer numbers."""
    T, inputs, outputs = x.shape[1], x.shape[-1], g.shape[2]
    explicit = x.dim() == 3 and T * (inputs + outputs) > inputs * outputs
    return [(g.mT @ x).flatten(1)] if explicit else [x, g]


def merge_calls(entries: list[Factors]) -> Factors:
    """The calls of one layer as one: tokens one after the other, gradients added up."""
    if len(entries) == 1:
        return entries[0]
    if all(len(entry) == 2 for entry in entries):
        return [torch.cat(tensors, dim=1) for tensors in zip(*entries, strict=True)]
    return [sum(v[0] if len(v) == 1 else (v[1].mT @ v[0]).flatten(1) for v in entries)]


def per_example_layout(layer: nn.Module, x: torch.Tensor, g: torch.Tensor,
                       B: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's input and output gradient [B*K, ...] as x and g [B, T, features].

    An Embedding's x is int [B, T]. bfloat16 becomes float32: norms and sums need the digits.
    """
    x, g = (v.float() if v.dtype == torch.bfloat16 else v for v in (x, g))
    if isinstance(layer, nn.Embedding):
        return x.reshape(B, -1), g.reshape(B, -1, g.shape[-1])
    if isinstance(layer, nn.LayerNorm):
        x = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    elif isinstance(layer, nn.GroupNorm):
        x = F.group_norm(x, layer.num_groups, eps=layer.eps)
    elif isinstance(layer, nn.Conv2d):
        kernel = layer.kernel_size, layer.stride, layer.padding
        if kernel != ((1, 1), (1, 1), (0, 0)):
            x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.GroupNorm):   # channels come second
        x, g = (v.flatten(2).transpose(1, 2) for v in (x, g))
    return x.reshape(B, -1, x.shape[-1]), g.reshape(B, -1, g.shape[-1])


def joint_norms(factors: dict[str, Factors]) -> torch.Tensor:
    """Norm [B] of each example's gradient over all the parameters."""
    return sum(map(ghost_norms_squared, factors.values())).clamp(min=0).sqrt()


@full_precision()
def ghost_norms_squared(factors: Factors) -> torch.Tensor:
    """||gradient||^2 [B] of one parameter, rather a little too large than too small.

    Where the terms of the double sum cancel, rounding errors can exceed the result, and an example
    would pass unclipped. A bound on them is added: it is proportional to (sum_t |x_t| |g_t|)^2, and
    to the square root of the vectors' length, as the errors of a dot product are (Higham and Mary
    2019). Other norms grow by less than a thousandth.
    """
    if len(factors) == 1:
        return torch.linalg.vector_norm(factors[0], dim=1).square()
    x, g = factors
    if x.dim() == 2:   # indices
        products, size = (x[:, :, None] == x[:, None, :]) * (g @ g.mT), g.shape[2]
    else:
        products, size = (x @ x.mT) * (g @ g.mT), x.shape[2] + g.shape[2]
    lengths = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)   # sum_t |x_t| |g_t|
    rounding = 2 * torch.finfo(g.dtype).eps * math.sqrt(size) * lengths.square()
    return products.sum((1, 2)) + rounding


@full_precision()
def weighted_grad_sum(factors: Factors, weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """sum_i weights_i gradient_i of one parameter of this shape."""
    if len(factors) == 1:
        return (weights @ factors[0]).reshape(shape)
    x, g = factors
    weights = weights[:, None, None]
    if x.dim() == 2:
        return g.new_zeros(shape).index_add_(0, x.flatten(), (weights * g).flatten(0, 1))
    if x.shape[2] < g.shape[2]:   # scale the smaller one
        x = weights * x
    else:
        g = weights * g
    return (g.flatten(0, 1).T @ x.flatten(0, 1)).reshape(shape)
