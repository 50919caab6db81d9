"""What do the operating system's random numbers cost a private step?

    OMP_NUM_THREADS=1 python benchmarks/random_numbers.py

Whole steps of train.py's loop, of the default preset: noise, draws and batches come from numpy's
generator, from the system's, and from the system's with a helper thread that draws ahead. They take
--rounds turns, of which the fastest counts.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

import train
from dp_sgd import PrivacyPlan, private_parameter_names, secure_generator
from runtime.checkpoints import build_model
from runtime.config import Config
from runtime.noise import Ahead

EXAMPLES, STEPS = 20_000, 6


def seconds_per_step(new_generator: Callable) -> float:
    """Of the private loop of the default preset, without its first step."""
    config, times = Config(), []
    model = build_model(config.architecture(10)).to(config.device)
    z_0 = torch.randn(EXAMPLES, *model.vae.latent_shape, device=config.device)
    labels = torch.arange(EXAMPLES, device=config.device) % 10
    names = private_parameter_names(model)
    plan = PrivacyPlan(EXAMPLES, config.private.expected_batch, STEPS, 1.0, 0.1, 1e-5)
    normals = plan.expected_batch * z_0[0].numel() + sum(
        model.get_parameter(name).numel() for name in names)
    # Time goes up to the end of the loop, where the averaged weights are loaded.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        train.train_private(model, z_0, labels, names, plan, config, new_generator(normals),
                            clipped_sum=train.clipping_engine(model, z_0, labels, names, config),
                            on_step=lambda *state: times.append(time.perf_counter()))
    return (time.perf_counter() - times[1]) / (STEPS - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="turns of all three (default 4)")
    rounds = parser.parse_args().rounds
    sources = {"numpy's generator": lambda count: np.random.default_rng(),
               "the system's": lambda count: secure_generator(),
               "the system's, drawn ahead": lambda count: Ahead(secure_generator(), count)}
    found: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(rounds):
        for name, new_generator in sources.items():
            found[name].append(seconds_per_step(new_generator))
    least = min(found["numpy's generator"])
    print("| random numbers | ms per step | times numpy's |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * min(seconds):,.0f} | {min(seconds) / least:.3f} |")


if __name__ == "__main__":
    main()
