"""How much signal does a budget buy? Batch, steps, K and C at a fixed epsilon, without touching private data.

    python benchmarks/budget.py runs/mnist/public.pt

Where noise dominates, the sum of T steps holds T times the signal of one, B times the mean clipped gradient, and noise
of sqrt(T) sigma C: a signal-to-noise ratio of sqrt(T) B / sigma, times what share of a clipped gradient of norm C all
examples have in common. The first table is that ratio, with the preset's N = 60,000. K noise draws per example shorten
its gradient by what only one draw has in it, so that clipping to C leaves more of the rest: the second table gives the
norms, and the gain, for a public model on rendered digits, which are nobody's data.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import dp_sgd  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from ldm import load_checkpoint, noise_draws, replace_embedder  # noqa: E402
from train import encode_all  # noqa: E402
from unet import private_parameter_names  # noqa: E402


def budget_table(epsilons: list[float], batches: list[int], steps: list[int], N: int = 60_000) -> None:
    for eps in epsilons:
        print(f"\nepsilon = {eps:g}: sqrt(T) B / sigma, in thousands (sigma)\n")
        print(f"| B | {' | '.join(f'T = {T}' for T in steps)} |\n|---{'|---' * len(steps)}|")
        for B in batches:
            sigmas = [dp_sgd.make_plan(N, B, T * B / N, 1.0, eps, 1e-5).noise_multiplier for T in steps]
            cells = [f"{math.sqrt(T) * B / sigma / 1000:.1f} ({sigma:.2f})"
                     for T, sigma in zip(steps, sigmas, strict=True)]
            print(f"| {B} | {' | '.join(cells)} |")


def norms(model, parameters: dict, moments: torch.Tensor, labels: torch.Tensor, K: int, t: tuple) -> torch.Tensor:
    """Norm of every example's gradient [N], the mean over K draws."""
    squares = []
    for i in range(0, len(labels), 4):
        batch = noise_draws(model, moments[i:i + 4], labels[i:i + 4], K, 0.1, np.random.default_rng(i + K), t)
        squares.append(sum(map(dp_sgd.squared_norms, dp_sgd.factored_gradients(model, parameters, batch).values())))
    return torch.cat(squares).sqrt()


def draws_table(public: Path, examples: int, draws: list[int], ranges: list[tuple[int, int]]) -> None:
    model, facts = load_checkpoint(public)
    digits, config = data.load("digits", "train"), Config(**PRESETS["mnist"])
    model = replace_embedder(model, data.starting_classes(digits.classes, facts["classes"]), 10).requires_grad_(False)
    model.embedder.rescale(config.embedder_scale)
    parameters = {name: model.get_parameter(name).clone() for name in private_parameter_names(model)}
    moments = encode_all(model.vae, digits.images[:examples], torch.device("cpu"))
    labels = torch.from_numpy(digits.labels[:examples])
    print("\n| time steps | K | median norm | below C = 0.1 | mean norm at K = 1 / mean norm |\n|---|---|---|---|---|")
    for t in ranges:
        single = norms(model, parameters, moments, labels, 1, t)
        for K in draws:
            found = norms(model, parameters, moments, labels, K, t)
            print(f"| {t[0]} to {t[1]} | {K} | {found.median():.2f} | {(found < 0.1).float().mean():.0%} | "
                  f"{single.mean() / found.mean():.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("public", type=Path, help="public checkpoint of the mnist preset")
    parser.add_argument("--eps", type=float, nargs="+", default=[10.0, 1.0, 0.2])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400, 700, 1400])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--examples", type=int, default=200)
    args = parser.parse_args()
    budget_table(args.eps, args.batches, args.steps)
    draws_table(args.public, args.examples, args.draws, [(0, 1000), (200, 800)])


if __name__ == "__main__":
    main()
