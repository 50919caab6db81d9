"""Attack the private step and deliberately broken copies of it: does the attacker learn more than epsilon allows?

A proof is about the algorithm on paper, an audit about the code: it guesses whether a known example, the canary, was
in the data. Guessing better than (epsilon, delta)-DP permits refutes the claim. Not managing to proves nothing,
unless the same audit catches broken code.

    A  canaries through the real clip-sum-noise function: each one's score must be N(included, sigma^2)
    B  the same over T steps: how well the attacker guesses, as a lower bound on epsilon (Nasr et al. 2023)
    C  train.py's own loop with and without a canary image (Jagielski et al. 2020); slow, so only on demand

    python audit.py                           # A, B and checks of what they cannot see, about 15 seconds
    python audit.py --end-to-end --runs 200   # C, about 5 minutes

Each audit wrongly accuses correct code with probability ERROR (C: 2 * END_TO_END_ERROR) or less. Sources:
  Nasr et al. 2023, arXiv 2302.07956: auditing by Gaussian DP.  Dong, Roth, Su 2022, arXiv 1905.02383: Gaussian DP.
  Balle, Wang 2018, arXiv 1805.06530: the exact Gaussian curve.  Jagielski et al. 2020, arXiv 2006.07709.
"""

import copy
import io
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import nn

import accountant
import dp_sgd
import train
from config import Config, Parser, one_line_errors
from dp_sgd import (
    PrivacyPlan,
    Tensors,
    add_noise,
    clipped_gradient_sum,
    noisy_gradient,
    per_example_gradients,
    poisson_sample,
)
from ldm import LatentDiffusion, noise_draws
from unet import private_parameter_names

ERROR, END_TO_END_ERROR = 1e-6, 0.005
CANARIES, CHUNK, STEPS = 1000, 100, 4   # canaries per call, examples per chunk, T
# Four steps of noise 2 are together 1-Gaussian-DP: epsilon 4.38. Half of the canaries are in, on average; then they are
# in all T batches (q = 1), so that the expected batch is a mere divisor here.
CANARY_PLAN = PrivacyPlan(CANARIES, CANARIES // 2, STEPS, 2.0, 0.1, 1e-5)
SAMPLING_PLAN, PHYSICAL_BATCH = PrivacyPlan(1000, 100, 400, 1.0, 0.1, 1e-5), 10


# ---- from guesses to epsilon -------------------------------------------------------------------------

def error_upper(false: int, trials: int, error: float) -> float:
    """Upper Clopper-Pearson bound on the rate of wrong guesses; it is too low with probability `error`."""
    return 1.0 if false >= trials else float(stats.beta.ppf(1 - error, false + 1, trials - false))


def gdp_lower_bound(false_positives: int, outs: int, false_negatives: int, ins: int, error: float = ERROR) -> float:
    """mu_lower = Phi^-1(1 - FPR_upper) - Phi^-1(FNR_upper), at least 0 (Nasr et al. 2023).

    A mu-Gaussian-DP mechanism lets no test have Phi^-1(1 - FPR) - Phi^-1(FNR) above mu. One number stands for the
    whole trade-off curve, so common errors are enough to bound a large epsilon: no need to wait for rare ones.
    """
    fpr, fnr = error_upper(false_positives, outs, error / 2), error_upper(false_negatives, ins, error / 2)
    return max(0.0, float(stats.norm.isf(fpr) - stats.norm.ppf(fnr)))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta of a mu-Gaussian-DP mechanism at epsilon: exact, not a bound (Balle and Wang 2018, Theorem 8)."""
    return float(np.exp(log_ndtr(mu / 2 - epsilon / mu)) - np.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The epsilon, in nats, at which gaussian_delta is delta; 0 where even epsilon = 0 stays below it."""
    if mu <= 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    highest = mu * mu / 2 + mu * stats.norm.isf(delta) + 1   # there the first term alone is below delta
    return float(brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, highest))


