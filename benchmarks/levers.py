"""What helps the private stage? One change at a time to a preset: accuracy and loss as a table.

    python benchmarks/levers.py runs/mnist/public.pt --data-dir data/mnist --folder runs/levers --jobs 2
    python benchmarks/levers.py runs/mnist/public.pt --levers preset lora resblocks all --runs 3
    python benchmarks/levers.py letters.pt pen.pt --levers preset      # other public models, preset flags
    python benchmarks/levers.py runs/cifar10-small/public.pt --preset cifar10-small --real cifar10-subset.zip

Each run fine-tunes a public model, draws --count samples and trains small CNNs on them, whose accuracy on real test
images counts. That varies by some 0.3 points from one classifier to the next; the denoising loss on the test images,
beside it in the table, hardly varies, but says nothing of guidance, and only of models with one autoencoder. Runs that
are done (FOLDER/*.json) are not done again. On a CPU take few --jobs of one thread each (OMP_NUM_THREADS=1); a GPU,
which a small model leaves mostly idle, does many side by side.
"""

import argparse
import hashlib
import itertools
import json
import os
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

import data  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from ldm import load_checkpoint, noise_draws  # noqa: E402

# name: flags of train.py, or of sample.py behind "sample"
LEVERS = {
    "preset": [],
    "lora": ["--train", "lora"], "resblocks": ["--train", "resblocks"], "all": ["--train", "all"],
    "blocks-last-2": ["--attention-blocks", "last:2"],
    "epochs-1": ["--epochs", "1"], "epochs-6": ["--epochs", "6"], "epochs-12": ["--epochs", "12"],
    "batch-512": ["--expected-batch", "512"],
    "batch-4096-epochs-24": ["--expected-batch", "4096", "--epochs", "24"],
    "batch-8192-epochs-8": ["--expected-batch", "8192", "--epochs", "8"],
    "lr-1e-3": ["--private-lr", "1e-3"], "lr-2e-3": ["--private-lr", "2e-3"],
    "lr-4e-3": ["--private-lr", "4e-3"], "lr-8e-3": ["--private-lr", "8e-3"],
    "C-0.01": ["--max-grad-norm", "0.01"], "C-0.1": ["--max-grad-norm", "0.1"],
    "C-0.3": ["--max-grad-norm", "0.3"], "C-1": ["--max-grad-norm", "1"],
    "K-1": ["--noise-draws", "1"], "K-2": ["--noise-draws", "2"], "K-4": ["--noise-draws", "4"],
    "K-8": ["--noise-draws", "8"], "K-16": ["--noise-draws", "16", "--chunk", "512"],
    "K-32": ["--noise-draws", "32", "--chunk", "256"],
    "t-all": ["--private-timesteps", "0", "1000"], "t-30-600": ["--private-timesteps", "30", "600"],
    "t-200-600": ["--private-timesteps", "200", "600"], "t-200-800": ["--private-timesteps", "200", "800"],
    "t-400-800": ["--private-timesteps", "400", "800"], "t-300-500": ["--private-timesteps", "300", "500"],
    "ema-0.8": ["--ema-decay", "0.8"], "ema-0.5": ["--ema-decay", "0.5"],
    "embedder-1": ["--embedder-scale", "1"], "embedder-5": ["--embedder-scale", "5"],
    "embedder-10": ["--embedder-scale", "10"],
    "embedder-30": ["--embedder-scale", "30"], "embedder-100": ["--embedder-scale", "100"],
    "rdp": ["--accountant", "rdp"], "dropout-0.1": ["--label-dropout", "0.1"],
    "guidance-1.25": ["sample", "--guidance", "1.25"], "guidance-1.5": ["sample", "--guidance", "1.5"],
    "guidance-2": ["sample", "--guidance", "2"],
    "ddim-25-eta-1": ["sample", "--order", "1", "--eta", "1", "--steps", "25"],
}


def steps_of(args: argparse.Namespace, public: Path, lever: str, eps: float, out: Path) -> list[list[str]]:
    """The commands of a run: [program, arguments ...]."""
    flags, where = LEVERS[lever], ["--data-dir", args.data_dir]
    training, sampling = ([], flags[1:]) if flags[:1] == ["sample"] else (flags, [])
    checkpoint, samples, report = (str(out / name) for name in (f"private-eps{eps:g}.pt", "samples.npz", "report.json"))
    return [["train", "--preset", args.preset, "--private-data", args.real, *where, "--stage", "private",
             "--eps", f"{eps:g}", "--out", str(out), "--public-checkpoint", str(public.resolve()),
             *args.flags, *training],
            ["sample", checkpoint, "--npz", samples, "--count", str(args.count), "--guidance", "1", *sampling],
            ["evaluate", samples, "--real", args.real, *where, "--seeds", str(args.seeds),
             "--steps", str(args.steps), "--json", report],
            ["loss", checkpoint, args.real, args.data_dir, report]]


