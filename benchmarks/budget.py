"""How much signal does a budget buy? Batch, steps, K and C at a fixed epsilon, without touching private data.

    python benchmarks/budget.py runs/mnist/public.pt

Where noise dominates, the sum of T steps holds T times the signal of one, B times the mean clipped gradient, and noise
of sqrt(T) sigma C: a signal-to-noise ratio of sqrt(T) B / sigma, times the norm of that mean in units of C, which is
what the gradients of all examples have in common. The first table is the former, with the preset's N = 60,000; the
others are of a public model on digits rendered as with a pen, which are nobody's data: the gradients' norms, which say
what share of them a C clips, and what they have in common, for K noise draws per example and three C.
"""

import argparse
import itertools
import math
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import dp_sgd  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from glyphs import PEN, render_pen  # noqa: E402
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


def gradient_norms(model, parameters: dict, batch: tuple[torch.Tensor, ...], chunk: int) -> torch.Tensor:
    """Norm [B] of each example's gradient over all the parameters jointly, before it is clipped."""
    parts = zip(*(tensor.split(chunk) for tensor in batch), strict=True)
    return torch.cat([dp_sgd.joint_norms(dp_sgd.factored_gradients(model, parameters, part)) for part in parts])


def common_signal(model, parameters: dict, z_0: torch.Tensor, labels: torch.Tensor, K: int, C: float,
                  favoured: tuple[int, int]) -> float:
    """Norm of the mean clipped gradient in units of C, from two halves of the examples, whose own noise cancels.

    z_0 [N, C, h, w] and labels [N] are of public or made-up examples.
    """
    halves = []
    for half in (0, 1):
        batch = noise_draws(model, z_0[half::2], labels[half::2], K, 0.0, np.random.default_rng(2 * K + half),
                            favoured)
        halves.append(dp_sgd.clipped_gradient_sum(model, parameters, batch, C, max(1, 256 // K)))
    product = sum((a * b).sum().item() for a, b in zip(halves[0].values(), halves[1].values(), strict=True))
    return math.sqrt(max(0.0, product)) / (len(labels) / 2 * C)


def draws_table(public: Path, examples: int, draws: list[int], ranges: list[tuple[int, int]]) -> None:
    model, facts = load_checkpoint(public)
    images, labels = render_pen(string.digits, PEN, examples, seed=0)
    starts = data.starting_classes(list(string.digits), facts["classes"])
    model = replace_embedder(model, starts, 10).requires_grad_(False)
    model.embedder.rescale(Config(**PRESETS["mnist"]).embedder_scale)
    parameters = {name: model.get_parameter(name).clone() for name in private_parameter_names(model)}
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]     # 32x32, as MNIST is padded
    z_0, labels = encode_all(model, images, torch.device("cpu")), torch.from_numpy(labels)
    print("\n| time steps | K | norms: 5% are below | half | 95% |\n|---|---|---|---|---|")
    for t, K in itertools.product(ranges, draws):
        batch = noise_draws(model, z_0, labels, K, 0.0, np.random.default_rng(K), t)
        cells = gradient_norms(model, parameters, batch, max(1, 256 // K)).quantile(torch.tensor([0.05, 0.5, 0.95]))
        print(f"| {t[0]} to {t[1]} | {K} | {' | '.join(f'{norm:.3f}' for norm in cells)} |", flush=True)
    print(f"\n| time steps | C | K | common signal / C | over that at K = {draws[0]} |\n|---|---|---|---|---|")
    for t in ranges:
        for C in (0.03, 0.1, 0.3):
            found = {K: common_signal(model, parameters, z_0, labels, K, C, t) for K in draws}
            for K in draws:
                print(f"| {t[0]} to {t[1]} | {C:g} | {K} | {found[K]:.3f} | {found[K] / found[draws[0]]:.2f} |",
                      flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("public", type=Path, help="public checkpoint of the mnist preset")
    parser.add_argument("--eps", type=float, nargs="+", default=[10.0, 1.0, 0.2])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400, 700, 1400])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--examples", type=int, default=500)
    args = parser.parse_args()
    budget_table(args.eps, args.batches, args.steps)
    draws_table(args.public, args.examples, args.draws, [(0, 1000), (200, 800), (200, 600)])


if __name__ == "__main__":
    main()