def dp_epsilon_lower(false_positives: int, outs: int, false_negatives: int, ins: int, delta: float,
                     error: float = END_TO_END_ERROR) -> float:
    """epsilon_lower = log((TPR_lower - delta) / FPR_upper), or the same with in and out swapped if that is more.

    Needs no assumption on the mechanism, unlike gdp_lower_bound, and pays for it: epsilon_lower cannot be above
    about log(trials) (Jagielski et al. 2020). Too high with probability 2 * error at most.
    """
    fpr, fnr = error_upper(false_positives, outs, error), error_upper(false_negatives, ins, error)
    return max(0.0, *(math.log(max(1 - a - delta, 1e-300) / b) for a, b in ((fnr, fpr), (fpr, fnr))))


# ---- A and B: canaries through one function ------------------------------------------------------------

def linear_loss(parameters: Tensors, *example: torch.Tensor) -> torch.Tensor:
    """<theta, x>: the gradient of an example is the example."""
    return sum((p * x).sum() for p, x in zip(parameters.values(), example, strict=True))


class LinearLoss(nn.Module):
    """linear_loss as a module, for the ghost engine: a layer per parameter; x [n, m] each -> losses [n]."""

    def __init__(self, parameters: Tensors):
        super().__init__()
        for name, p in parameters.items():
            self.add_module(name.removesuffix(".weight"), nn.Linear(len(p), 1, bias=False))

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return sum(layer(x).squeeze(1) for layer, x in zip(self.children(), batch, strict=True))


def by_ghost_engine(loss_fn, parameters, batch, plan, chunk, rng) -> Tensors:
    """noisy_gradient of linear_loss by the other engine."""
    rows = {name: p[None] for name, p in parameters.items()}
    private = noisy_gradient(LinearLoss(parameters), rows, tuple(x[:, None] for x in batch), plan, chunk, rng)
    return {name: g[0] for name, g in private.items()}


