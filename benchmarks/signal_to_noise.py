"""How much signal does a budget buy? Batch, steps, K and C at a fixed epsilon.

    python benchmarks/signal_to_noise.py runs/mnist/public.pt

This touches no private data. Let T steps of batch B add noise of sigma C each. Their sum holds T
times the signal of one step, which is B times the mean clipped gradient, and noise of sqrt(T) sigma
C. So the signal-to-noise ratio is sqrt(T) B / sigma, times the norm of the mean clipped gradient in
units of C: what the gradients of all examples have in common.

The first table has sqrt(T) B / sigma, with the N = 60,000 of the mnist preset. The others are of a
public model on digits rendered as with a pen, which are nobody's data. The second has the norms of
the gradients, which say what share of them a C clips. The third has what the gradients have in
common, for K noise draws per example and three C.
"""

import argparse
import itertools
import math
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from datasets.glyphs import PEN, render_pen
from dp_sgd import Tensors, in_chunks, make_plan, private_parameter_names
from ldm import LatentDiffusion, sample_t_and_noise
from runtime.checkpoints import load_checkpoint
from runtime.classes import match_classes, new_class_embedder
from runtime.config import Config
from runtime.latents import encode_dataset
from variants import ghost

RANGES = [(0, 1000), (200, 800), (200, 600)]   # time steps that nine of ten draws are from


def budget_table(epsilons: list[float], batches: list[int], steps: list[int],
                 N: int = 60_000) -> None:
    for epsilon in epsilons:
        print(f"\nepsilon = {epsilon:g}: sqrt(T) B / sigma, in thousands (sigma)\n")
        print(f"| B | {' | '.join(f'T = {T}' for T in steps)} |\n|---{'|---' * len(steps)}|")
        for B in batches:
            cells = []
            for T in steps:
                sigma = make_plan(N, B, T * B / N, 1.0, epsilon, 1e-5).noise_multiplier
                cells.append(f"{math.sqrt(T) * B / sigma / 1000:.1f} ({sigma:.2f})")
            print(f"| {B} | {' | '.join(cells)} |")


def gradient_norms(model: LatentDiffusion, parameters: Tensors, batch: tuple[torch.Tensor, ...],
                   chunk: int) -> torch.Tensor:
    """Norm [B] of each example's gradient over all the parameters, before it is clipped."""
    parts = zip(*(tensor.split(chunk) for tensor in batch), strict=True)
    factors = (ghost.activations_and_backprops(model, parameters, part) for part in parts)
    return torch.cat([torch.stack(list(map(ghost.ghost_norms, of_part.values()))).norm(dim=0)
                      for of_part in factors])


def common_signal(model: LatentDiffusion, parameters: Tensors, z_0: torch.Tensor,
                  labels: torch.Tensor, K: int, C: float, timesteps: tuple[int, int]) -> float:
    """Norm of the mean clipped gradient in units of C.

    It is the root of the product of two halves of the examples, whose own noise cancels. z_0
    [N, C, h, w] and labels [N] are public or made up.
    """
    clipped_sum, halves = in_chunks(ghost.clipped_gradient_sum, max(1, 256 // K)), []
    for half in (0, 1):
        rng = np.random.default_rng(2 * K + half)
        batch = sample_t_and_noise(model, z_0[half::2], labels[half::2], K, 0.0, rng, timesteps)
        halves.append(clipped_sum(model, parameters, batch, C))
    product = sum((a * b).sum().item()
                  for a, b in zip(halves[0].values(), halves[1].values(), strict=True))
    return math.sqrt(max(0.0, product)) / (len(labels) / 2 * C)


def starting_point(public: Path, examples: int) -> tuple[
        LatentDiffusion, Tensors, torch.Tensor, torch.Tensor]:
    """The model as a private stage starts with it, what that trains, and z_0 and labels."""
    model, metadata = load_checkpoint(public)
    starts = match_classes(list(string.digits), metadata["classes"])
    model = new_class_embedder(model, starts, 10).requires_grad_(False)
    model.embedder.rescale(Config.from_preset("mnist").private.embedder_scale)
    parameters = {n: model.get_parameter(n).clone() for n in private_parameter_names(model)}
    images, labels = render_pen(string.digits, PEN, examples, seed=0)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]     # 32x32, as MNIST is padded
    z_0 = encode_dataset(model, images, torch.device("cpu"))
    return model, parameters, z_0, torch.from_numpy(labels)


def draws_tables(public: Path, examples: int, draws: list[int]) -> None:
    model, parameters, z_0, labels = starting_point(public, examples)
    print("\n| time steps | K | norms: 5% are below | half | 95% |\n|---|---|---|---|---|")
    for t, K in itertools.product(RANGES, draws):
        batch = sample_t_and_noise(model, z_0, labels, K, 0.0, np.random.default_rng(K), t)
        norms = gradient_norms(model, parameters, batch, max(1, 256 // K))
        cells = norms.quantile(torch.tensor([0.05, 0.5, 0.95]))
        print(f"| {t[0]} to {t[1]} | {K} | {' | '.join(f'{norm:.3f}' for norm in cells)} |",
              flush=True)
    print(f"\n| time steps | C | K | common signal / C | over that at K = {draws[0]} |\n"
          "|---|---|---|---|---|")
    for t, C in itertools.product(RANGES, (0.03, 0.1, 0.3)):
        found = {K: common_signal(model, parameters, z_0, labels, K, C, t) for K in draws}
        for K in draws:
            print(f"| {t[0]} to {t[1]} | {C:g} | {K} | {found[K]:.3f} | "
                  f"{found[K] / found[draws[0]]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("public", type=Path, help="public checkpoint of the mnist preset")
    parser.add_argument("--eps", type=float, nargs="+", default=[10.0, 1.0, 0.2])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400, 700, 1400])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--examples", type=int, default=500)
    args = parser.parse_args()
    budget_table(args.eps, args.batches, args.steps)
    draws_tables(args.public, args.examples, args.draws)


if __name__ == "__main__":
    main()
