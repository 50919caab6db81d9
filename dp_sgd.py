"""DP-SGD by hand (Abadi et al. 2016) on torch.func: the private step of DP-LDM.

One logical step, with N examples, sample_rate q, noise multiplier sigma, clipping norm C:

    B   = each example independently with probability q                        poisson_sample
    g_i = gradient of example i's loss, averaged over its K noise draws        per_example_gradients
    s   = sum over i in B of g_i * min(1, C / ||g_i||)                         clipped_gradient_sum
    g   = (s + N(0, (sigma C)^2 I)) / (q N C)                                  add_noise

Adding or removing one example changes s by at most C, and nothing else: the step is one Poisson-subsampled
Gaussian mechanism, which accountant.py composes. The divisor is the *expected* batch size q N, a constant:
the actual size is private. Dividing by C as well makes the learning rate independent of C (De et al. 2022)
and keeps the numbers far above Adam's epsilon.
"""

import json
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import accountant
from data import atomic_write

NEIGHBOURS = "one example added or removed"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PrivacyPlan:
    """Every number that the privacy of a run depends on. Sampler, noise and accountant read it from here.

    Neighbouring data sets differ by one example, added or removed; N and the list of classes are taken to be
    public. The budget is that of one run: runs on the same data add up.
    """
    num_examples: int         # N
    expected_batch: int       # q N
    steps: int                # logical steps
    noise_multiplier: float   # sigma, in units of max_grad_norm
    max_grad_norm: float      # C
    delta: float

    @property
    def sample_rate(self) -> float:
        return self.expected_batch / self.num_examples

    @property
    def epsilon(self) -> float:
        return accountant.epsilon(self.sample_rate, self.noise_multiplier, self.steps, self.delta)


def make_plan(num_examples: int, expected_batch: int, epochs: float, max_grad_norm: float,
              target_epsilon: float, delta: float, rule: str = "rdp", ledger: Sequence[dict] = ()) -> PrivacyPlan:
    """The plan of about `epochs` passes over the data that spends at most (target_epsilon, delta).

    `ledger` holds the private steps that the weights depend on already: the target is for them and the
    plan together. `rule` is the accountant, of accountant.ACCOUNTANTS. ValueError where no such plan exists.
    """
    if not 1 <= expected_batch <= num_examples:
        raise ValueError(f"expected batch {expected_batch} must be from 1 to the number of examples, {num_examples}")
    if not 0 < epochs < 1e9:
        raise ValueError(f"epochs must be positive and below 1e9, not {epochs}")
    if not 1e-12 <= max_grad_norm < math.inf:   # float32 could not square smaller gradients, nor hold their noise
        raise ValueError(f"max_grad_norm must be at least 1e-12 and finite, not {max_grad_norm}")
    if ledger and (before := spent_epsilon(ledger, delta, rule)) >= target_epsilon:
        raise ValueError(f"the weights have spent epsilon {before:.4f} at delta {delta:g} already, and the budget for "
                         f"all private steps together is {target_epsilon:g}: epsilon 0 remains")
    steps = max(1, round(epochs * num_examples / expected_batch))
    sigma = accountant.calibrate_noise(target_epsilon, delta, expected_batch / num_examples, steps, rule,
                                       spent=segments(ledger))
    return PrivacyPlan(num_examples, expected_batch, steps, sigma, max_grad_norm, delta)


# ---- the ledger: every private step that some weights depend on, as plain values in their checkpoint ----

