"""Do small data take longer than before? Both stages of an older checkout and of this one.

    git worktree add ../older 3e78b17
    python benchmarks/small_data.py ../older

Letters (40,000) and digits (20,000), 32x32, and two folders of 2,000 PNGs, 64x64. Each stage takes
one step of each loop: the rest is loading, digests and encoding. Stages of the two checkouts take
turns. Seconds are of whole programs, of which some five load packages.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
STEP = ["--set", "autoencoder.steps=1", "--public-steps", "1", "--epochs", "0.001", "--eps", "100",
        "--set", "samples.steps=1", "--overwrite"]


def make_folder(folder: Path, seed: int, count: int = 2_000) -> None:
    """PNGs of two classes."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        path = folder / "ab"[k % 2] / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(path)


def seconds_of(checkout: Path, stage: str, out: Path, threads: int, more: list[str]) -> float:
    """Of one stage of `checkout`, data included."""
    command = [sys.executable, checkout / "train.py", "--stage", stage, "--out", out,
               "--set", f"run.data_dir={HERE / 'data'}", *STEP, *more]
    start = time.perf_counter()
    subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS=str(threads)), check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("older", type=Path, help="folder of the older checkout")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(folder, name) for name in ("public", "private")]
        for seed, path in enumerate(images):
            make_folder(path, seed)
        pngs = ["--public-data", images[0], "--private-data", images[1],
                "--set", "data.image_size=64", "--set", "data.channels=3"]
        print("| data | stage | threads | before, s | now, s | ratio |\n|---|---|---|---|---|---|")
        for data, more in (("letters, digits", []), ("PNGs", pngs)):
            for stage in ("public", "private"):
                for threads in (1, 2):
                    times = [[seconds_of(checkout, stage, Path(folder, data, str(k)), threads, more)
                              for k, checkout in enumerate((args.older.resolve(), HERE))]
                             for _ in tqdm(range(args.turns), desc=f"{data}, {stage}", leave=False)]
                    before, now = (statistics.median(column) for column in zip(*times, strict=True))
                    print(f"| {data} | {stage} | {threads} | {before:.1f} | {now:.1f} "
                          f"| {now / before:.2f} |", flush=True)


if __name__ == "__main__":
    main()
