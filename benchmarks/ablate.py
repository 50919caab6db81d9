"""What helps the private stage? One change at a time to a preset: accuracy and loss as a table.

    python benchmarks/ablate.py runs/mnist/public.pt --folder runs/ablations --jobs 2
    python benchmarks/ablate.py runs/mnist/public.pt --ablations preset lora resblocks all --runs 3
    python benchmarks/ablate.py letters.pt pen.pt --ablations preset    # other public models
    python benchmarks/ablate.py runs/cifar10-small/public.pt --preset cifar10-small \\
        --real cifar10-subset.zip

Each run fine-tunes a public model, draws --count samples and trains small CNNs on them. Their
accuracy on real test images counts; from one classifier to the next it varies by some 0.3 points.
Beside it stands the denoising loss on the test images, which hardly varies. It says nothing of
guidance, and compares only models with the same autoencoder. Runs that are done are not done again:
their results lie in FOLDER/*.json. On a CPU take few --jobs of one thread each (OMP_NUM_THREADS=1).
A GPU, which a small model leaves mostly idle, does many side by side.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import datasets  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from ldm import sample_t_and_noise  # noqa: E402
from runtime.checkpoints import load_checkpoint  # noqa: E402
from runtime.latents import encode_dataset  # noqa: E402


def vary(name: str, flag: str, *values: str) -> dict[str, list[str]]:
    """{"name-value": flags of train.py}; a table.key has no flag of its own, so --set sets it."""
    def flags(value: str) -> list[str]:
        return [flag, value] if flag.startswith("--") else ["--set", f"{flag}={value}"]

    return {f"{name}-{value}": flags(value) for value in values}


# name: flags of train.py, or of sample.py behind "sample"
ABLATIONS = {
    "preset": [],
    "lora": ["--trainable", "lora"],
    "resblocks": ["--trainable", "resblocks"],
    "all": ["--trainable", "all"],
    "blocks-last-2": ["--trainable", "last:2"],
    **vary("epochs", "--epochs", "1", "6", "12"),
    "batch-512": ["--expected-batch", "512"],
    "batch-4096-epochs-24": ["--expected-batch", "4096", "--epochs", "24"],
    "batch-8192-epochs-8": ["--expected-batch", "8192", "--epochs", "8"],
    **vary("lr", "--private-lr", "1e-3", "2e-3", "4e-3", "8e-3"),
    **vary("C", "--max-grad-norm", "0.01", "0.1", "0.3", "1"),
    **vary("K", "--noise-multiplicity", "1", "2", "4", "8"),
    "K-16": ["--noise-multiplicity", "16", "--physical-batch", "512"],
    "K-32": ["--noise-multiplicity", "32", "--physical-batch", "256"],
    "t-all": ["--set", "private.timesteps=[0, 1000]"],
    **{f"t-{low}-{high}": ["--set", f"private.timesteps=[{low}, {high}]"]
       for low, high in ((30, 600), (200, 600), (200, 800), (400, 800), (300, 500))},
    **vary("ema", "diffusion.ema_decay", "0.8", "0.5"),
    **vary("embedder", "private.embedder_scale", "1", "5", "10", "30", "100"),
    "rdp": ["--accountant", "rdp"],
    "dropout-0.1": ["--label-dropout", "0.1"],
    **{f"guidance-{w}": ["sample", "--guidance", w] for w in ("1.25", "1.5", "2")},
    "ddim-25-eta-1": ["sample", "--solver", "ddim", "--eta", "1", "--steps", "25"],
}


# ---- one run -----------------------------------------------------------------------------------

def steps_of(args: argparse.Namespace, public: Path, ablation: str, eps: float,
             out: Path) -> list[list[str]]:
    """The commands of a run: [program, arguments ...]."""
    flags, where = ABLATIONS[ablation], ["--data-dir", args.data_dir]
    training, sampling = ([], flags[1:]) if flags[:1] == ["sample"] else (flags, [])
    checkpoint, samples, report = (
        str(out / name) for name in (f"private-eps{eps:g}.pt", "samples.npz", "report.json"))
    return [["train", "--preset", args.preset, "--private-data", args.real, *where,
             "--stage", "private", "--eps", f"{eps:g}", "--out", str(out),
             "--public-checkpoint", str(public.resolve()), *args.flags, *training],
            ["sample", checkpoint, "--npz", samples, "--count", str(args.count),
             "--guidance", "1", *sampling],
            ["evaluate", samples, "--real", args.real, *where, "--seeds", str(args.seeds),
             "--steps", str(args.steps), "--json", report],
            ["loss", checkpoint, args.real, args.data_dir, report]]


@torch.no_grad()
def add_loss(arguments: list[str]) -> None:
    """Write a checkpoint's loss on 2,000 real test images into a report.

    Nine of ten time steps are from 200 to 799.
    """
    checkpoint, real, data_dir, report = arguments
    model, _ = load_checkpoint(Path(checkpoint))
    vae = model.architecture["vae"]
    test = datasets.load(real, "test", data_dir, vae["resolution"], vae["in_channels"])
    z_0 = encode_dataset(model, test.images[:2_000], torch.device("cpu"))
    labels = torch.from_numpy(test.labels[:2_000])
    draws = sample_t_and_noise(model, z_0, labels, 1, 0.0, np.random.default_rng(0), (200, 800))
    found = json.loads(Path(report).read_text())
    found["loss"] = model(*(x.squeeze(1) for x in draws)).mean().item()
    Path(report).write_text(json.dumps(found))


def run_steps(steps: list[list[str]]) -> None:
    """What a child process does: the commands of one run."""
    programs = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main,
                "loss": add_loss}
    for program, *arguments in steps:
        torch.set_float32_matmul_precision("highest")   # train.py sets it for its process
        programs[program](arguments)


def name_of(args: argparse.Namespace, public: Path, ablation: str, eps: float) -> str:
    """ABLATION.EPS.DIGEST: what all runs of the same commands are called, and no others."""
    commands = json.dumps(steps_of(args, public, ablation, eps, Path()))
    return f"{ablation}.eps{eps:g}.{hashlib.sha256(commands.encode()).hexdigest()[:12]}"


def one_run(args: argparse.Namespace, public: Path, ablation: str, eps: float, run: int) -> None:
    """Train, sample and evaluate in a process of its own, into FOLDER/NAME.RUN.json."""
    out = args.folder.resolve() / f"{name_of(args, public, ablation, eps)}.{run}"
    if time.time() > args.until or Path(f"{out}.json").exists():
        return
    try:
        out.mkdir(parents=True)   # whoever makes the folder does the run
    except FileExistsError:
        print(f"{out} is at work elsewhere, or was interrupted: then delete it to try again",
              file=sys.stderr)
        return
    begin = time.time()
    with open(out / "log.txt", "wb") as log:
        commands = json.dumps(steps_of(args, public, ablation, eps, out))
        done = subprocess.run([sys.executable, __file__, "--one", commands], cwd=ROOT, stdout=log,
                              stderr=log)
    if done.returncode:
        last = (out / "log.txt").read_text().strip().splitlines()[-1:]
        print(f"{out.name} failed: {last}; delete {out} to try again", file=sys.stderr, flush=True)
        return
    os.replace(out / "report.json", f"{out}.json")
    print(f"{out.name}: {time.time() - begin:.0f} s", file=sys.stderr, flush=True)


# ---- the table ---------------------------------------------------------------------------------

def cell(args: argparse.Namespace, public: Path, ablation: str, eps: float) -> str:
    """Mean accuracy and loss of all finished runs, and how far they spread; "-" without runs."""
    finished = sorted(args.folder.glob(f"{name_of(args, public, ablation, eps)}.*.json"))
    reports = [json.loads(path.read_text()) for path in finished]
    if not reports:
        return "-"
    found = ([r["results"][0]["accuracy"]["small-cnn"]["mean"] for r in reports],
             [r["loss"] for r in reports])
    accuracy, loss = (statistics.mean(v) for v in found)
    if len(reports) == 1:
        return f"{accuracy:.2%}, {loss:.4f}"
    spread = [statistics.stdev(v) for v in found]
    return (f"{accuracy:.2%} ± {spread[0]:.2%}, {loss:.4f} ± {spread[1]:.4f} "
            f"({len(reports)} runs)")


def print_table(args: argparse.Namespace) -> None:
    epsilons = " | ".join(f"eps = {eps:g}" for eps in args.eps)
    print(f"| public model | change | flags | {epsilons} |")
    print("|---" * (3 + len(args.eps)) + "|")
    for public, ablation in itertools.product(args.public, args.ablations):
        cells = [cell(args, public, ablation, eps) for eps in args.eps]
        if set(cells) != {"-"}:
            flags = shlex.join(ABLATIONS[ablation])
            print(f"| {public} | {ablation} | `{flags}` | {' | '.join(cells)} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("public", type=Path, nargs="*", help="public checkpoints of the preset")
    add("--preset", default="mnist", help="what the changes are made to")
    add("--real", default="mnist", help="private training images, and test images that count")
    add("--data-dir", default="data")
    add("--folder", type=Path, default=Path("runs/ablations"))
    add("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    add("--eps", type=float, nargs="+", default=[10.0, 1.0])
    add("--runs", type=int, default=1, help="of every ablation and epsilon")
    add("--seeds", type=int, default=2, help="classifiers per run")
    add("--steps", type=int, default=2_000, help="batches per classifier")
    add("--count", type=int, default=10_000, help="samples per run")
    add("--jobs", type=int, default=1, help="runs side by side")
    add("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    add("--one", type=json.loads, help=argparse.SUPPRESS)   # the commands of a child process
    add("--flags", nargs=argparse.REMAINDER, default=[], help="last: more flags of train.py")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.one:
        run_steps(args.one)
        return
    args.until = time.time() + 60 * args.minutes
    with ThreadPoolExecutor(args.jobs) as pool:
        work = itertools.product(range(args.runs), args.ablations, args.public, args.eps)
        futures = [pool.submit(one_run, args, public, ablation, eps, run)
                   for run, ablation, public, eps in work]
        for future in futures:
            future.result()
    print_table(args)


if __name__ == "__main__":
    main()