@torch.no_grad()
def add_loss(arguments: list[str]) -> None:
    """Write a checkpoint's loss on 2,000 real test images, most time steps from 200 to 799, into a report."""
    checkpoint, real, data_dir, report = arguments
    model, trained = load_checkpoint(Path(checkpoint))
    test = data.load(real, "test", data_dir, trained["config"]["image_size"], trained["config"]["channels"])
    z_0 = train.encode_all(model, test.images[:2_000], torch.device("cpu"))
    draws = noise_draws(model, z_0, torch.from_numpy(test.labels[:2_000]), 1, 0.0, np.random.default_rng(0), (200, 800))
    facts = json.loads(Path(report).read_text())
    facts["loss"] = model(*(x.squeeze(1) for x in draws)).mean().item()
    Path(report).write_text(json.dumps(facts))


def name_of(args: argparse.Namespace, public: Path, lever: str, eps: float) -> str:
    """What all runs of these commands are called, and no others: LEVER.EPS. and a digest of the commands."""
    commands = json.dumps(steps_of(args, public, lever, eps, Path()))
    return f"{lever}.eps{eps:g}.{hashlib.sha256(commands.encode()).hexdigest()[:12]}"


def one_run(args: argparse.Namespace, public: Path, lever: str, eps: float, run: int) -> None:
    """Train, sample and evaluate in a process of its own, into FOLDER/NAME.RUN.json."""
    out = args.folder.resolve() / f"{name_of(args, public, lever, eps)}.{run}"
    if time.time() > args.until or Path(f"{out}.json").exists():
        return
    try:
        out.mkdir(parents=True)   # whoever makes the folder does the run
    except FileExistsError:
        print(f"{out} is at work elsewhere, or was interrupted: then delete it to try again", file=sys.stderr)
        return
    begin = time.time()
    with open(out / "log.txt", "wb") as log:
        commands = json.dumps(steps_of(args, public, lever, eps, out))
        done = subprocess.run([sys.executable, __file__, "--one", commands], cwd=ROOT, stdout=log, stderr=log)
    if done.returncode:
        last = (out / "log.txt").read_text().strip().splitlines()[-1:]
        print(f"{out.name} failed: {last}; delete {out} to try again", file=sys.stderr, flush=True)
        return
    os.replace(out / "report.json", f"{out}.json")
    print(f"{out.name}: {time.time() - begin:.0f} s", file=sys.stderr, flush=True)


def cell(args: argparse.Namespace, public: Path, lever: str, eps: float) -> str:
    """Mean accuracy and loss of all finished runs, and how far they spread; "-" where there are none."""
    finished = sorted(args.folder.glob(f"{name_of(args, public, lever, eps)}.*.json"))
    reports = [json.loads(path.read_text()) for path in finished]
    if not reports:
        return "-"
    found = [r["results"][0]["accuracy"]["small-cnn"]["mean"] for r in reports], [r["loss"] for r in reports]
    accuracy, loss = (statistics.mean(v) for v in found)
    if len(reports) == 1:
        return f"{accuracy:.2%}, {loss:.4f}"
    spread = [statistics.stdev(v) for v in found]
    return f"{accuracy:.2%} ± {spread[0]:.2%}, {loss:.4f} ± {spread[1]:.4f} ({len(reports)} runs)"


def print_table(args: argparse.Namespace) -> None:
    print(f"| public model | change | flags | {' | '.join(f'eps = {eps:g}' for eps in args.eps)} |")
    print("|---" * (3 + len(args.eps)) + "|")
    for public in args.public:
        for lever in args.levers:
            cells = [cell(args, public, lever, eps) for eps in args.eps]
            if set(cells) != {"-"}:
                print(f"| {public} | {lever} | `{' '.join(LEVERS[lever])}` | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("public", type=Path, nargs="*", help="public checkpoints of the preset")
    parser.add_argument("--preset", default="mnist", help="flags of train.py that the changes are made to")
    parser.add_argument("--real", default="mnist", help="private training images, and the test images that count")
    parser.add_argument("--data-dir", default="data/mnist")
    parser.add_argument("--folder", type=Path, default=Path("runs/levers"))
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--eps", type=float, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--runs", type=int, default=1, help="of every lever and epsilon")
    parser.add_argument("--seeds", type=int, default=2, help="classifiers per run")
    parser.add_argument("--steps", type=int, default=2_000, help="batches per classifier")
    parser.add_argument("--count", type=int, default=10_000, help="samples per run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)   # the commands of a child process
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: more flags of train.py")
    args = parser.parse_args()
    if args.one:
        programs = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main, "loss": add_loss}
        for program, *arguments in args.one:
            torch.set_float32_matmul_precision("highest")   # train.py sets it for its process
            programs[program](arguments)
        return
    args.until = time.time() + 60 * args.minutes
    with ThreadPoolExecutor(args.jobs) as pool:
        work = itertools.product(range(args.runs), args.levers, args.public, args.eps)
        for future in [pool.submit(one_run, args, public, lever, eps, run) for run, lever, public, eps in work]:
            future.result()
    print_table(args)


if __name__ == "__main__":
    main()
