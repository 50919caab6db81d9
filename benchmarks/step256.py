"""What one whole private step of the paper's 256x256 models takes: peak memory and seconds per example.

    OMP_NUM_THREADS=1 python benchmarks/step256.py     # 24 GiB, minutes

Every case is a process of its own, which runs train.train_private for two steps (clipped sum, noise, Adam, moving
average) on random weights and latents: that needs neither images nor official weights. The second step is timed, by
the processor time of the whole process, so that other work on the machine matters little. The peak is that of the
whole process, Python and torch included. Beside it stands what `train.py --describe` estimates.
text256's text encoder is not part of this repository: its U-Net gets a made-up context of 77 tokens instead.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from torch import nn  # noqa: E402

import dp_sgd  # noqa: E402
from config import PRESETS, TEXT_ENCODER_PARAMETERS, Config, describe  # noqa: E402
from ldm import LatentDiffusion  # noqa: E402
from train import train_private  # noqa: E402
from unet import private_parameter_names  # noqa: E402

CASES = [("celebahq256", 1), ("celebahq256", 2), ("celebahq256", 4), ("text256", 1)]   # preset, chunk


class MadeUpContext(nn.Module):
    """In a text encoder's place: labels int [B] -> the same random context for all [B, tokens, dim]."""
    null_class = 0

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.register_buffer("context", torch.randn(1, tokens, dim))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.context.expand(len(labels), -1, -1)

    def rescale(self, scale: float) -> None:
        """Nothing is trained here."""


def measure(preset: str, chunk: int, examples: int) -> dict:
    """{example: processor seconds, rest: those of a step besides, bytes: peak} of the second step."""
    config = Config(**{**PRESETS[preset], "chunk": str(chunk), "save_every": 1, "device": "cpu"})
    torch.manual_seed(0)
    model = LatentDiffusion(config.architecture(config.num_classes))
    if config.context_tokens > 1:
        model.embedder = MadeUpContext(config.context_tokens, config.context_dim)
    for p in model.unet.parameters():   # no zeros: the outermost layers would stop every gradient
        nn.init.normal_(p, std=0.02)
    side = config.image_size // 2 ** (len(config.vae_mult) - 1)
    z_0 = torch.randn(examples, config.latent_channels, side, side)
    plan = dp_sgd.PrivacyPlan(examples, examples, 2, 1.0, config.max_grad_norm, config.delta)   # takes every example
    sums, starts = [], []
    clipped_gradient_sum = dp_sgd.clipped_gradient_sum

    def timed(*arguments):
        begin = time.process_time()
        total = clipped_gradient_sum(*arguments)
        sums.append(time.process_time() - begin)
        return total

    dp_sgd.clipped_gradient_sum = timed
    train_private(model, z_0, torch.zeros(examples, dtype=torch.long),
                  private_parameter_names(model, config.attention_blocks, config.context_tokens), plan, config,
                  keep=lambda state: starts.append(time.process_time()))
    return dict(example=sums[1] / examples, rest=time.process_time() - starts[1] - sums[1],
                bytes=dp_sgd.peak_memory(z_0.device))


def estimate(preset: str, chunk: int) -> float:
    """GiB that --describe expects, without a text encoder."""
    config = Config(**{**PRESETS[preset], "chunk": str(chunk), "describe": True})
    total = float(re.search(r"needs about ([0-9.]+) GiB", describe(config)).group(1))
    return total - (32 * TEXT_ENCODER_PARAMETERS / 2**30 if config.context_tokens > 1 else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4, help="examples per step (default 4)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)   # what a child process measures
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.examples)))
        return
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; {args.examples} examples per step\n\n"
          "| preset | --chunk | peak memory | --describe estimates | per example | noise, Adam, average: per step |\n"
          "|---|---|---|---|---|---|")
    for preset, chunk in CASES:
        command = [sys.executable, __file__, "--one", json.dumps([preset, chunk]), "--examples", str(args.examples)]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            print(f"{preset} {chunk}: {(child.stderr.strip().splitlines() or ['killed'])[-1]}", file=sys.stderr)
            continue
        found = json.loads(child.stdout.splitlines()[-1])
        print(f"| {preset} | {chunk} | {found['bytes'] / 2**30:.2f} GiB | {estimate(preset, chunk):.2f} GiB | "
              f"{found['example']:.1f} s | {found['rest']:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
