"""Kill a private run at 20 random moments and resume it: does the ledger end as planned?

    python benchmarks/kill.py          # a few minutes; prints a line per kill, then the ledger

The signal is SIGKILL. The model is tiny and the images are random, in a temporary folder: this
tests the book-keeping, not the learning.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from runtime.checkpoints import load_checkpoint  # noqa: E402
from runtime.ledger import spent_epsilon  # noqa: E402

KILLS, STEPS = 20, 5_000
SETTINGS = ["data.image_size=8", "vae.ch=8", "vae.ch_mult=[1, 1, 2]", "vae.z_channels=4",
            "unet.model_channels=16", "unet.channel_mult=[1]", "unet.attention_resolutions=[1]",
            "unet.num_heads=2", "unet.context_dim=8", "autoencoder.steps=2", "autoencoder.batch=4",
            "public.steps=2", "public.batch=4", "samples.steps=2", "private.epsilon=3",
            "private.expected_batch=8", f"private.epochs={STEPS * 8 / 24}", "run.save_every=5"]


def make_images(folder: Path, count: int) -> Path:
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def command(out: Path) -> list[str]:
    """A run of train.py in the folder `out`, begun or resumed."""
    settings = [word for text in SETTINGS for word in ("--set", text)]
    return [sys.executable, "train.py", *settings, "--resume", "--out", str(out),
            "--public-data", str(make_images(out / "public", 12)),
            "--private-data", str(make_images(out / "private", 24))]


def kill_and_resume(run: list[str], unfinished: Path, target: Path) -> int:
    """Start `run` and kill it, until it was killed KILLS times or ends; how often it was killed."""
    for kills in range(KILLS):
        if target.exists():
            return kills
        process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(2, 9))   # in the imports, in training, or in a write
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            return kills
        steps = load_checkpoint(unfinished)[1]["training"]["step"] if unfinished.exists() else 0
        print(f"kill {kills + 1:2d}: {steps:5d} steps are safe", flush=True)
    return KILLS


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        unfinished, target = out / "private-eps3.unfinished.pt", out / "private-eps3.pt"
        run = command(out)
        kills = kill_and_resume(run, unfinished, target)
        subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        ledger = load_checkpoint(target)[1]["ledger"]
        steps, epsilon = [entry["steps"] for entry in ledger], spent_epsilon(ledger, 1e-5)
        print(f"{kills} kills; the ledger says {steps} steps (planned {STEPS}), epsilon "
              f"{epsilon:.6f} (budget 3)")
        assert steps == [STEPS] and epsilon <= 3
        # A kill during a write may leave a .partial file, which the next write deletes.
        assert not unfinished.exists()


if __name__ == "__main__":
    main()
