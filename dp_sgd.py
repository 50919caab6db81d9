"""DP-SGD by hand (Abadi et al. 2016, algorithm 1): one private step is four functions.

With N examples, sample rate q, noise multiplier sigma and clipping norm C:

    1   B   = each example independently with probability q              poisson_sample
        g_i = gradient of example i's loss, the mean of its K draws      per_example_gradients
    2,3 s   = sum over i in B of g_i * min(1, C / ||g_i||)               clipped_gradient_sum
    4   g   = (s + N(0, (sigma C)^2 I)) / (q N C)                        add_noise

One example more or less changes s by at most C, and nothing else. So a step is one
Poisson-subsampled Gaussian mechanism, and accountant.py composes the steps. The divisor is the
*expected* batch size q N, a constant: the actual size is private. Division by C makes the learning
rate independent of C (De et al. 2022, section 3) and keeps the numbers far above Adam's epsilon.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from scipy.special import ndtri
from torch import nn
from torch.func import functional_call, grad, vmap

import accountant
from unet import AttentionBlock, SpatialTransformer

Tensors = dict[str, torch.Tensor]
Batch = tuple[torch.Tensor, ...]   # what the loss takes, each tensor [B, K, ...]
ROWS = 16   # gradients that are copied to float64 at a time: copies of all would be slow


@dataclass(frozen=True)
class PrivacyPlan:
    """Every number that the privacy of a run depends on.

    Sampler, noise and accountant read them here. Neighbouring data sets differ by one example,
    added or removed. N and the list of classes are public. Runs on the same data add up.
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
    def clip_to(self) -> float:
        """C / (1 + rho), rho = N 2^-27: the norm that gradients are clipped to.

        So neighbouring sums differ by C at most as they are computed, rounding included. A float64
        sum of n terms errs by n 2^-53 times the sum of their sizes at most (Higham 2002, section
        4.2). Each engine keeps that below rho / 2 (docs/threat-model.md).
        """
        return self.max_grad_norm / (1 + self.num_examples * 2.0**-27)

    @property
    def epsilon(self) -> float:
        return accountant.epsilon(self.sample_rate, self.noise_multiplier, self.steps, self.delta)


def make_plan(num_examples: int, expected_batch: int, epochs: float, max_grad_norm: float,
              epsilon: float, delta: float, accounting: ModuleType = accountant,
              spent: Sequence[tuple[float, float, int]] = ()) -> PrivacyPlan:
    """The plan of about `epochs` passes over the data that spends at most (epsilon, delta).

    accounting: the module accountant, or another with its total_epsilon and calibrate_noise.
    spent: segments (sample_rate, noise_multiplier, steps) that the weights depend on already; the
    budget is for them and the plan together. ValueError where no such plan exists.
    """
    if not 1 <= expected_batch <= num_examples:
        raise ValueError(f"expected batch {expected_batch} must be from 1 to the number of "
                         f"examples, {num_examples}")
    if not 0 < epochs < 1e9:
        raise ValueError(f"epochs must be positive and below 1e9, not {epochs}")
    # float32 could not square smaller gradients, nor hold their noise.
    if not 1e-12 <= max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm must be at least 1e-12 and finite, not {max_grad_norm}")
    if spent and (before := accounting.total_epsilon(spent, delta)) >= epsilon:
        raise ValueError(f"the weights have spent epsilon {accountant.in_words(before)} at delta "
                         f"{delta:g} already, and the budget for all private steps together is "
                         f"{epsilon:g}: epsilon 0 remains")
    steps = max(1, round(epochs * num_examples / expected_batch))
    sigma = accounting.calibrate_noise(epsilon, delta, expected_batch / num_examples, steps,
                                       spent=spent)
    return PrivacyPlan(num_examples, expected_batch, steps, sigma, max_grad_norm, delta)


def private_parameter_names(model: nn.Module, context_tokens: int = 1) -> list[str]:
    """What the private stage trains: the embedder and the attention modules (DP-LDM, section 3).

    With one context token, the softmax of cross-attention runs over one key and is the constant 1.
    to_q, to_k and the norm before them cannot change the output. Their gradient is zero, so DP-SGD
    would train them on pure noise, as the authors' code does. They stay frozen.
    """
    attention = tuple(f"{name}." for name, module in model.named_modules()
                      if isinstance(module, AttentionBlock | SpatialTransformer))
    useless = ("attn2.to_q.", "attn2.to_k.", ".norm2.") if context_tokens == 1 else ()
    return [name for name, _ in model.named_parameters()
            if name.startswith("embedder.")
            or name.startswith(attention) and not any(part in name for part in useless)]


