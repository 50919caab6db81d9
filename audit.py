"""Attack the private step and broken copies of it: does an attacker learn more than allowed?

A proof is about the algorithm on paper; an audit is about the code. It guesses whether a known
example, the canary, was in the data. Guesses that are better than (epsilon, delta)-DP permits
refute the claim. Worse guesses prove nothing, unless the same audit catches broken code.

    A  canaries through the real clip-sum-noise functions: each score must be N(included, sigma^2)
    B  the same over T steps: the attacker's guesses bound epsilon from below (Nasr et al. 2023)
    C  train.py's own loop with and without a canary image (Jagielski et al. 2020): slow
    D  train.py's own loop once, with thousands of canaries (Steinke et al. 2023)

    python audit.py                           # A, B and checks of what they cannot see: 15 seconds
    python audit.py --end-to-end --runs 200   # C: two minutes
    python audit.py --one-run                 # D: three minutes

Each audit wrongly accuses correct code with probability ERROR or less, C with 2 * END_TO_END_ERROR,
D with ONE_RUN_ERROR for each of its two attackers. runtime/bounds.py has the statistics.
"""

if __name__ == "__main__":   # Ctrl-C while packages load
    import runtime.quiet  # noqa: F401

import copy
import io
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR
from functools import cache, partial

import numpy as np
import torch
from scipy import stats
from torch import nn

import accountant
import dp_sgd
import train
from accountant import in_words
from dp_sgd import Batch, PrivacyPlan, Tensors, in_chunks, make_plan, private_parameter_names
from ldm import LatentDiffusion, sample_t_and_noise
from runtime import bounds, threads
from runtime.checkpoints import build_model
from runtime.cli import Parser, one_line_errors
from runtime.config import Config
from runtime.latents import encode_dataset
from variants import ghost, pld

