"""What data larger than memory take: processor time and memory of every phase of both stages.

    OMP_NUM_THREADS=1 python benchmarks/data_size.py --folder 20000    # 256x256: 3.9 GB decoded
    OMP_NUM_THREADS=1 python benchmarks/data_size.py --table 1000 10000 100000 1000000

--folder makes two folders of so many JPEGs, 256x256: 140 rendered scenes, each picture with noise
of its own. --table makes two .npz of so many letters or digits, 32x32 and not compressed, with
noise. On these data each stage of train.py runs in a process of its own, with few steps. Data and
public models that lie in --out already are not made again.

Seconds are the processor's, of all threads. Peaks are resident memory since the start of the stage,
Python and torch included. They count pages of mapped files too, which the system takes back when it
needs them.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from PIL import Image
from tqdm import trange

import train
from datasets.rendered import load_rendered
from runtime import runs
from runtime.memory import peak_memory

PHASES = [(train, "load_images"), (runs, "public_digest"), (train, "train_autoencoder"),
          (train, "encode_dataset"), (train, "train_public"), (train, "train_private")]
STEPS = 5   # of each loop
FOLDER = ["--preset", "scenes256", "--set", "vae.ch=4", "--set", "private.expected_batch=25"]
TABLE = ["--preset", "glyphs", "--set", "private.expected_batch=256"]


def noisy(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy with noise of a few grey levels."""
    return np.clip(images + rng.integers(-8, 9, images.shape, np.int8), 0, 255).astype(np.uint8)


def make_folder(folder: Path, count: int, source: str) -> None:
    rng, scenes = np.random.default_rng(0), load_rendered(source, "test").images
    (folder / "scene").mkdir(parents=True)
    for k in trange(count, desc=f"making {folder}"):
        image = Image.fromarray(noisy(scenes[k % len(scenes)], rng))
        image.save(folder / "scene" / f"{k:07d}.jpg", quality=80)


def make_npz(path: Path, count: int, source: str) -> None:
    rng, data = np.random.default_rng(0), load_rendered(source, "test")
    some = np.arange(count) % len(data.labels)
    images = np.empty((count, 32, 32), np.uint8)
    for start in trange(0, count, 1000, desc=f"making {path}"):
        part = data.images[some[start:start + 1000], ..., 0]
        images[start:start + 1000] = noisy(np.pad(part, ((0, 0), (2, 2), (2, 2))), rng)
    np.savez(path, images=images, labels=data.labels[some], classes=np.array(data.classes))


def measure(out: Path, count: int, public: Path, private: Path, more: list[str]) -> None:
    """Print a table: a row for each phase of each stage that has not been run yet."""
    epochs = STEPS * int(more[-1].split("=")[1]) / count
    arguments = ["--out", out, "--public-data", public, "--private-data", private, *more,
                 "--set", f"autoencoder.steps={STEPS}", "--public-steps", STEPS, "--epochs", epochs,
                 "--eps", "100", "--set", "samples.steps=1", "--overwrite"]
    for stage in ("private",) if (out / "public.pt").exists() else ("public", "private"):
        command = [sys.executable, __file__, "--child", "--stage", stage, *map(str, arguments)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for line in child.stdout.splitlines():
            phase, seconds, peak = json.loads(line)
            print(f"| {count:,} | {stage} | {phase} | {seconds:.1f} | "
                  f"{1e3 * seconds / count:.2f} | {peak / 2**30:.2f} |", flush=True)


def time_phases(arguments: list[str]) -> None:
    """Run train.py and print a line of JSON after each phase: name, seconds, bytes at the peak."""
    stdout = sys.stdout

    def timed(module: object, name: str) -> None:
        function = getattr(module, name)

        def wrapper(*values: object, **named: object) -> object:
            start = time.process_time()
            found = function(*values, **named)
            peak = peak_memory(torch.device("cpu"))
            print(json.dumps([name, time.process_time() - start, peak]), file=stdout, flush=True)
            return found

        setattr(module, name, wrapper)

    for phase in PHASES:
        timed(*phase)
    with contextlib.redirect_stdout(sys.stderr):
        train.main(arguments)
    print(json.dumps(["whole stage", time.process_time(), peak_memory(torch.device("cpu"))]))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        time_phases(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=int, metavar="N", help="pictures in each of two folders")
    parser.add_argument("--table", type=int, nargs="*", default=[], metavar="N",
                        help="images in each of two .npz")
    parser.add_argument("--out", type=Path, default=Path("runs/data-size"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cases = [(count, make_npz, "{}.npz", ("letters", "digits"), TABLE) for count in args.table]
    if args.folder:
        cases.append((args.folder, make_folder, "{}", ("scenes", "scenes-private"), FOLDER))
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads\n\n"
          "| N | stage | phase | s | ms an image | peak, GiB |\n|---|---|---|---|---|---|")
    for count, make, name, sources, more in cases:
        paths = [args.out / name.format(f"{source}-{count}") for source in sources]
        for path, source in zip(paths, sources, strict=True):
            if not path.exists():
                make(path, count, source)
        measure(args.out / f"run-{count}", count, *paths, more)


if __name__ == "__main__":
    main()