def ledger_entry(plan: PrivacyPlan, steps: int, insecure_noise_seed: int = -1) -> dict:
    """What `steps` steps of `plan` have done to the weights. A published noise seed is put on record."""
    entry = {**asdict(plan), "steps": steps, "sample_rate": plan.sample_rate, "neighbours": NEIGHBOURS,
             "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                          "numpy": np.__version__, "scipy": scipy.__version__}}
    return entry if insecure_noise_seed < 0 else {**entry, "insecure_noise_seed": insecure_noise_seed}


def is_seeded(ledger: Sequence[dict]) -> bool:
    """Whether the noise of some step follows from a seed, so that nothing is private."""
    return any("insecure_noise_seed" in entry for entry in ledger)


def segments(ledger: Sequence[dict]) -> list[tuple[float, float, int]]:
    """The ledger as the accountant's [(sample_rate, noise_multiplier, steps), ...]."""
    return [(e["expected_batch"] / e["num_examples"], e["noise_multiplier"], e["steps"]) for e in ledger]


def spent_epsilon(ledger: Sequence[dict], delta: float, rule: str = "rdp") -> float:
    """Epsilon at this delta of all the ledger's steps together, by one of accountant.ACCOUNTANTS.

    Private data sets may overlap, so the budgets of runs on different ones add up too.
    """
    return accountant.total_epsilon(segments(ledger), delta, rule)


def all_epsilons(ledger: Sequence[dict], delta: float) -> dict[str, float]:
    """{accountant: epsilon}, without PLD where it does not reach (pld.LIMITS)."""
    found = {}
    for rule in accountant.ACCOUNTANTS:
        with suppress(ValueError):
            found[rule] = spent_epsilon(ledger, delta, rule)
    return found


def refuse_overspending(ledger: Sequence[dict], plan: PrivacyPlan, target_epsilon: float, rule: str = "rdp") -> float:
    """Epsilon of the ledger's steps and the plan's. ValueError, with what remains, if it would pass the target."""
    total = spent_epsilon([*ledger, ledger_entry(plan, plan.steps)], plan.delta, rule)
    if total > target_epsilon * (1 + 1e-9):
        remains = max(0.0, target_epsilon - spent_epsilon(ledger, plan.delta, rule))
        raise ValueError(f"{plan.steps} steps would bring epsilon to {total:.4f} at delta {plan.delta:g}, past the "
                         f"budget of {target_epsilon:g}, of which {remains:.4f} remains")
    return total


def privacy_json(checkpoint: Path) -> Path:
    """Where the readable ledger of a checkpoint lies: beside it."""
    return checkpoint.with_suffix(".privacy.json")


def write_privacy_json(checkpoint: Path, ledger: Sequence[dict], delta: float) -> None:
    """The ledger of a checkpoint for people to read, with epsilon as it follows from it. No program reads it."""
    facts = {"checkpoint": checkpoint.name,
             "guarantee": "NONE: the noise follows from a seed that is written below" if is_seeded(ledger) else
                          f"(epsilon, delta)-differential privacy; neighbours: {NEIGHBOURS}",
             "epsilon": all_epsilons(ledger, delta),
             "delta": delta, "ledger": list(ledger)}
    with atomic_write(privacy_json(checkpoint)) as file:
        file.write(json.dumps(facts, indent=2).encode() + b"\n")


def secure_generator(insecure_seed: int | None = None) -> np.random.Generator:
    """A generator seeded with 128 bits of the operating system's entropy, for noise and batches.

    Whoever knows the noise can subtract it, so it must not follow from a published seed. torch's own CPU
    generator would not do: it uses 32 bits of its seed, few enough to try them all. PCG64 is no
    cryptographic generator either, and float32 noise is open to the attack of Mironov 2012: a deployment
    against such adversaries needs a CSPRNG and discrete noise. `insecure_seed` is for tests: it voids
    the guarantee. All processes of a run get the same generator, seeded by the first one.
    """
    seed = [np.random.SeedSequence(insecure_seed).entropy]
    if dist.is_initialized():
        dist.broadcast_object_list(seed)
    return np.random.default_rng(seed[0])


def poisson_sample(plan: PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
    """Indices int [B] of one batch: every example with probability sample_rate; B varies and may be 0."""
    return torch.from_numpy(np.flatnonzero(rng.random(plan.num_examples) < plan.sample_rate))


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 matrix products with all their digits, whatever the caller allows: TF32 and bfloat16 have three.

    For norms and sums: an example that counts as 1.001 C would move the sum by more than is accounted for. A gradient
    itself may be rounded, before its norm is taken; that this can depend, by the size of a chunk, on which others share
    it is not accounted for.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def per_example_gradients(loss_fn: Callable, parameters: Tensors, batch: tuple[torch.Tensor, ...]) -> Tensors:
    """Gradient of each example's loss: {name: [B, *shape of the parameter]}.

    loss_fn(parameters, *example) -> scalar, where example is one row of every tensor of `batch` [B, ...].
    """
    return vmap(grad(loss_fn), in_dims=(None,) + (0,) * len(batch))(parameters, *batch)


def clipped_gradient_sum(loss_fn: Callable, parameters: Tensors, batch: tuple[torch.Tensor, ...],
                         max_grad_norm: float, chunk: int) -> Tensors:
    """sum_i g_i * min(1, C / ||g_i||), with the norm taken over all the parameters jointly.

    loss_fn is as in per_example_gradients, or a module as in factored_gradients, which is faster. At most `chunk`
    examples' gradients are in memory at a time. An empty batch sums to zero. An example whose gradient is
    not finite is left out: no weight could bring it within C of nothing.
    """
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    if len(batch[0]) == 0:   # vmap refuses an empty batch
        return total
    for part in zip(*(tensor.split(chunk) for tensor in batch), strict=True):
        if isinstance(loss_fn, nn.Module):
            gradients = factored_gradients(loss_fn, parameters, part)
        else:
            gradients = {name: [g.flatten(1)] for name, g in per_example_gradients(loss_fn, parameters, part).items()}
        norms = joint_norms(gradients)
        finite = norms.isfinite()
        weights = (max_grad_norm / norms[finite]).clamp(max=1.0)   # C/0 is inf, clamped to 1
        all_finite = finite.all().item()   # once per chunk, not per parameter: a GPU waits for it
        for name, factors in gradients.items():
            if not all_finite:
                factors = [v[finite] for v in factors]
            total[name] += weighted_sum(factors, weights, total[name].shape)
    return total


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def largest_chunk(loss_fn: Callable, parameters: Tensors, example: tuple[torch.Tensor, ...], most: int) -> int:
    """The largest power of two of examples, below 2 * most, for whose gradients half of the memory is enough.

    `example`, tensors [1, ...], is repeated to find out; only its shapes matter, so it can be made up.
    """
    device = example[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)   # encoding the images may have needed more
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))   # torchrun's processes on this machine share it
    before, chunk = peak_memory(device), 1
    while True:
        clipped_gradient_sum(loss_fn, parameters, tuple(x.expand(chunk, *x.shape[1:]) for x in example), 1.0, chunk)
        if chunk >= most or 2 * (peak_memory(device) - before) > memory / 2:   # twice the chunk takes twice as much
            return chunk
        chunk *= 2


