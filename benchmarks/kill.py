"""Kill a private run at random moments (SIGKILL, 20 times) and resume it: does the ledger end as planned?

    python benchmarks/kill.py          # a few minutes; prints one line per kill and the ledger at the end

A tiny model on random images, in a temporary folder: what is tested is the book-keeping, not the learning.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dp_sgd import spent_epsilon  # noqa: E402  (after the path is set)
from ldm import load_checkpoint  # noqa: E402

KILLS, STEPS = 20, 5_000
FLAGS = ("--vae-channels 8 --vae-mult 1 1 2 --latent-channels 4 --vae-steps 2 --vae-batch 4 --unet-channels 16 "
         "--unet-mult 1 --attention-resolutions 1 --num-heads 2 --context-dim 8 --public-steps 2 --public-batch 4 "
         "--image-size 8 --expected-batch 8 --sample-steps 2 --eps 3 --save-every 5 --resume").split()


def make_images(folder: Path, count: int) -> Path:
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        command = [sys.executable, "train.py", *FLAGS, "--epochs", str(STEPS * 8 / 24), "--out", folder,
                   "--public-data", str(make_images(out / "public", 12)),
                   "--private-data", str(make_images(out / "private", 24))]
        unfinished, target = out / "private-eps3.unfinished.pt", out / "private-eps3.pt"
        kills = 0
        while kills < KILLS and not target.exists():
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(random.uniform(2, 9))   # from the imports to the middle of training, or of a write
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                break
            kills += 1
            steps = load_checkpoint(unfinished)[1]["training"]["steps"] if unfinished.exists() else 0
            print(f"kill {kills:2d}: {steps:5d} steps are safe", flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ledger = load_checkpoint(target)[1]["ledger"]
        print(f"{kills} kills; the ledger says {[entry['steps'] for entry in ledger]} steps (planned {STEPS}), "
              f"epsilon {spent_epsilon(ledger, 1e-5):.6f} (budget 3)")
        assert [entry["steps"] for entry in ledger] == [STEPS] and spent_epsilon(ledger, 1e-5) <= 3
        assert not unfinished.exists()   # a kill during a write may leave a .partial file, which nobody reads


if __name__ == "__main__":
    main()
