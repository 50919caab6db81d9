"""What should the private stage train? Attention, LoRA in it, residual blocks or everything, at equal budget and steps.

    python benchmarks/parts.py runs/mnist/public.pt --data-dir data/mnist --folder runs/parts

Each choice is trained --runs times at every epsilon, from the same public model; a run is short, so that all of them
take about an hour on one core. 2,000 samples of each run train a small CNN, whose accuracy on real test images
counts. What is done already (FOLDER/*.json) is not done again, so that two of these can share the work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ldm import load_checkpoint, with_lora  # noqa: E402
from unet import PRIVATE_PARTS, private_parameter_names  # noqa: E402

BUDGET = ["--preset", "mnist", "--epochs", "2", "--expected-batch", "512", "--private-lr", "4e-3"]


def python(*arguments) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def trained_share(public: Path, parts: str, rank: int = 8) -> float:
    """Trained parameters over all those of U-Net and embedder."""
    model = load_checkpoint(public)[0]
    model = with_lora(model, rank, 0) if parts == "lora" else model
    sizes = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("vae.")}
    return sum(sizes[name] for name in private_parameter_names(model, parts=parts)) / sum(sizes.values())


def one_run(args: argparse.Namespace, parts: str, eps: float, run: int) -> None:
    """Train, sample and evaluate, into FOLDER/PARTS-EPS-RUN.json."""
    out = args.folder / f"{parts}-{eps:g}-{run}"
    try:
        out.mkdir(parents=True)   # whoever makes the folder does the run
    except FileExistsError:
        return
    print(f"{out.name} ...", flush=True)
    python("train.py", *BUDGET, "--stage", "private", "--eps", eps, "--train", parts, "--data-dir", args.data_dir,
           "--public-checkpoint", args.public.resolve(), "--out", out.resolve(), *args.flags)
    python("sample.py", out.resolve() / f"private-eps{eps:g}.pt", "--npz", out.resolve() / "samples.npz",
           "--count", 2000)
    python("evaluate.py", out.resolve() / "samples.npz", "--real", "mnist", "--data-dir", args.data_dir, "--steps", 600,
           "--seeds", 1, "--json", out.resolve() / "report.json")
    os.replace(out / "report.json", out.with_suffix(".json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("public", type=Path, help="public checkpoint of the mnist preset")
    parser.add_argument("--data-dir", default="data/mnist")
    parser.add_argument("--folder", type=Path, default=Path("runs/parts"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--eps", type=float, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: more flags of train.py")
    args = parser.parse_args()
    for run in range(args.runs):
        for eps in args.eps:
            for parts in PRIVATE_PARTS:
                one_run(args, parts, eps, run)
    print(f"| --train | trained | {' | '.join(f'eps = {eps:g}' for eps in args.eps)} |")
    print("|---" * (2 + len(args.eps)) + "|")
    for parts in PRIVATE_PARTS:
        cells = []
        for eps in args.eps:
            reports = [json.loads(path.read_text()) for path in sorted(args.folder.glob(f"{parts}-{eps:g}-*.json"))]
            scores = [report["results"][0]["accuracy"]["small-cnn"]["mean"] for report in reports]
            spread = f" ± {statistics.stdev(scores):.2%}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.2%}{spread} ({len(scores)})" if scores else "-")
        print(f"| {parts} | {trained_share(args.public, parts):.1%} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
