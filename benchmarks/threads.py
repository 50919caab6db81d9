"""How fast is each stage on one thread, on two and as chosen, alone and beside a busy process?

    python benchmarks/threads.py --presets glyphs mnist cifar10-small
    python benchmarks/threads.py --presets scenes256 --examples 16

Cells are steps on made-up images and latents. Each column is a process of its own. The
busy process multiplies matrices on one thread. Nothing is pinned: the system moves threads about,
as it does for users. Batches have at most --examples examples. For the columns "chosen"
`runtime/threads.py` is told what the programs tell it.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import evaluate
import train
from datasets import Dataset
from dp_sgd import PrivacyPlan, private_parameter_names, secure_generator
from ldm import LatentDiffusion, images_at_once
from runtime.checkpoints import build_model
from runtime.config import Config
from runtime.engines import clipping_engine
from runtime.threads import CORES, choose, of_training, of_unet

STAGES = ("autoencoder", "public", "private", "sampling", "classifier")
LATENTS = 2_000
BUSY = "import torch; torch.set_num_threads(1); a = torch.ones(500, 500)\nwhile True: a @ a"


class TimeUpError(Exception):
    """Ends a loop."""


def steps_per_second(config: Config, stage: str, threads: int, seconds: float) -> float:
    """Of a stage. threads: 0 for as many as its program chooses."""
    model, times = build_model(config.architecture(10)), []
    if threads:
        torch.set_num_threads(threads)
    else:
        choose(numbers(config, stage, model), config.device)

    def stamp(*details: object) -> None:
        times.append(time.perf_counter())
        if len(times) > 2 and times[-1] - times[0] > seconds:   # the first step is slower
            raise TimeUpError

    handle = register_optimizer_step_post_hook(stamp)
    with (contextlib.suppress(TimeUpError), open(os.devnull, "w") as nowhere,
          contextlib.redirect_stderr(nowhere)):
        run_stage(stage, model, config, stamp)
    handle.remove()
    return (len(times) - 1) / (times[-1] - times[0])


def numbers(config: Config, stage: str, model: LatentDiffusion) -> int:
    """What the program of `stage` tells `choose`."""
    if stage == "sampling":
        return of_unet(model, 2 * images_at_once(config.data.image_size))
    if stage == "classifier":
        return evaluate.first_feature_map(config.data.image_size)
    return of_training(config)


def run_stage(stage: str, model: LatentDiffusion, config: Config, stamp: Callable) -> None:
    """The loop of `stage`, as its program has it: without end, or long."""
    rng, size, channels = np.random.default_rng(0), config.data.image_size, config.data.channels
    images = rng.integers(0, 256, (100, size, size, channels), np.uint8)
    z_0, labels = torch.randn(LATENTS, *model.vae.latent_shape), torch.arange(LATENTS) % 10
    if stage == "autoencoder":
        train.train_autoencoder(model.vae, images, config)
    elif stage == "public":
        train.train_public(model, z_0, labels, config, rng)
    elif stage == "private":
        names = private_parameter_names(model)
        plan = PrivacyPlan(LATENTS, config.private.expected_batch, 10_000, 1.0, 0.1, 1e-5)
        train.train_private(model, z_0, labels, names, plan, config, secure_generator(),
                            clipped_sum=clipping_engine(model, z_0, labels, names, config))
    elif stage == "sampling":
        while True:
            model.generate(labels[:2 * images_at_once(size)], steps=1, guidance=1.5)
            stamp()
    else:
        classifier = evaluate.make_classifier("small-cnn", channels, size, 10)
        data = Dataset(images, np.arange(100) % 10, [])
        deque(evaluate.optimise(classifier, data, torch.arange(100),
                                evaluate.RECIPES["small-cnn"], 10_000), 0)


def settings(preset: str, examples: int) -> Config:
    config = Config.from_preset(preset)
    config.run.device = "cpu"
    for table in (config.autoencoder, config.public):
        table.batch = min(table.batch, examples)
    config.private.expected_batch = min(config.private.expected_batch, examples)
    config.private.noise_multiplicity = 1
    return config


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Inside, so many processes keep one core each busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["glyphs", "mnist"])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell (default 4)")
    parser.add_argument("--examples", type=int, default=256, help="of a batch (default 256)")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)   # one column
    args = parser.parse_args()
    if args.threads is not None:
        print(json.dumps([steps_per_second(settings(preset, args.examples), stage, args.threads,
                                           args.seconds)
                          for preset in args.presets for stage in STAGES]))
        return
    columns = []
    for busy in (0, 1):
        for threads in (1, CORES, 0):
            with busy_processes(busy):
                command = [sys.executable, *sys.argv, "--threads", str(threads)]
                output = subprocess.check_output(command, text=True)
                columns.append(json.loads(output.splitlines()[-1]))   # choose() speaks above it
    print(f"| preset, stage | steps/s, 1 thread | {CORES} threads | chosen "
          f"| 1 beside a busy one | {CORES} | chosen | ratio |\n|---|---|---|---|---|---|---|---|")
    rows = [f"{preset}, {stage}" for preset in args.presets for stage in STAGES]
    for row, *cells in zip(rows, *columns, strict=True):
        print(f"| {row} | " + " | ".join(f"{cell:.3g}" for cell in cells)
              + f" | {cells[2] / cells[5]:.2f} |")


if __name__ == "__main__":
    main()
