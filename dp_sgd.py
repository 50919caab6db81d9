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
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
from torch.func import grad, vmap

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
    if not (epochs > 0 and math.isfinite(epochs)):
        raise ValueError(f"epochs must be positive, not {epochs}")
    if not (max_grad_norm > 0 and math.isfinite(max_grad_norm)):
        raise ValueError(f"max_grad_norm must be positive, not {max_grad_norm}")
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
    seeded = any("insecure_noise_seed" in entry for entry in ledger)
    facts = {"checkpoint": checkpoint.name,
             "guarantee": "NONE: the noise follows from a seed that is written below" if seeded else
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
    the guarantee.
    """
    return np.random.default_rng(insecure_seed)


def poisson_sample(plan: PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
    """Indices int [B] of one batch: every example with probability sample_rate; B varies and may be 0."""
    return torch.from_numpy(np.flatnonzero(rng.random(plan.num_examples) < plan.sample_rate))


def per_example_gradients(loss_fn: Callable, parameters: Tensors, batch: tuple[torch.Tensor, ...]) -> Tensors:
    """Gradient of each example's loss: {name: [B, *shape of the parameter]}.

    loss_fn(parameters, *example) -> scalar, where example is one row of every tensor of `batch` [B, ...].
    """
    return vmap(grad(loss_fn), in_dims=(None,) + (0,) * len(batch))(parameters, *batch)


def clipped_gradient_sum(loss_fn: Callable, parameters: Tensors, batch: tuple[torch.Tensor, ...],
                         max_grad_norm: float, chunk: int) -> Tensors:
    """sum_i g_i * min(1, C / ||g_i||), with the norm taken over all the parameters jointly.

    At most `chunk` examples' gradients are in memory at a time. An empty batch sums to zero. An example
    whose gradient is not finite is left out: no weight could bring it within C of nothing.
    """
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    if len(batch[0]) == 0:   # vmap refuses an empty batch
        return total
    for part in zip(*(tensor.split(chunk) for tensor in batch), strict=True):
        gradients = per_example_gradients(loss_fn, parameters, part)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        finite = norms.isfinite()
        weights = (max_grad_norm / norms[finite]).clamp(max=1.0)   # C/0 is inf, clamped to 1
        for name, g in gradients.items():
            total[name] += torch.tensordot(weights, g if finite.all() else g[finite], dims=1)
    return total


def add_noise(total: Tensors, plan: PrivacyPlan, rng: np.random.Generator) -> Tensors:
    """The clipped sum with its noise, divided by the expected batch and by C; `total` is overwritten.

    ValueError if the noisy sum is not finite: asked of the exact sum, the answer would not be private.
    """
    std = plan.noise_multiplier * plan.max_grad_norm
    for name, s in total.items():
        noise = torch.from_numpy(rng.standard_normal(s.shape, dtype=np.float32))
        s += std * noise.to(s.device)
        if not s.isfinite().all():
            raise ValueError(f"the noisy sum of clipped gradients of {name} is not finite: training has diverged")
    return {name: s / (plan.expected_batch * plan.max_grad_norm) for name, s in total.items()}


def noisy_gradient(loss_fn: Callable, parameters: Tensors, batch: tuple[torch.Tensor, ...], plan: PrivacyPlan,
                   chunk: int, rng: np.random.Generator) -> Tensors:
    """The private gradient of one logical step, in units of C: all that an optimiser may see of `batch`."""
    return add_noise(clipped_gradient_sum(loss_fn, parameters, batch, plan.max_grad_norm, chunk), plan, rng)