# ---- ghost clipping with book-keeping: the same sum, without a gradient per example ---------------------

def ghost_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """{path: layer} of the layers that own the parameters `names`. ValueError naming a layer without a rule."""
    layers = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        layer = layers[path] = model.get_submodule(path)
        pointwise = (isinstance(layer, nn.Conv1d) and (layer.groups, *layer.kernel_size, *layer.stride) == (1, 1, 1)
                     and layer.padding == (0,))
        patches = (isinstance(layer, nn.Conv2d) and (layer.groups, *layer.dilation) == (1, 1, 1)
                   and layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
        one_axis = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1
        table = isinstance(layer, nn.Embedding) and layer.padding_idx is None and not layer.scale_grad_by_freq
        if not (isinstance(layer, nn.Linear | nn.GroupNorm) or pointwise or patches or one_axis or table):
            raise ValueError(f"the ghost engine has no rule for the layer {path}, {layer}: give --engine func")
    return layers


def factored_gradients(model: nn.Module, parameters: Tensors, batch: tuple[torch.Tensor, ...]) -> dict[str, list]:
    """The gradients of all examples in factors, where example i's loss is the mean over its K draws of model(*draws).

    batch: tensors [B, K, ...]. Returns {name: [x [B, T, inputs], g [B, T, outputs]]} or, of biases, of normalisations
    and where it is shorter, {name: [gradient [B, size]]}.

    Let a linear layer y_t = W x_t + b be called for t = 1 ... T: all tokens or pixels of all draws of one
    example, and all calls. With g_t = the gradient of the example's loss in y_t (Goodfellow 2015, arXiv 1510.01799;
    Li et al. 2022, arXiv 2110.05679; Bu et al. 2023, arXiv 2210.00038):

        gradient of W     G_i = sum_t g_t x_t^T                              of b   sum_t g_t
        its norm          ||G_i||^2 = sum_{t,s} (x_t . x_s) (g_t . g_s)      two T x T matrices, no G_i
        the clipped sum   sum_i w_i G_i = sum_{i,t} (w_i g_t) x_t^T          one matrix product for all examples

    A convolution is a linear layer of the patch around each pixel, an embedding one whose x_t are one-hot. A
    normalisation y_t = w * x_t + b, x_t its normalised input, has the gradients sum_t g_t * x_t and sum_t g_t. So
    one forward and one backward pass, which computes no gradient of a weight, give the x_t and g_t that norms and
    sums are made of. Each layer's part is taken as soon as the backward pass has come to it, so that its output can
    be freed.
    """
    B, K = batch[0].shape[:2]
    found = {name: [] for name in parameters}   # one entry per call of the layer

    def keep(layer, path, x, g):
        x, g = by_example(layer, x, g, B)
        if (weight := f"{path}.weight") in found:
            found[weight].append([(x * g).sum(1)] if isinstance(layer, nn.LayerNorm | nn.GroupNorm) else shorter(x, g))
        if (bias := f"{path}.bias") in found:
            found[bias].append([g.sum(1)])

    def watch(layer, arguments, output, path):
        if not output.requires_grad:   # nothing before it is trained: the graph begins here
            output.requires_grad_()
        output.register_hook(partial(keep, layer, path, arguments[0].detach()))

    hooks = [layer.register_forward_hook(partial(watch, path=path))
             for path, layer in ghost_layers(model, parameters).items()]
    try:
        losses = functional_call(model, parameters, tuple(x.flatten(0, 1) for x in batch))
    finally:
        for hook in hooks:
            hook.remove()
    (losses.sum() / K).backward()
    return {name: joined(entries) for name, entries in found.items() if entries}


def shorter(x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """[x, g], or [the gradients that are their product, flat], whichever has fewer numbers."""
    explicit = x.dim() == 3 and x.shape[1] * (x.shape[2] + g.shape[2]) > x.shape[2] * g.shape[2]
    return [(g.mT @ x).flatten(1)] if explicit else [x, g]


def joined(entries: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The calls of one layer as if they were one: tokens one after the other, gradients added up."""
    if len(entries) == 1:
        return entries[0]
    if all(len(entry) == 2 for entry in entries):
        return [torch.cat(tensors, dim=1) for tensors in zip(*entries, strict=True)]
    return [sum(v[0] if len(v) == 1 else (v[1].mT @ v[0]).flatten(1) for v in entries)]


def by_example(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, B: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's input and output gradient [B*K, ...] as x and g [B, T, features]; an Embedding's x is int [B, T].

    Both are float32 at least, also where the layer itself computes in bfloat16: norms and sums need the digits.
    """
    x, g = (v.float() if v.dtype == torch.bfloat16 else v for v in (x, g))
    if isinstance(layer, nn.Embedding):
        return x.reshape(B, -1), g.reshape(B, -1, g.shape[-1])
    if isinstance(layer, nn.LayerNorm):
        x = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    elif isinstance(layer, nn.GroupNorm):
        x = F.group_norm(x, layer.num_groups, eps=layer.eps)
    elif isinstance(layer, nn.Conv2d) and (*layer.kernel_size, *layer.stride, *layer.padding) != (1, 1, 1, 1, 0, 0):
        x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.GroupNorm):   # channels come second
        x, g = (v.flatten(2).transpose(1, 2) for v in (x, g))
    return x.reshape(B, -1, x.shape[-1]), g.reshape(B, -1, g.shape[-1])


def joint_norms(gradients: dict[str, list]) -> torch.Tensor:
    """Norm [B] of each example's gradient over all the parameters, see factored_gradients."""
    return sum(map(squared_norms, gradients.values())).clamp(min=0).sqrt()


@full_precision()
def squared_norms(factors: list[torch.Tensor]) -> torch.Tensor:
    """||gradient||^2 [B] of one parameter, see factored_gradients; of factors rather a little too much than too little.

    Where the terms of the sum cancel, its rounding errors can be larger than itself, and an example would pass
    unclipped. They are bounded in proportion to (sum_t |x_t| |g_t|)^2, with the square root of the vectors' length as a
    dot product's errors grow by it (Higham and Mary 2019). Other norms hardly change, by less than a thousandth.
    """
    if len(factors) == 1:
        return torch.linalg.vector_norm(factors[0], dim=1).square()
    x, g = factors
    if x.dim() == 2:   # indices
        products, size = (x[:, :, None] == x[:, None, :]) * (g @ g.mT), g.shape[2]
    else:
        products, size = (x @ x.mT) * (g @ g.mT), x.shape[2] + g.shape[2]
    lengths = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)   # sum_t |x_t| |g_t|
    return products.sum((1, 2)) + 2 * torch.finfo(g.dtype).eps * math.sqrt(size) * lengths.square()


@full_precision()
def weighted_sum(factors: list[torch.Tensor], weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """sum_i weights_i gradient_i of one parameter of this shape."""
    if len(factors) == 1:
        return (weights @ factors[0]).reshape(shape)
    x, g = factors
    weights = weights[:, None, None]
    if x.dim() == 2:
        return g.new_zeros(shape).index_add_(0, x.flatten(), (weights * g).flatten(0, 1))
    x, g = (weights * x, g) if x.shape[2] < g.shape[2] else (x, weights * g)   # the shorter product
    return (g.flatten(0, 1).T @ x.flatten(0, 1)).reshape(shape)


# ---- noise --------------------------------------------------------------------------------------------------

def add_noise(total: Tensors, plan: PrivacyPlan, rng: np.random.Generator) -> Tensors:
    """The clipped sum with its noise, divided by the expected batch and by C; `total` is overwritten.

    ValueError if the noisy sum is not finite: asked of the exact sum, the answer would not be private.
    """
    std = plan.noise_multiplier * plan.max_grad_norm
    for s in total.values():
        noise = torch.from_numpy(rng.standard_normal(s.shape, dtype=np.float32))
        s += std * noise.to(s.device)
    finite = torch.stack([s.isfinite().all() for s in total.values()])   # asked for together: a GPU answers slowly
    if not finite.all():
        name = list(total)[finite.int().argmin()]
        raise ValueError(f"the noisy sum of clipped gradients of {name} is not finite: training has diverged")
    return {name: s / (plan.expected_batch * plan.max_grad_norm) for name, s in total.items()}


def noisy_gradient(loss_fn: Callable, parameters: Tensors, batch: tuple[torch.Tensor, ...], plan: PrivacyPlan,
                   chunk: int, rng: np.random.Generator) -> Tensors:
    """The private gradient of one logical step, in units of C: all that an optimiser may see of `batch`.

    Where there are several processes, each clips its share of the batch. The noise is that of one: their
    generators are alike (secure_generator), so all of them add the same numbers to the same sum.
    """
    rank, world = rank_and_world()
    share = tuple(x[rank::world] for x in batch)
    total = clipped_gradient_sum(loss_fn, parameters, share, plan.max_grad_norm, chunk)
    sum_over_processes(total.values())
    return add_noise(total, plan, rng)


# ---- several processes (torchrun) ---------------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) unless train.py runs under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Add up every tensor over all processes, in place; the result is the same to the last bit everywhere."""
    if dist.is_initialized():
        tensors = list(tensors)
        flat = torch.cat([t.flatten() for t in tensors])   # one message instead of many
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))
