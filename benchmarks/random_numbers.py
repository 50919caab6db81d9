"""How long does a private step wait for the operating system's random numbers?

    OMP_NUM_THREADS=1 python benchmarks/random_numbers.py

Steps of train.py's loop, of the default settings, take noise, draws and batches from numpy's
generator, from the system's, and from the system's with a helper thread that draws ahead.
"""

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
from runtime.engines import clipping_engine
from runtime.noise import Ahead

EXAMPLES, STEPS = 20_000, 10


class Timed:
    """A generator, and the seconds that its numbers have taken."""

    def __init__(self, rng: object):
        self.rng, self.seconds = rng, 0.0

    def __getattr__(self, name: str) -> Callable:
        def timed(*arguments: object, **named: object) -> np.ndarray:
            begin = time.perf_counter()
            numbers = getattr(self.rng, name)(*arguments, **named)
            self.seconds += time.perf_counter() - begin
            return numbers
        return timed


def waiting(new_generator: Callable) -> tuple[float, float]:
    """(median seconds that a step waits for random numbers, median seconds of a step)."""
    config, times = Config(), []
    model = build_model(config.architecture(10)).to(config.device)
    z_0 = torch.randn(EXAMPLES, *model.vae.latent_shape, device=config.device)
    labels = torch.arange(EXAMPLES, device=config.device) % 10
    names = private_parameter_names(model)
    plan = PrivacyPlan(EXAMPLES, config.private.expected_batch, STEPS, 1.0, 0.1, 1e-5)
    normals = plan.expected_batch * z_0[0].numel() + sum(
        model.get_parameter(name).numel() for name in names)
    rng = Timed(new_generator(normals))

    def clock(*state: object) -> None:
        if config.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((rng.seconds, time.perf_counter()))

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        train.train_private(model, z_0, labels, names, plan, config, rng, on_step=clock,
                            clipped_sum=clipping_engine(model, z_0, labels, names, config))
    return tuple(np.median(np.diff(times, axis=0), axis=0))


def main() -> None:
    print("| random numbers | ms waited per step | ms per step | share |\n|---|---|---|---|")
    for name, new_generator in (
            ("numpy's generator", lambda count: np.random.default_rng()),
            ("the system's", lambda count: secure_generator()),
            ("the system's, drawn ahead", lambda count: Ahead(secure_generator(), count))):
        waited, step = waiting(new_generator)
        print(f"| {name} | {1e3 * waited:,.0f} | {1e3 * step:,.0f} | {waited / step:.1%} |")


if __name__ == "__main__":
    main()
