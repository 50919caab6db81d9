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
that norms and sums are made of. Both are computed in float64.
"""

from collections.abc import Iterable
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from dp_sgd import Batch, Tensors, clip_weights, norms, weighted_sum

# What is kept of one parameter: [x, g], or [gradient [B, size]] where that has fewer numbers.
Factors = list[torch.Tensor]
COPIED = 2**17   # numbers that are copied to float64 at a time: they stay in the cache
# PrivacyPlan.clip_to relies on these two: errors stay below N 2^-28 (docs/threat-model.md).
BLOCK = 2**9             # tokens that are summed up before they are added to the total
LEAST_SHARE = 2.0**-12   # no gradient's norm counts as less than this share of sum_t |x_t| |g_t|

probed = WeakKeyDictionary()   # model: names of the parameters whose layers were tried


def clipped_gradient_sum(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
    """sum_i g_i min(1, C / ||g_i||), as dp_sgd.clipped_gradient_sum.

    B > 0. Parameters that the loss does not reach are left out. ValueError for a layer that has no
    rule, or whose inputs do not have the examples in their first dimension.
    """
    if not parameters.keys() <= probed.get(model, set()):
        for count in (2, 3):   # made up: a size of the private batch might be right by chance
            made_up = (x.new_zeros((count, *x.shape[1:])) for x in batch)
            activations_and_backprops(model, parameters, tuple(made_up))
        probed[model] = {*parameters}
    factors = activations_and_backprops(model, parameters, batch)
    size = sum(p.numel() for p in parameters.values())
    weights = clip_weights(map(ghost_norms, factors.values()), size, C)
    finite = weights > 0
    all_finite = finite.all().item()   # asked once, not per parameter: a GPU waits for it
    if not all_finite:
        weights = weights[finite]
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
        if len(arguments[0]) != B * K:
            raise ValueError("ghost clipping needs the examples in the first dimension: the layer "
                             f"{path} gets {len(arguments[0])} for {B * K}")
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


def ghost_norms(factors: Factors) -> torch.Tensor:
    """||gradient|| float64 [B] of one parameter, rather too large than too small.

    The terms of the double sum can cancel, so that rounding errors exceed the result. (LEAST_SHARE
    sum_t |x_t| |g_t|)^2 is added, which is more than they can be. It also keeps each example's
    terms in the clipped sum below C / LEAST_SHARE, and so the rounding errors of that sum.
    """
    rows = max(1, COPIED // max(v.shape[1:].numel() for v in factors))
    if len(factors) == 1:
        return norms(factors[0], rows)
    parts = (v.split(rows) for v in factors)
    return torch.cat([norms_by_gram(x, g.double()) for x, g in zip(*parts)])


def norms_by_gram(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """ghost_norms [b] of x [b, T, inputs], or indices [b, T], and g float64 [b, T, outputs]."""
    x = x.double()
    xx = x[:, :, None] == x[:, None, :] if x.dim() == 2 else x @ x.mT   # 2: indices
    products = xx * (g @ g.mT)
    lengths = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)   # sum_t |x_t| |g_t|
    return (products.sum((1, 2)).clamp(min=0) + (LEAST_SHARE * lengths).square()).sqrt()


def weighted_grad_sum(factors: Factors, weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """sum_i weights_i gradient_i of one parameter of this shape, in float64."""
    if len(factors) == 1:
        return weighted_sum(weights, factors[0], max(1, COPIED // shape.numel())).reshape(shape)
    weights = weights[:, None, None].expand(*factors[0].shape[:2], 1)   # [B, T, 1]
    tokens = [v.flatten(0, 1).split(BLOCK) for v in (*factors, weights)]
    if factors[0].dim() == 2:   # indices
        zeros = torch.zeros(shape, dtype=torch.float64, device=weights.device)
        return sum(zeros.index_add(0, x, w * g) for x, g, w in zip(*tokens))

    def product(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return a.to(torch.float64, copy=True).mul_(w).T @ b.double()   # w * a would take longer

    if factors[0].shape[2] < factors[1].shape[2]:   # the smaller one first is faster
        return sum(product(x, g, w) for x, g, w in zip(*tokens)).T.reshape(shape)
    return sum(product(g, x, w) for x, g, w in zip(*tokens)).reshape(shape)