ERROR, END_TO_END_ERROR, ONE_RUN_ERROR = 1e-6, 0.005, 0.05
CANARIES, CHUNK, STEPS = 1000, 100, 4   # canaries per call, examples per chunk, T
# Four steps of noise 2 are together 1-Gaussian-DP: epsilon 4.38. On average half of the canaries
# are in; then they are in all T batches (q = 1), and the expected batch is a mere divisor.
CANARY_PLAN = PrivacyPlan(CANARIES, CANARIES // 2, STEPS, 2.0, 0.1, 1e-5)
SAMPLING_PLAN, PHYSICAL_BATCH = PrivacyPlan(1000, 100, 400, 1.0, 0.1, 1e-5), 10


# ---- the private step, and broken copies of it that train just as well --------------------------

@dataclass(frozen=True)
class Mechanism:
    """The parts of a private step, as train.train_private takes them."""
    clipped_sum: Callable
    add_noise: Callable = dp_sgd.add_noise
    sample: Callable = dp_sgd.poisson_sample

    def step(self, model: nn.Module, parameters: Tensors, batch: Batch, plan: PrivacyPlan,
             rng: np.random.Generator) -> Tensors:
        """The private gradient of one batch: all that an optimiser may see of it."""
        total = self.clipped_sum(model, parameters, batch, plan.clip_to)
        return self.add_noise(total, plan, rng)


def correct(chunk: int) -> Mechanism:
    return Mechanism(in_chunks(dp_sgd.clipped_gradient_sum, chunk))


def correct_ghost(chunk: int) -> Mechanism:
    return Mechanism(in_chunks(ghost.clipped_gradient_sum, chunk))


def with_another_plan(change: Callable, engine: Callable = correct) -> Callable:
    """Correct code whose add_noise is misled: it gets change(plan, B, chunk) after B examples."""
    def misled(chunk: int) -> Mechanism:
        sizes, clipped_sum = [], engine(chunk).clipped_sum

        def sum_and_count(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
            sizes.append(len(batch[0]))
            return clipped_sum(model, parameters, batch, C)

        return Mechanism(sum_and_count, lambda total, plan, rng: dp_sgd.add_noise(
            total, change(plan, sizes.pop(), chunk), rng))
    return misled


def noise_per_chunk(plan: PrivacyPlan, B: int, chunk: int) -> PrivacyPlan:
    """Independent noises of n chunks add up to one with sqrt(n) times the standard deviation."""
    chunks = max(1, math.ceil(B / chunk))
    return replace(plan, noise_multiplier=plan.noise_multiplier * math.sqrt(chunks))


def without_clipping(chunk: int, engine: Callable = correct) -> Mechanism:
    clipped_sum = engine(chunk).clipped_sum
    return Mechanism(lambda model, parameters, batch, C: clipped_sum(model, parameters, batch,
                                                                     math.inf))


def clipping_the_average(chunk: int, engine: Callable = correct) -> Mechanism:
    def clipped_sum(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
        total = without_clipping(chunk, engine).clipped_sum(model, parameters, batch, C)
        norm = torch.stack([s.norm() for s in total.values()]).norm() / max(1, len(batch[0]))
        weight = (C / norm).clamp(max=1.0)
        return {name: s * weight for name, s in total.items()}
    return Mechanism(clipped_sum)


def with_the_embedder_apart(chunk: int) -> Mechanism:
    """U-Net and embedder are clipped to C each: an example's part may have the norm sqrt(2) C."""
    def clipped_sum(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
        total = {}
        grads = dp_sgd.per_example_gradients(model, parameters, batch)
        for part in ("unet", "embedder"):
            own = {name: g for name, g in grads.items() if name.startswith(part)}
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in own.values()]).norm(dim=0)
            scale = (C / norms).clamp(max=1.0)
            total |= {name: torch.tensordot(scale, g, dims=1) for name, g in own.items()}
        return total
    return Mechanism(in_chunks(clipped_sum, chunk))


def shuffled_batches(plan: PrivacyPlan, rng: np.random.Generator) -> list[torch.Tensor]:
    """Batches as most training loops draw them: each epoch a new order, cut into equal pieces."""
    per_epoch = plan.num_examples // plan.expected_batch
    orders = [torch.from_numpy(rng.random(plan.num_examples).argsort())
              for _ in range(math.ceil(plan.steps / per_epoch))]
    return [piece for order in orders for piece in order.split(plan.expected_batch)][:plan.steps]


# name: function (chunk) -> Mechanism
MECHANISMS = {
    "correct code": correct,
    "correct code, ghost engine": correct_ghost,
    "no clipping": without_clipping,
    "noise halved": with_another_plan(lambda plan, B, chunk: replace(
        plan, noise_multiplier=plan.noise_multiplier / 2)),
    "noise once per chunk": with_another_plan(noise_per_chunk),
    "clipping after averaging examples": clipping_the_average,
    "embedder outside the joint norm": with_the_embedder_apart,
    "divisor = actual batch size": with_another_plan(lambda plan, B, chunk: replace(
        plan, expected_batch=max(1, B))),
}


# ---- A and B: canaries through one step ---------------------------------------------------------

class LinearLoss(nn.Module):
    """sum of <theta, x> over the parts: an example's gradient is the example. x [K, m] -> [K]."""

    def __init__(self, m: int, parts: tuple[str, ...]):
        super().__init__()
        for part in parts:
            self.add_module(part, nn.Linear(m, 1, bias=False))

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return sum(part(x).squeeze(1) for part, x in zip(self.children(), batch, strict=True))


def linear_world(m: int, *parts: str) -> tuple[LinearLoss, Tensors]:
    """A LinearLoss and zeros for its parameters, {"PART.weight": [1, m]}."""
    model = LinearLoss(m, parts).requires_grad_(False)
    return model, {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def canary_scores(mechanism: Mechanism, plan: PrivacyPlan, groups: int,
                  rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(included bool [groups * m], scores [T, groups * m]); m = num_examples, T = plan.steps.

    Canary i has the gradient 100 C u_i with u_i = (e_i, e_i) / sqrt(2): one half in the U-Net, one
    in the embedder. Its score is what the noisy sum holds along u_i, in units of C. These
    directions are orthogonal, so correct code has m independent scores: one call is m experiments.
    """
    m = plan.num_examples
    model, parameters = linear_world(m, "unet", "embedder")
    included, scores = rng.random((groups, m)) < 0.5, np.empty((plan.steps, groups, m))
    for group in range(groups):
        x = torch.eye(m)[torch.from_numpy(included[group])]
        x = x[:, None] * (100 * plan.max_grad_norm / math.sqrt(2))   # [B, K = 1, m]
        for step in range(plan.steps):
            private = mechanism.step(model, parameters, (x, x), plan, rng)
            along = sum(private.values()).numpy()[0]
            scores[step, group] = along * (plan.expected_batch / math.sqrt(2))
    return included.reshape(-1), scores.reshape(plan.steps, -1)


def audit_scores(included: np.ndarray, scores: np.ndarray,
                 sigma: float) -> tuple[float, float, bool]:
    """Audit A, of one step's scores [n]: (mean gap, standard deviation, caught).

    The gap must be 1 and the deviation sigma.
    """
    ins, outs, freedom = scores[included], scores[~included], len(scores) - 2
    gap = ins.mean() - outs.mean()
    variance = (len(ins) * ins.var() + len(outs) * outs.var()) / freedom
    half_width = stats.norm.isf(ERROR / 4) * sigma * math.sqrt(1 / len(ins) + 1 / len(outs))
    low, high = stats.chi2.ppf([ERROR / 4, 1 - ERROR / 4], freedom) / freedom
    passed = abs(gap - 1) <= half_width and low <= variance / sigma**2 <= high
    return float(gap), math.sqrt(variance), not passed


def audit_guesses(included: np.ndarray, scores: np.ndarray, sigma: float) -> tuple[float, bool]:
    """Audit B, of T steps' scores [T, n]: (mu_lower, caught: above the claim sqrt(T) / sigma).

    The guess is "in" where the scores add up to more than T/2, which is fixed beforehand. A
    threshold chosen by looking at these scores would fit their noise, and the bound would not hold.
    """
    T = len(scores)
    guess = scores.sum(axis=0) > T / 2
    mu = bounds.gdp_lower_bound(int((guess & ~included).sum()), int((~included).sum()),
                                int((~guess & included).sum()), int(included.sum()), ERROR)
    return mu, mu > math.sqrt(T) / sigma


# ---- what canaries cannot see -------------------------------------------------------------------

def audit_divisor(mechanism: Mechanism, plan: PrivacyPlan,
                  rng: np.random.Generator) -> tuple[float, bool]:
    """(largest / smallest update, caught), without noise: zero gradients may change nothing."""
    plan, updates = replace(plan, noise_multiplier=0.0), []
    model, parameters = linear_world(3, "unet", "embedder")
    for others in (0, 1, 9, 99):
        x = torch.zeros(1 + others, 1, 3)
        x[0, 0, 0] = 100 * plan.max_grad_norm
        private = mechanism.step(model, parameters, (x, 0 * x), plan, rng)
        updates.append(private["unet.weight"][0, 0].item())
    ratio = max(updates) / min(updates)
    return ratio, ratio > 1 + 1e-5


def audit_sampling(batches: list[torch.Tensor], plan: PrivacyPlan) -> tuple[float, bool]:
    """(variance of the batch size / N q (1 - q), caught): it is 1 for Poisson samples."""
    q, sizes = plan.sample_rate, np.array([len(batch) for batch in batches])
    ratio = ((sizes - plan.num_examples * q) ** 2).mean() / (plan.num_examples * q * (1 - q))
    low, high = stats.chi2.ppf([ERROR / 2, 1 - ERROR / 2], len(sizes)) / len(sizes)
    return float(ratio), not low <= ratio <= high


def audit_accounting(claimed: float, batches: list[torch.Tensor],
                     plan: PrivacyPlan) -> tuple[float, bool]:
    """(epsilon_lower, caught: above the claim): epsilon of the rate and the steps observed."""
    drawn, chances = sum(map(len, batches)), plan.num_examples * len(batches)
    q_lower = 1 - bounds.error_upper(chances - drawn, chances, ERROR)
    epsilon = accountant.epsilon(q_lower, plan.noise_multiplier, len(batches), plan.delta)
    return epsilon, epsilon > claimed


def audit_noise_source(new_generator: Callable, plan: PrivacyPlan) -> tuple[float, bool]:
    """(noise left / sigma, caught) after subtracting what an attacker's own generator draws.

    Between independent generators sqrt(2) is left. With a published seed nothing is left, and the
    exact sum shows.
    """
    model, parameters = linear_world(4000, "unet")
    nobody = (torch.empty(0, 1, 4000),)
    ours, theirs = (correct(CHUNK).step(model, parameters, nobody, plan, new_generator())
                    for _ in range(2))
    left = (ours["unet.weight"] - theirs["unet.weight"]).double().square().mean().item()
    left *= (plan.expected_batch / plan.noise_multiplier) ** 2
    return math.sqrt(left), bool(left / 2 < stats.chi2.ppf(ERROR, 4000) / 4000)


# ---- the table ----------------------------------------------------------------------------------

def audit_mechanism(mechanism: Mechanism, groups: int,
                    rng: np.random.Generator) -> tuple[str, list[str]]:
    """(what was measured, the audits that caught it) of one mechanism."""
    plan = CANARY_PLAN
    included, scores = canary_scores(mechanism, plan, groups, rng)
    gap, std, caught_a = audit_scores(included, scores[0], plan.noise_multiplier)
    mu, caught_b = audit_guesses(included, scores, plan.noise_multiplier)
    ratio, caught_divisor = audit_divisor(mechanism, plan, rng)
    bound = in_words(bounds.gdp_epsilon(mu, plan.delta), 3, ROUND_FLOOR)
    text = f"{gap:7.2f}  {std:5.2f}  {bound:>9}"
    verdicts = {"A": caught_a, "B": caught_b, f"divisor check (x {ratio:.0f})": caught_divisor}
    return text, [name for name, caught in verdicts.items() if caught]


def audit_surroundings(rng: np.random.Generator) -> list[tuple]:
    """Rows of sampler, accountant and noise: (variant, broken, what was measured, caught by)."""
    plan = SAMPLING_PLAN
    batches = [dp_sgd.poisson_sample(plan, rng) for _ in range(plan.steps)]
    physical = accountant.epsilon(PHYSICAL_BATCH / plan.num_examples, plan.noise_multiplier,
                                  plan.steps, plan.delta)
    variance = "variance of B {:.2f} of Poisson's"
    left = "noise left after subtraction {:.2f} sigma"

    def spends(claimed: float) -> tuple[str, str, tuple[str, bool]]:
        lower, caught = audit_accounting(claimed, batches, plan)
        return (f"claims {in_words(claimed, 4)}, spends at least {{}}", "accounting",
                (in_words(lower, 4, ROUND_FLOOR), caught))

    rows = [
        ("correct: Poisson sampling", False, variance, "sampling", audit_sampling(batches, plan)),
        ("shuffling accounted as Poisson", True, variance, "sampling",
         audit_sampling(shuffled_batches(plan, rng), plan)),
        ("correct: accountant fed the plan", False, *spends(plan.epsilon)),
        ("accountant fed the physical batch size", True, *spends(physical)),
        ("correct: the system's entropy", False, left, "seed",
         audit_noise_source(dp_sgd.secure_generator, plan)),
        ("a published seed", True, left, "seed",
         audit_noise_source(lambda: np.random.default_rng(0), plan)),
    ]
    return [(name, broken, text.format(value), [f"{check} check"] if caught else [])
            for name, broken, text, check, (value, caught) in rows]


def print_rows(rows: Iterable[tuple]) -> bool:
    """Print a verdict per row; True if correct code passes and every broken variant is caught."""
    as_expected = True
    for name, broken, text, caught in rows:
        verdict = f"CAUGHT by {', '.join(caught)}" if caught else "not caught"
        print(f"{name:39} {text:40} {verdict}", flush=True)
        as_expected &= bool(caught) == broken
    return as_expected


def run_canaries(groups: int) -> bool:
    """Audits A and B and the checks, of correct code and of every variant; prints the table."""
    plan, rng = CANARY_PLAN, dp_sgd.secure_generator()
    mu = math.sqrt(plan.steps) / plan.noise_multiplier
    print(f"claim: gap 1, sd {plan.noise_multiplier:g}; {plan.steps} steps are {mu:g}-Gaussian-DP: "
          f"epsilon {in_words(bounds.gdp_epsilon(mu, plan.delta), 3)} at delta {plan.delta:g}\n"
          f"{groups * CANARIES:,} canaries; an audit accuses correct code with probability "
          f"{ERROR:g} or less\n\n{'':39} {'A: gap':>7}  {'sd':>5}  {'B: epsilon_lower':>9}")
    rows = [(name, not name.startswith("correct"), *audit_mechanism(mechanism(CHUNK), groups, rng))
            for name, mechanism in MECHANISMS.items()]
    return print_rows(rows + audit_surroundings(rng))


# ---- C: end to end ------------------------------------------------------------------------------

def end_to_end_config() -> Config:
    """A tiny model, and a canary whose gradient is large and always much the same."""
    config = Config()
    config.data.image_size, config.run.device = 8, "cpu"
    config.vae.ch_mult, config.vae.z_channels = (1, 2), 4
    config.unet.model_channels, config.unet.num_heads = 16, 2
    config.diffusion.label_dropout = 0.0
    config.private.noise_multiplicity, config.private.embedder_scale = 8, 300.0
    return config


END_TO_END = end_to_end_config()
END_TO_END_PLAN = PrivacyPlan(8, 4, 4, 4.0, 0.1, 1e-5)   # q = 1/2, T = 4, sigma = 4: epsilon 1.16


@dataclass
class World:
    """A model and its private data; the last image is the canary."""
    model: LatentDiffusion
    z_0: torch.Tensor         # [N, C, h, w]
    labels: torch.Tensor      # int [N]
    direction: torch.Tensor   # [dim], the canary's gradient


def tiny_world(rng: np.random.Generator) -> World:
    """The canary is the only image of class 1, as an attacker would choose.

    No other image's gradient touches that embedding.
    """
    model = build_model(END_TO_END.architecture(2))
    for p in model.unet.parameters():   # layers that start at zero would hide the gradient
        nn.init.normal_(p, std=0.3)
    N = END_TO_END_PLAN.num_examples
    images = (256 * rng.random((N, 8, 8, 1))).astype(np.uint8)
    z_0 = encode_dataset(model, images, torch.device("cpu"))
    labels = (torch.arange(N) == N - 1).long()
    draws = sample_t_and_noise(model, z_0[-1:], labels[-1:], 256, 0.0, rng)
    model(*(x[0] for x in draws)).mean().backward()
    return World(model, z_0, labels, model.embedder.embedding.weight.grad[1].clone())


def end_to_end_score(mechanism: Mechanism, world: World, canary_in: bool) -> float:
    """One run of train.train_private: how far the canary's embedding moved along its gradient.

    The neighbour never draws the canary: N and q are public and stay as they are.
    """
    model, label = copy.deepcopy(world.model), world.labels[-1:]
    canary = len(world.labels) - 1

    def sample(plan: PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
        chosen = mechanism.sample(plan, rng)
        return chosen if canary_in else chosen[chosen != canary]

    with redirect_stderr(io.StringIO()):   # without the progress bars
        train.train_private(model, world.z_0, world.labels, private_parameter_names(model),
                            END_TO_END_PLAN, END_TO_END, dp_sgd.secure_generator(), sample=sample,
                            clipped_sum=mechanism.clipped_sum, add_noise=mechanism.add_noise)
    moved = (model.embedder(label) - world.model.embedder(label)).flatten()
    return -(moved @ world.direction.sign()).item()   # Adam follows signs


def bound_of(scores: np.ndarray) -> float:
    """epsilon_lower from scores [runs, 2], of runs without and with the canary.

    The first half chooses the threshold; the bound is from the second half, which had no say in it.
    """
    known, fresh = scores[:len(scores) // 2], scores[len(scores) // 2:]

    def epsilon(of: np.ndarray, threshold: float) -> float:
        positives = int((of[:, 0] > threshold).sum())    # false: without the canary
        negatives = int((of[:, 1] <= threshold).sum())   # false: with the canary
        return bounds.dp_epsilon_lower(positives, len(of), negatives, len(of),
                                       END_TO_END_PLAN.delta, END_TO_END_ERROR)

    return epsilon(fresh, max(known.flatten(), key=lambda threshold: epsilon(known, threshold)))


def audit_end_to_end(mechanism: Mechanism, runs: int) -> tuple[float, bool]:
    """Audit C: (epsilon_lower, caught: above the accountant's epsilon), from `runs` runs in all."""
    world = tiny_world(dp_sgd.secure_generator())
    lower = bound_of(np.array([[end_to_end_score(mechanism, world, canary_in)
                                for canary_in in (False, True)] for _ in range(runs // 2)]))
    return lower, lower > END_TO_END_PLAN.epsilon


def run_end_to_end(runs: int) -> bool:
    """Audit C of correct code and of two variants; prints the table."""
    plan, rows = END_TO_END_PLAN, []
    silent = with_another_plan(lambda plan, B, chunk: replace(plan, noise_multiplier=0.0))
    print(f"claim: epsilon {in_words(plan.epsilon, 3)} at delta {plan.delta:g}, by the accountant; "
          f"{runs} runs of {plan.steps} steps a row, q = {plan.sample_rate:g}; the bound fails "
          f"with probability {2 * END_TO_END_ERROR:g}\n")
    for name, mechanism in (("correct code", correct_ghost), ("no clipping", without_clipping),
                            ("no noise", silent)):
        lower, caught = audit_end_to_end(mechanism(CHUNK), runs)
        found = f"epsilon_lower {in_words(lower, 3, ROUND_FLOOR)}"
        rows.append((name, name != "correct code", found, ["C"] if caught else []))
    return print_rows(rows)


# ---- D: one run ---------------------------------------------------------------------------------

CANARIES_PER_GUESS, RUN_STEPS, ONE_RUN_CHUNK = 50, 4, 1000
TABLE = "embedder.embedding.weight"   # one row per canary


def one_run_config() -> Config:
    """As small a model as can be, and gradients that are nearly all in the canary's own row.

    Its weights move so little that these gradients stay as the attacker knows them.
    """
    config = end_to_end_config()
    config.vae.ch_mult = (1, 1, 1)
    config.unet.model_channels, config.unet.num_heads, config.unet.context_dim = 8, 1, 32
    config.private.noise_multiplicity, config.private.lr = 1, 1e-5
    return config


ONE_RUN = one_run_config()


def one_run_world(canaries: int) -> World:
    """Every canary is the same image, and the only one of its class.

    The attacker has chosen the public model. It looks neither at the image nor at the time, errs by
    100, and embeds all classes alike: so in each draw a canary's gradient has the same direction.
    """
    model = build_model(ONE_RUN.architecture(canaries))
    for p in model.unet.parameters():
        nn.init.normal_(p, std=0.3)
    for layer in (model.unet.input_blocks[0][0], model.unet.time_embed[-1]):
        nn.init.zeros_(layer.weight)
    nn.init.constant_(model.unet.out[-1].bias, 100.0)
    with torch.no_grad():
        model.embedder.embedding.weight[:] = torch.randn(ONE_RUN.unet.context_dim)
    image = np.random.default_rng().integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    z_0, label = encode_dataset(model, image, torch.device("cpu")), torch.tensor([0])
    draws = sample_t_and_noise(model, z_0, label, 256, 0.0, np.random.default_rng())
    model(*(x[0] for x in draws)).mean().backward()
    gradient = model.embedder.embedding.weight.grad[0]
    return World(model, z_0.expand(canaries, -1, -1, -1), torch.arange(canaries),
                 gradient / gradient.norm())


@cache
def one_run_plan(claim: float, canaries: int, sample_rate: float) -> PrivacyPlan:
    """The plan of RUN_STEPS steps that spends `claim`, by the tighter accountant.

    N and the expected batch count all candidates, in or out: only so do they not depend on who is.
    """
    batch = int(sample_rate * canaries)
    return make_plan(canaries, batch, RUN_STEPS * batch / canaries, 0.1, claim, 1e-5, pld)


def one_run_scores(mechanism: Mechanism, world: World, plan: PrivacyPlan,
                   included: torch.Tensor) -> dict[str, torch.Tensor]:
    """One run of train.train_private with the canaries included, bool [N]: two attackers' scores.

    "weights" sees what is published, the averaged final weights: how far has each canary's row
    moved against its gradient? "steps" sees also what the optimiser is given in every step, which
    the accountant lets everyone see: how much of each canary's gradient is in there? Steps that
    vary less between the canaries weigh more. Scores [N].
    """
    model, seen = copy.deepcopy(world.model), []

    def sample(plan: PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
        drawn = mechanism.sample(plan, rng)
        return drawn[included[drawn]]

    def add_noise(total: Tensors, plan: PrivacyPlan, rng: np.random.Generator) -> Tensors:
        private = mechanism.add_noise(total, plan, rng)
        seen.append(private[TABLE][:plan.num_examples].double() @ world.direction.double())
        return private

    with redirect_stderr(io.StringIO()):   # without the progress bars
        train.train_private(model, world.z_0, world.labels, private_parameter_names(model), plan,
                            ONE_RUN, dp_sgd.secure_generator(), sample=sample,
                            clipped_sum=mechanism.clipped_sum, add_noise=add_noise)
    with torch.no_grad():
        moved = (model.embedder(world.labels) - world.model.embedder(world.labels))[:, 0]
    steps = torch.stack(seen)
    weighted = steps / steps.var(dim=1, keepdim=True)
    return {"weights": -(moved @ world.direction), "steps": weighted.sum(dim=0)}


def right_guesses(scores: torch.Tensor, included: torch.Tensor, guesses: int) -> int:
    """Guess "in" for the half of the guesses with the highest scores, "out" for the lowest.

    How many to guess is fixed beforehand. A number chosen by looking at the outcome would fit it.
    """
    order, half = scores.argsort(), guesses // 2
    return int(included[order[-half:]].sum() + (~included[order[:half]]).sum())


def audit_one_run(mechanism: Mechanism, world: World, claim: float,
                  sample_rate: float) -> tuple[str, list[str]]:
    """Audit D: (what was measured, the attackers whose bound is above the claim)."""
    N = len(world.labels)
    plan, guesses = one_run_plan(claim, N, sample_rate), N // CANARIES_PER_GUESS
    included = torch.from_numpy(dp_sgd.secure_generator().random(N) < 0.5)
    text, caught = f"{claim:5g} {sample_rate:5g}", []
    for attacker, scores in one_run_scores(mechanism, world, plan, included).items():
        right = right_guesses(scores, included, guesses)
        lower = bounds.one_run_lower_bound(N, guesses, right, plan.delta, ONE_RUN_ERROR)
        text += f"{right:10} {in_words(lower, 3, ROUND_FLOOR):>5}"
        if lower > claim:
            caught.append(attacker)
    return text, caught


def silent_last_step(chunk: int) -> Mechanism:
    calls = []

    def add_noise(total: Tensors, plan: PrivacyPlan, rng: np.random.Generator) -> Tensors:
        calls.append(plan)
        last = len(calls) == plan.steps
        return dp_sgd.add_noise(total, replace(plan, noise_multiplier=0.0) if last else plan, rng)

    return replace(correct_ghost(chunk), add_noise=add_noise)


def everyone(chunk: int) -> Mechanism:
    """Each batch is all of the data, whatever the plan's rate."""
    return replace(correct_ghost(chunk), sample=lambda plan, rng: torch.arange(plan.num_examples))


def noise_times(factor: float) -> Callable:
    return with_another_plan(lambda plan, B, chunk: replace(
        plan, noise_multiplier=plan.noise_multiplier * factor), correct_ghost)


# (variant, claimed epsilon, claimed q, function (chunk) -> Mechanism, whether D sees the mistake)
ONE_RUNS = [
    ("correct code", 1.0, 1.0, correct_ghost, False),
    ("correct code", 4.0, 1.0, correct_ghost, False),
    ("correct code", 10.0, 1.0, correct_ghost, False),
    ("correct code", 1.0, 0.5, correct_ghost, False),
    ("no clipping", 1.0, 1.0, partial(without_clipping, engine=correct_ghost), True),
    ("clipping after averaging examples", 1.0, 1.0,
     partial(clipping_the_average, engine=correct_ghost), True),
    ("noise halved", 1.0, 1.0, noise_times(0.5), True),
    ("no noise", 1.0, 1.0, noise_times(0.0), True),
    ("no noise in the last step", 1.0, 1.0, silent_last_step, True),
    ("all drawn, accounted as q = 1/4", 1.0, 0.25, everyone, True),
    ("divisor = actual batch size", 1.0, 1.0, with_another_plan(lambda plan, B, chunk: replace(
        plan, expected_batch=max(1, B)), correct_ghost), False),
]


def run_one_run(canaries: int) -> bool:
    """Audit D of correct code and of broken copies, one run each; prints the table."""
    print(f"one run of {RUN_STEPS} steps a row, delta 1e-05; {canaries:,} canaries, "
          f"{canaries // CANARIES_PER_GUESS:,} guesses; a bound fails with probability "
          f"{ONE_RUN_ERROR:g}\n\n{'':51}{'final weights':>16}{'every step':>16}\n{'':39} "
          f"{'claim':>5} {'q':>5}{'right bound':>16}{'right bound':>16}")
    world = one_run_world(canaries)
    return print_rows((name, broken, *audit_one_run(mechanism(ONE_RUN_CHUNK), world, claim, q))
                      for name, claim, q, mechanism, broken in ONE_RUNS)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--canaries", type=int,
                        help="a multiple of 1000 (default 20000 for A and B, 30000 for D)")
    audit = parser.add_mutually_exclusive_group()
    audit.add_argument("--end-to-end", action="store_true", help="audit C: many private runs")
    audit.add_argument("--one-run", action="store_true", help="audit D: one private run per row")
    parser.add_argument("--runs", type=int, default=200, help="runs per row of C (default 200)")
    args = parser.parse_args(argv)
    if args.canaries is None:
        args.canaries = 30_000 if args.one_run else 20_000
    if args.canaries < CANARIES or args.canaries % CANARIES:
        raise ValueError(f"--canaries must be a positive multiple of {CANARIES}, not "
                         f"{args.canaries}")
    if args.runs < 8 or args.runs % 4:
        raise ValueError(f"--runs must be a multiple of 4 from 8 on, not {args.runs}")
    threads.choose(0, torch.device("cpu"))   # the models are tiny
    if args.end_to_end:
        as_expected = run_end_to_end(args.runs)
    elif args.one_run:
        as_expected = run_one_run(args.canaries)
    else:
        as_expected = run_canaries(args.canaries // CANARIES)
    if not as_expected:
        sys.exit("correct code was caught, or a broken variant was not (as happens with few "
                 "canaries or runs)")


if __name__ == "__main__":
    with one_line_errors():
        main()