def canary_scores(mechanism: Callable, plan: PrivacyPlan, groups: int,
                  rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(included bool [groups * m], scores [T, groups * m]): m = num_examples canaries at a time, T = plan.steps.

    Canary i has the gradient 100 C u_i with u_i = (e_i, e_i) / sqrt(2): one half in the U-Net, one in the embedder.
    Its score is what the noisy sum holds along u_i, in units of C. Those directions are orthogonal, so under
    correct code the m scores are independent: one call is m experiments.
    """
    m = plan.num_examples
    parameters = {name: torch.zeros(m) for name in ("unet.weight", "embedder.weight")}
    included, scores = rng.random((groups, m)) < 0.5, np.empty((plan.steps, groups, m))
    for group in range(groups):
        x = torch.eye(m)[torch.from_numpy(included[group])] * (100 * plan.max_grad_norm / math.sqrt(2))
        for step in range(plan.steps):
            private = mechanism(linear_loss, parameters, (x, x), plan, CHUNK, rng)
            scores[step, group] = sum(private.values()).numpy() * (plan.expected_batch / math.sqrt(2))
    return included.reshape(-1), scores.reshape(plan.steps, -1)


def audit_scores(included: np.ndarray, scores: np.ndarray, sigma: float) -> tuple[float, float, bool]:
    """Audit A, of one step's scores [n]: (mean gap, which must be 1; standard deviation, must be sigma; caught)."""
    ins, outs, freedom = scores[included], scores[~included], len(scores) - 2
    gap, variance = ins.mean() - outs.mean(), (len(ins) * ins.var() + len(outs) * outs.var()) / freedom
    half_width = stats.norm.isf(ERROR / 4) * sigma * math.sqrt(1 / len(ins) + 1 / len(outs))
    low, high = stats.chi2.ppf([ERROR / 4, 1 - ERROR / 4], freedom) / freedom
    passed = abs(gap - 1) <= half_width and low <= variance / sigma**2 <= high
    return float(gap), math.sqrt(variance), not passed


def audit_guesses(included: np.ndarray, scores: np.ndarray, sigma: float) -> tuple[float, bool]:
    """Audit B, of the scores [T, n] of T steps: (mu_lower, caught: it is above the claim sqrt(T) / sigma).

    The guess is "in" where the scores add up to more than T/2, which is fixed beforehand: a threshold chosen by
    looking at these very scores would fit their noise, and the bound would not hold.
    """
    T = len(scores)
    guess = scores.sum(axis=0) > T / 2
    mu = gdp_lower_bound(int((guess & ~included).sum()), int((~included).sum()),
                         int((~guess & included).sum()), int(included.sum()))
    return mu, mu > math.sqrt(T) / sigma


# ---- what canaries cannot see ----------------------------------------------------------------------------

def audit_divisor(mechanism: Callable, plan: PrivacyPlan, rng: np.random.Generator) -> tuple[float, bool]:
    """(largest / smallest update, caught), without noise: more and more zero gradients may change nothing."""
    plan, parameters, updates = replace(plan, noise_multiplier=0.0), {"unet.weight": torch.zeros(3)}, []
    for others in (0, 1, 9, 99):
        x = torch.zeros(1 + others, 3)
        x[0, 0] = 100 * plan.max_grad_norm
        updates.append(mechanism(linear_loss, parameters, (x,), plan, CHUNK, rng)["unet.weight"][0].item())
    ratio = max(updates) / min(updates)
    return ratio, ratio > 1 + 1e-5


def audit_sampling(batches: list[torch.Tensor], plan: PrivacyPlan) -> tuple[float, bool]:
    """(variance of the batch size / N q (1 - q), caught): 1 for Poisson samples, which the accountant assumes."""
    q, sizes = plan.sample_rate, np.array([len(batch) for batch in batches])
    ratio = ((sizes - plan.num_examples * q) ** 2).mean() / (plan.num_examples * q * (1 - q))
    low, high = stats.chi2.ppf([ERROR / 2, 1 - ERROR / 2], len(sizes)) / len(sizes)
    return float(ratio), not low <= ratio <= high


def audit_accounting(claimed: float, batches: list[torch.Tensor], plan: PrivacyPlan) -> tuple[float, bool]:
    """(epsilon_lower, caught: it is above the claim): epsilon of the sample rate and the steps that were observed."""
    drawn, chances = sum(map(len, batches)), plan.num_examples * len(batches)
    q_lower = 1 - error_upper(chances - drawn, chances, ERROR)
    epsilon = accountant.epsilon(q_lower, plan.noise_multiplier, len(batches), plan.delta)
    return epsilon, epsilon > claimed


def audit_noise_source(new_generator: Callable, plan: PrivacyPlan) -> tuple[float, bool]:
    """(noise left / sigma, caught) after subtracting what an attacker's own generator draws.

    Between independent generators sqrt(2) is left; with a published seed nothing, and the exact sum shows.
    """
    parameters, nobody = {"unet.weight": torch.zeros(4000)}, (torch.empty(0, 4000),)
    ours, his = (noisy_gradient(linear_loss, parameters, nobody, plan, CHUNK, new_generator())["unet.weight"]
                 for _ in range(2))
    left = (ours - his).double().square().mean().item() * (plan.expected_batch / plan.noise_multiplier) ** 2
    return math.sqrt(left), bool(left / 2 < stats.chi2.ppf(ERROR, 4000) / 4000)


# ---- broken variants: mistakes that train just as well ----------------------------------------------------

def with_another_plan(change: Callable) -> Callable:
    """noisy_gradient, misled: change(plan, B) is the plan that it is given for a batch of B examples."""
    return lambda loss_fn, parameters, batch, plan, chunk, rng: noisy_gradient(
        loss_fn, parameters, batch, change(plan, len(batch[0])), chunk, rng)


def without_clipping(loss_fn, parameters, batch, plan, chunk, rng) -> Tensors:
    return add_noise(clipped_gradient_sum(loss_fn, parameters, batch, math.inf, chunk), plan, rng)


def with_noise_per_chunk(loss_fn, parameters, batch, plan, chunk, rng) -> Tensors:
    parts = [noisy_gradient(loss_fn, parameters, part, plan, chunk, rng)
             for part in zip(*(x.split(chunk) for x in batch), strict=True)]
    return {name: sum(part[name] for part in parts) for name in parameters}


def clipping_the_average(loss_fn, parameters, batch, plan, chunk, rng) -> Tensors:
    total = clipped_gradient_sum(loss_fn, parameters, batch, math.inf, chunk)
    B = max(1, len(batch[0]))
    norm = torch.stack([s.norm() for s in total.values()]).norm() / B
    weight = (plan.max_grad_norm / norm).clamp(max=1.0)
    return add_noise({name: s * weight for name, s in total.items()}, plan, rng)


def with_the_embedder_apart(loss_fn, parameters, batch, plan, chunk, rng) -> Tensors:
    """U-Net and embedder are clipped to C each, so that an example's part in the sum may be sqrt(2) C."""
    total = {}
    for name, g in per_example_gradients(loss_fn, parameters, batch).items():   # one tensor each in the audit
        weights = (plan.max_grad_norm / g.flatten(1).norm(dim=1)).clamp(max=1.0)
        total[name] = torch.tensordot(weights, g, dims=1)
    return add_noise(total, plan, rng)


def shuffled_batches(plan: PrivacyPlan, rng: np.random.Generator) -> list[torch.Tensor]:
    """Batches as most training loops draw them: every epoch a new order, cut into pieces of one size."""
    per_epoch = plan.num_examples // plan.expected_batch
    return [piece for _ in range(math.ceil(plan.steps / per_epoch))
            for piece in torch.from_numpy(rng.permutation(plan.num_examples)).split(plan.expected_batch)][:plan.steps]


MECHANISMS = {
    "correct code": noisy_gradient,
    "correct code, ghost engine": by_ghost_engine,
    "no clipping": without_clipping,
    "noise halved": with_another_plan(lambda plan, B: replace(plan, noise_multiplier=plan.noise_multiplier / 2)),
    "noise once per chunk": with_noise_per_chunk,
    "clipping after averaging examples": clipping_the_average,
    "embedder outside the joint norm": with_the_embedder_apart,
    "divisor = actual batch size": with_another_plan(lambda plan, B: replace(plan, expected_batch=max(1, B))),
}


# ---- the table -------------------------------------------------------------------------------------------

def audit_mechanism(mechanism: Callable, groups: int, rng: np.random.Generator) -> tuple[str, list[str]]:
    """(what was measured, the audits that caught it) of one function with noisy_gradient's signature."""
    plan = CANARY_PLAN
    included, scores = canary_scores(mechanism, plan, groups, rng)
    gap, std, caught_a = audit_scores(included, scores[0], plan.noise_multiplier)
    mu, caught_b = audit_guesses(included, scores, plan.noise_multiplier)
    ratio, caught_divisor = audit_divisor(mechanism, plan, rng)
    text = f"{gap:7.2f}  {std:5.2f}  {gdp_epsilon(mu, plan.delta):9.2f}"
    verdicts = {"A": caught_a, "B": caught_b, f"divisor check (x {ratio:.0f})": caught_divisor}
    return text, [name for name, caught in verdicts.items() if caught]


def audit_surroundings(rng: np.random.Generator) -> list[tuple]:
    """The rows of sampler, accountant and source of noise: (variant, is it broken, what was measured, caught by)."""
    plan = SAMPLING_PLAN
    batches = [poisson_sample(plan, rng) for _ in range(plan.steps)]
    physical = accountant.epsilon(PHYSICAL_BATCH / plan.num_examples, plan.noise_multiplier, plan.steps, plan.delta)
    variance, left = "variance of B {:.2f} of Poisson's", "noise left after subtraction {:.2f} sigma"
    rows = [
        ("correct: Poisson sampling", False, variance, "sampling", audit_sampling(batches, plan)),
        ("shuffling accounted as Poisson", True, variance, "sampling",
         audit_sampling(shuffled_batches(plan, rng), plan)),
        ("correct: accountant fed the plan", False, f"claims {plan.epsilon:.2f}, spends at least {{:.2f}}",
         "accounting", audit_accounting(plan.epsilon, batches, plan)),
        ("accountant fed the physical batch size", True, f"claims {physical:.2f}, spends at least {{:.2f}}",
         "accounting", audit_accounting(physical, batches, plan)),
        ("correct: the system's entropy", False, left, "seed", audit_noise_source(dp_sgd.secure_generator, plan)),
        ("a published seed", True, left, "seed", audit_noise_source(lambda: np.random.default_rng(0), plan)),
    ]
    return [(name, broken, text.format(value), [f"{check} check"] if caught else [])
            for name, broken, text, check, (value, caught) in rows]


def print_rows(rows: list[tuple]) -> bool:
    """Print a verdict per row; True if correct code passes and every broken variant is caught."""
    for name, _, text, caught in rows:
        print(f"{name:39} {text:40} {'CAUGHT by ' + ', '.join(caught) if caught else 'not caught'}")
    return all(bool(caught) == broken for _, broken, _, caught in rows)


def run_canaries(groups: int) -> bool:
    """Audits A and B and the checks, of correct code and of every variant; prints the table."""
    plan, rng = CANARY_PLAN, dp_sgd.secure_generator()
    mu = math.sqrt(plan.steps) / plan.noise_multiplier
    print(f"claim: gap 1, sd {plan.noise_multiplier:g}; {plan.steps} steps are {mu:g}-Gaussian-DP: "
          f"epsilon {gdp_epsilon(mu, plan.delta):.2f} at delta {plan.delta:g}\n"
          f"{groups * CANARIES:,} canaries; an audit accuses correct code with probability {ERROR:g} or less\n\n"
          f"{'':39} {'A: gap':>7}  {'sd':>5}  {'B: epsilon_lower':>9}")
    rows = [(name, not name.startswith("correct"), *audit_mechanism(mechanism, groups, rng))
            for name, mechanism in MECHANISMS.items()]
    return print_rows(rows + audit_surroundings(rng))


# ---- C: end to end -----------------------------------------------------------------------------------------

END_TO_END = Config(image_size=8, vae_channels=8, vae_mult=(1, 2), latent_channels=4, unet_channels=16, unet_mult=(1,),
                    attention_resolutions=(1,), num_heads=2, context_dim=64, device="cpu", label_dropout=0.0,
                    noise_draws=8, embedder_scale=300.0)   # a canary whose gradient is large and always much the same
END_TO_END_PLAN = PrivacyPlan(8, 4, 4, 4.0, 0.1, 1e-5)   # q = 1/2, T = 4, sigma = 4: epsilon 1.16


def tiny_world(rng: np.random.Generator) -> tuple[LatentDiffusion, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(model, z_0 [N, C, h, w], labels int [N], canary's gradient [dim]); the last image is the canary.

    It is the only one of class 1, as an attacker would choose: no other image's gradient touches that embedding.
    """
    model = LatentDiffusion(END_TO_END.architecture(2))
    for p in model.unet.parameters():   # layers that start at zero would hide the embedder's gradient
        nn.init.normal_(p, std=0.3)
    N = END_TO_END_PLAN.num_examples
    images = rng.integers(0, 256, (N, 8, 8, 1), dtype=np.uint8)
    z_0 = train.encode_all(model, images, END_TO_END.torch_device)
    labels = (torch.arange(N) == N - 1).long()
    draws = noise_draws(model, z_0[-1:], labels[-1:], 256, 0.0, rng)
    model(*(x[0] for x in draws)).mean().backward()
    return model, z_0, labels, model.embedder.embedding.weight.grad[1].clone()


def end_to_end_score(mechanism: Callable, world: tuple, canary_in: bool) -> float:
    """One private run by train.train_private; how far the canary's embedding moved along the canary's gradient.

    The neighbour is made by never drawing the canary: N and q are public and stay as they are.
    """
    start, z_0, labels, direction = world
    model, canary = copy.deepcopy(start), len(labels) - 1

    def sample(plan, rng):
        chosen = poisson_sample(plan, rng)
        return chosen if canary_in else chosen[chosen != canary]

    with patch.object(train, "noisy_gradient", mechanism), patch.object(train, "poisson_sample", sample), \
            redirect_stderr(io.StringIO()):   # without the progress bars
        train.train_private(model, z_0, labels, private_parameter_names(model), END_TO_END_PLAN, END_TO_END)
    moved = (model.embedder(labels[-1:]) - start.embedder(labels[-1:])).flatten()
    return -(moved @ direction.sign()).item()   # Adam follows signs


def audit_end_to_end(mechanism: Callable, runs: int) -> tuple[float, bool]:
    """Audit C: (epsilon_lower, caught: it is above the accountant's epsilon), from `runs` runs in all.

    The first half of the runs chooses the threshold; the bound is from the second half, which had no say in it.
    """
    plan, world = END_TO_END_PLAN, tiny_world(dp_sgd.secure_generator())
    scores = np.array([[end_to_end_score(mechanism, world, canary_in) for canary_in in (False, True)]
                       for _ in range(runs // 2)])
    known, fresh = scores[:len(scores) // 2], scores[len(scores) // 2:]

    def epsilon(of, threshold):
        return dp_epsilon_lower(int((of[:, 0] > threshold).sum()), len(of), int((of[:, 1] <= threshold).sum()), len(of),
                                plan.delta)

    lower = epsilon(fresh, max(known.flatten(), key=lambda threshold: epsilon(known, threshold)))
    return lower, lower > plan.epsilon


def run_end_to_end(runs: int) -> bool:
    """Audit C of correct code and of two variants; prints the table."""
    plan, rows = END_TO_END_PLAN, []
    silent = with_another_plan(lambda plan, B: replace(plan, noise_multiplier=0.0))
    print(f"claim: epsilon {plan.epsilon:.2f} at delta {plan.delta:g}, by the accountant; {runs} runs of {plan.steps} "
          f"steps a row, q = {plan.sample_rate:g}; the bound fails with probability {2 * END_TO_END_ERROR:g}\n")
    for name, mechanism in (("correct code", noisy_gradient), ("no clipping", without_clipping), ("no noise", silent)):
        lower, caught = audit_end_to_end(mechanism, runs)
        rows.append((name, mechanism is not noisy_gradient, f"epsilon_lower {lower:.2f}", ["C"] if caught else []))
    return print_rows(rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--canaries", type=int, default=20_000, help="canaries of A and B, a multiple of 1000")
    parser.add_argument("--end-to-end", action="store_true", help="audit C instead: whole private runs")
    parser.add_argument("--runs", type=int, default=200, help="private runs per row of audit C")
    args = parser.parse_args(argv)
    if args.canaries < CANARIES or args.canaries % CANARIES:
        raise ValueError(f"--canaries must be a positive multiple of {CANARIES}, not {args.canaries}")
    if args.runs < 8 or args.runs % 4:
        raise ValueError(f"--runs must be a multiple of 4 from 8 on, not {args.runs}")
    if not (run_end_to_end(args.runs) if args.end_to_end else run_canaries(args.canaries // CANARIES)):
        sys.exit("correct code was caught, or a broken variant was not (as happens with few canaries or runs)")


if __name__ == "__main__":
    with one_line_errors():
        main()
