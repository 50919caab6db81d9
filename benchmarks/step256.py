"""What one whole private step of the paper's 256x256 models takes: memory, seconds per example.

    OMP_NUM_THREADS=1 python benchmarks/step256.py     # 24 GiB, minutes

Every case is a process of its own. It runs train.train_private for two steps on random weights and
latents, which needs neither images nor official weights. A step is clipped sum, noise, Adam and
moving average. The second step is timed, by the processor time of the whole process: other work on
the machine matters little to it. The peak is of the whole process, Python and torch included.
Beside it stands what `train.py --summary` estimates. The text encoder of text256 is not part of
this repository: its U-Net gets a made-up context of 77 tokens instead.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

import dp_sgd
import train
from ldm import LatentDiffusion
from runtime import engines
from runtime.checkpoints import build_model
from runtime.config import Config
from runtime.describe import TEXT_ENCODER_PARAMETERS, summary
from runtime.memory import peak_memory
from variants.trainable import private_parameter_names

# preset, physical batch
CASES = [("celebahq256", 1), ("celebahq256", 2), ("celebahq256", 4), ("text256", 1)]


class MadeUpContext(nn.Module):
    """In a text encoder's place: labels int [B] -> one random context for all [B, tokens, dim]."""
    null_class = 0

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.register_buffer("context", torch.randn(1, tokens, dim))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.context.expand(len(labels), -1, -1)

    def rescale(self, scale: float) -> None:
        """Nothing is trained here."""


def make_model(config: Config) -> LatentDiffusion:
    """The preset's model, with random weights."""
    torch.manual_seed(0)
    model = build_model(config.architecture(config.data.num_classes))
    if config.context_tokens > 1:
        model.embedder = MadeUpContext(config.context_tokens, config.unet.context_dim)
    for p in model.unet.parameters():   # zeros in the outermost layers would stop every gradient
        nn.init.normal_(p, std=0.02)
    return model


def measure(preset: str, physical_batch: int, examples: int) -> dict:
    """{example: processor seconds, rest: other seconds of a step, bytes: peak}: the second step."""
    config = Config.from_preset(preset)
    model = make_model(config)
    z_0 = torch.randn(examples, *model.vae.latent_shape)
    # It takes every example.
    plan = dp_sgd.PrivacyPlan(examples, examples, 2, 1.0, config.private.max_grad_norm,
                              config.private.delta)
    clipped_sum = dp_sgd.in_chunks(engines.ENGINES[config.run.clipping], physical_batch)
    sums, starts = [], []

    def timed(*arguments: object) -> dp_sgd.Tensors:
        begin = time.process_time()
        total = clipped_sum(*arguments)
        sums.append(time.process_time() - begin)
        return total

    names = private_parameter_names(model, config.context_tokens, config.private.trainable)
    train.train_private(model, z_0, torch.zeros(examples, dtype=torch.long), names, plan, config,
                        dp_sgd.secure_generator(), clipped_sum=timed,
                        on_step=lambda *state: starts.append(time.process_time()))
    return dict(example=sums[1] / examples, rest=time.process_time() - starts[1] - sums[1],
                bytes=peak_memory(z_0.device))


def estimate(preset: str, physical_batch: int) -> float:
    """GiB that --summary expects, without a text encoder."""
    config = Config.from_preset(preset)
    config.run.physical_batch = str(physical_batch)
    total = float(re.search(r"needs about ([0-9.]+) GiB", summary(config)).group(1))
    return total - (32 * TEXT_ENCODER_PARAMETERS / 2**30 if config.context_tokens > 1 else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4, help="examples per step (default 4)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)   # for a child process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.examples)))
        return
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; {args.examples} "
          "examples per step\n\n| preset | --physical-batch | peak memory | --summary estimates | "
          "per example | noise, Adam, average: per step |\n|---|---|---|---|---|---|")
    for preset, size in CASES:
        child = subprocess.run([sys.executable, __file__, "--one", json.dumps([preset, size]),
                                "--examples", str(args.examples)], capture_output=True, text=True)
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["killed"])[-1]
            print(f"{preset} {size}: {last}", file=sys.stderr)
            continue
        found = json.loads(child.stdout.splitlines()[-1])
        print(f"| {preset} | {size} | {found['bytes'] / 2**30:.2f} GiB | "
              f"{estimate(preset, size):.2f} GiB | {found['example']:.1f} s | "
              f"{found['rest']:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
