"""What helps the private stage? One change at a time to the mnist preset: accuracy at every epsilon, as a table.

    python benchmarks/levers.py runs/mnist/public.pt --data-dir data/mnist --folder runs/levers --jobs 2
    python benchmarks/levers.py runs/mnist/public.pt --levers preset lora resblocks all --runs 3
    python benchmarks/levers.py letters.pt pen.pt --levers preset      # other public models, preset flags

Each run fine-tunes a public model, draws --count samples and trains small CNNs on them, whose accuracy on real test
images counts. Runs that are done (FOLDER/*.json) are not done again. On a CPU take few --jobs of one thread each
(OMP_NUM_THREADS=1); a GPU, which a small model leaves mostly idle, does many side by side.
"""

import argparse
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
from ldm import load_checkpoint, with_lora  # noqa: E402
from unet import private_parameter_names  # noqa: E402

# name: flags of train.py, or of sample.py behind "sample"
LEVERS = {
    "preset": [],
    "lora": ["--train", "lora"], "resblocks": ["--train", "resblocks"], "all": ["--train", "all"],
    "epochs-6": ["--epochs", "6"], "epochs-100": ["--epochs", "100"],
    "batch-512": ["--expected-batch", "512"],
    "batch-4096-epochs-24": ["--expected-batch", "4096", "--epochs", "24"],   # as many steps as the preset
    "batch-8192-epochs-48": ["--expected-batch", "8192", "--epochs", "48"],
    "lr-2e-3": ["--private-lr", "2e-3"], "lr-8e-3": ["--private-lr", "8e-3"],
    "C-0.01": ["--max-grad-norm", "0.01"], "C-0.1": ["--max-grad-norm", "0.1"],
    "C-0.3": ["--max-grad-norm", "0.3"], "C-1": ["--max-grad-norm", "1"],
    "K-4-epochs-3": ["--noise-draws", "4", "--epochs", "3"], "K-4": ["--noise-draws", "4"],
    "K-16": ["--noise-draws", "16", "--chunk", "512"],
    "t-all": ["--private-timesteps", "0", "1000"], "t-30-600": ["--private-timesteps", "30", "600"],
    "ema-0.99": ["--ema-decay", "0.99"], "ema-0.9999": ["--ema-decay", "0.9999"],
    "embedder-1": ["--embedder-scale", "1"], "embedder-10": ["--embedder-scale", "10"],
    "embedder-100": ["--embedder-scale", "100"],
    "rdp": ["--accountant", "rdp"], "dropout-0": ["--label-dropout", "0"],
    "blocks-last-2": ["--attention-blocks", "last:2"],
    "guidance-1": ["sample", "--guidance", "1"], "guidance-1.25": ["sample", "--guidance", "1.25"],
    "guidance-2": ["sample", "--guidance", "2"],
    "ddim-25-eta-1": ["sample", "--order", "1", "--eta", "1", "--steps", "25"],
}


def trained_share(public: Path, flags: list[str]) -> float:
    """Trained parameters over all those of U-Net and embedder."""
    flags = ["--train", "attention", *flags]
    parts = flags[len(flags) - flags[::-1].index("--train")]   # the last one counts
    model = load_checkpoint(public)[0]
    model = with_lora(model, rank=8, seed=0) if parts == "lora" else model
    sizes = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("vae.")}
    return sum(sizes[name] for name in private_parameter_names(model, parts=parts)) / sum(sizes.values())


def steps_of(args: argparse.Namespace, public: Path, lever: str, eps: float, out: Path) -> list[list[str]]:
    """The three commands of a run: [program, arguments ...]."""
    flags, where = LEVERS[lever], ["--data-dir", args.data_dir]
    train, sample = ([], flags[1:]) if flags[:1] == ["sample"] else (flags, [])
    return [["train", "--preset", "mnist", *where, "--stage", "private", "--eps", f"{eps:g}", "--out", str(out),
             "--public-checkpoint", str(public.resolve()), *args.flags, *train],
            ["sample", str(out / f"private-eps{eps:g}.pt"), "--npz", str(out / "samples.npz"),
             "--count", str(args.count), *sample],
            ["evaluate", str(out / "samples.npz"), "--real", "mnist", *where, "--seeds", str(args.seeds),
             "--steps", str(args.steps), "--json", str(out / "report.json")]]


def one_run(args: argparse.Namespace, public: Path, lever: str, eps: float, run: int) -> None:
    """Train, sample and evaluate in a process of its own, into FOLDER/PUBLIC.LEVER.EPS.RUN.json."""
    out = args.folder.resolve() / f"{public.stem}.{lever}.eps{eps:g}.{run}"
    if time.time() > args.until:
        return
    try:
        out.mkdir(parents=True)   # whoever makes the folder does the run
    except FileExistsError:
        return
    begin = time.time()
    with open(out / "log.txt", "wb") as log:
        commands = json.dumps(steps_of(args, public, lever, eps, out))
        done = subprocess.run([sys.executable, __file__, "--one", commands], cwd=ROOT, stdout=log, stderr=log)
    if done.returncode:
        last = (out / "log.txt").read_text().strip().splitlines()[-1:]
        print(f"{out.name} failed: {last}; delete {out} to try again", file=sys.stderr, flush=True)
        return
    os.replace(out / "report.json", args.folder / f"{out.name}.json")
    print(f"{out.name}: {time.time() - begin:.0f} s", file=sys.stderr, flush=True)


def scores(folder: Path, public: Path, lever: str, eps: float) -> list[float]:
    """Mean accuracy of every finished run."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{public.stem}.{lever}.eps{eps:g}.*.json"))]
    return [report["results"][0]["accuracy"]["small-cnn"]["mean"] for report in reports]


def print_table(args: argparse.Namespace) -> None:
    print(f"| public model | change | flags | trained | {' | '.join(f'eps = {eps:g}' for eps in args.eps)} |")
    print("|---" * (4 + len(args.eps)) + "|")
    for public in args.public:
        for lever in args.levers:
            found = [scores(args.folder, public, lever, eps) for eps in args.eps]
            cells = ["-" if not s else f"{statistics.mean(s):.2%}" + (
                f" ± {statistics.stdev(s):.2%} ({len(s)} runs)" if len(s) > 1 else "") for s in found]
            if any(found):
                print(f"| {public.stem} | {lever} | `{' '.join(LEVERS[lever])}` | "
                      f"{trained_share(public, [*args.flags, *LEVERS[lever]]):.1%} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("public", type=Path, nargs="*", help="public checkpoints of the mnist preset")
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
        import torch

        import evaluate
        import sample
        import train
        for program, *arguments in args.one:
            torch.set_float32_matmul_precision("highest")   # train.py sets it for its process
            {"train": train, "sample": sample, "evaluate": evaluate}[program].main(arguments)
        return
    if len({public.stem for public in args.public}) < len(args.public):
        parser.error("two public models have one name: copy them to files with different names")
    args.until = time.time() + 60 * args.minutes
    with ThreadPoolExecutor(args.jobs) as pool:
        work = itertools.product(range(args.runs), args.levers, args.public, args.eps)
        for future in [pool.submit(one_run, args, public, lever, eps, run) for run, lever, public, eps in work]:
            future.result()
    print_table(args)


if __name__ == "__main__":
    main()