class SystemGenerator:
    """numpy's random and standard_normal, with every bit from the operating system's generator.

    Whoever knows the noise can subtract it. A generator with a seed and a state can be guessed from
    the numbers that are published: with label dropout 0, the null class sees nothing but noise.
    """

    def random(self, size: int | Sequence[int]) -> np.ndarray:
        """Uniform on [0, 1): multiples of 2^-53."""
        return (system_bits(size) >> 11) * 2.0**-53

    def standard_normal(self, size: int | Sequence[int], dtype: type = np.float64) -> np.ndarray:
        """Phi^-1(u) for a u in (0, 1/2) of 63 bits, with a random sign: 53 bits cut off tails."""
        bits = system_bits(size)
        numbers = ndtri((bits >> 1) * 2.0**-64 + 2.0**-65)
        return np.where(bits & 1, numbers, -numbers).astype(dtype, copy=False)


def system_bits(size: int | Sequence[int]) -> np.ndarray:
    """Random uint64 numbers of this shape."""
    return np.frombuffer(os.urandom(8 * np.prod(size, dtype=int)), np.uint64).reshape(size)


def secure_generator(insecure_seed: int | Sequence[int] | None = None) -> np.random.Generator:
    """A generator for noise, batches and draws: a SystemGenerator.

    With insecure_seed it is one of numpy's. That is for tests: it voids the guarantee.
    """
    return SystemGenerator() if insecure_seed is None else np.random.default_rng(insecure_seed)


def poisson_sample(plan: PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
    """Indices int [B] of one batch: each example with probability q. B varies and may be 0."""
    return torch.from_numpy(np.flatnonzero(rng.random(plan.num_examples) < plan.sample_rate))


def per_example_gradients(model: nn.Module, parameters: Tensors, batch: Batch) -> Tensors:
    """Each example's gradient of the mean loss of its K draws: {name: [B, *shape of parameter]}.

    model(*draws) -> losses [K].
    """
    def loss(parameters: Tensors, *draws: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, draws).mean()

    return vmap(grad(loss), in_dims=(None,) + (0,) * len(batch))(parameters, *batch)


def clip_weights(norms: Iterable[torch.Tensor], size: int, C: float) -> torch.Tensor:
    """min(1, C / ||g_i||) [B] from the norms, float64 [B] each, of g_i's parts of `size` in all.

    ||g_i|| is rounded up by more than a sum of so many squares can be too low. An example whose
    norm is not finite gets 0: no scale could clip it to C.
    """
    norms = torch.stack(list(norms)).norm(dim=0) * (1 + (size + 8) * 2.0**-53)   # 8: two roots
    return torch.where(norms.isfinite(), (C / norms).clamp(max=1.0), 0.0)   # C / 0 is inf


def clipped_gradient_sum(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
    """sum_i g_i min(1, C / ||g_i||) in float64, the norm taken over all the parameters jointly.

    B > 0. Gradients may be rounded before their norm is taken, but norms and sums need all digits:
    an example that counts as 1.001 C would move the sum by more than the accountant knows.
    variants/ghost.py computes the same sum faster.
    """
    grads = per_example_gradients(model, parameters, batch)
    size = sum(p.numel() for p in parameters.values())
    weights = clip_weights(map(norms, grads.values()), size, C)
    return {name: weighted_sum(weights, g) for name, g in grads.items()}


def norms(g: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """||g_i|| float64 [B] of gradients [B, ...]."""
    return torch.cat([part.double().norm(dim=1) for part in g.flatten(1).split(rows)])


def weighted_sum(weights: torch.Tensor, g: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """sum_i weights_i g_i in float64, of gradients [B, ...]. Weight 0 silences infinity and NaN."""
    return sum(w @ part.double().nan_to_num(0.0, 0.0, 0.0) for w, part in zip(
        weights.split(rows), g.flatten(1).split(rows))).reshape(g.shape[1:])


def in_chunks(clipped_sum: Callable, physical_batch: int) -> Callable:
    """clipped_sum with at most physical_batch examples in memory. An empty batch sums to zero."""
    def sum_of_chunks(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for k in range(0, len(batch[0]), physical_batch):
            chunk = tuple(x[k:k + physical_batch] for x in batch)
            for name, s in clipped_sum(model, parameters, chunk, C).items():
                total[name] += s
        return total

    return sum_of_chunks


def add_noise(total: Tensors, plan: PrivacyPlan, rng: np.random.Generator) -> Tensors:
    """The clipped sum with its noise, divided by the expected batch and by C.

    `total`, in float64, is overwritten. The low bits of floating-point noise give away what it was
    added to (Mironov 2012), so they are rounded off. ValueError if the noisy sum is not finite: the
    same question about the exact sum would have an answer that is not private.
    """
    std = plan.noise_multiplier * plan.max_grad_norm
    grid = 2.0 ** round(math.log2(std or plan.max_grad_norm) - 20)
    for s in total.values():
        s += std * torch.from_numpy(rng.standard_normal(s.shape)).to(s.device)
        s.div_(grid).round_().mul_(grid)
    # One question for all parameters: a GPU answers slowly.
    if not torch.stack([s.isfinite().all() for s in total.values()]).all():
        raise ValueError("the noisy sum of clipped gradients is not finite: training has diverged")
    return {name: s / (plan.expected_batch * plan.max_grad_norm) for name, s in total.items()}
