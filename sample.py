"""Sample images from checkpoints of train.py: a labelled PNG grid, or an .npz of images and labels.

    python sample.py runs/glyphs/private-eps1.pt --grid digits.png
    python sample.py runs/glyphs/private-eps1.pt --npz digits.npz --count 10000
    python sample.py runs/glyphs-text/private-eps10.pt --prompt "a thin digit 7 leaning right" --grid sevens.png
    python sample.py PUBLIC.pt EPS10.pt EPS1.pt --real digits --grid figure.png --caption-from results.json

The last line puts samples side by side; the caption has the accuracies that `evaluate.py --json results.json` found.

Sampling is post-processing: it reads only the checkpoint and costs no privacy, however many images are drawn.
`--real` is the exception: it puts real test images beside the samples, for data that may be shown.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from config import Parser, find_device, one_line_errors
from dp_sgd import is_seeded, spent_epsilon
from ldm import LatentDiffusion, TextEmbedder, check_prompts, check_sampling, load_checkpoint
from vae import images_at_once


def sample(model: LatentDiffusion, labels: np.ndarray, steps: int, eta: float, order: int, guidance: float,
           seed: int) -> np.ndarray:
    """Images uint8 [N, H, W, C] of the classes `labels` int [N], or captions int [N, L].

    They are the same for the same seed and machine.
    """
    device = model.latent_scale.device
    batch = 2 * images_at_once(model.architecture["vae"]["resolution"])   # decoding splits them again
    generator = torch.Generator().manual_seed(seed)
    images = []
    with tqdm(total=len(labels), desc="sampling", unit="image") as progress:
        for part in np.array_split(labels, max(1, -(-len(labels) // batch))):
            classes = torch.from_numpy(part).to(device)
            drawn = model.generate(classes, steps, eta, guidance, generator, order)
            images.append(drawn.cpu().numpy())
            progress.update(len(part))
    return np.concatenate(images)


def uniform_labels(count: int, classes: int) -> np.ndarray:
    """`count` labels, as evenly spread as can be. The private class counts would be a leak; nobody needs them."""
    return np.arange(count) % classes


def origin(path: Path, facts: dict) -> dict:
    """Which checkpoint (`path`, holding `facts`) samples are from, and what it has spent: None if only public data."""
    found = dict(checkpoint=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), epsilon=None, delta=None)
    if facts.get("ledger"):
        found["delta"] = facts["plan"]["delta"]
        found["epsilon"] = math.inf if is_seeded(facts["ledger"]) else spent_epsilon(
            facts["ledger"], found["delta"], facts["config"]["accountant"])
    return found


def title(source: dict) -> str:
    return f"eps = {source['epsilon']:.3g}" if source["epsilon"] else "public only"


def caption(origins: list[dict], results: Path | None) -> str:
    """What is to be said of samples: their delta, and the accuracies that evaluate.py --json found for them.

    ValueError if `results` is no file of evaluate.py, or one about none of these checkpoints.
    """
    deltas = sorted({o["delta"] for o in origins if o["delta"]})
    text = f"delta = {', '.join(f'{d:g}' for d in deltas)}. " if deltas else ""
    if not results:
        return text
    try:
        report = json.loads(results.read_text())
        shown = {o["sha256"]: title(o) for o in origins}
        parts = []
        for row in report["results"]:
            scores = ", ".join(f"{name} {a['mean']:.2%}" for name, a in row["accuracy"].items())
            if row["origin"].get("sha256") in shown or row["origin"].get("real"):
                parts.append(f"{shown.get(row['origin'].get('sha256'), 'real images')}: {scores}")
        head = f"Accuracy on {report['test_images']:,} real test images of classifiers trained on"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{results} is no readable file of evaluate.py --json: {error!r}") from error
    if not any(row["origin"].get("sha256") in shown for row in report["results"]):
        raise ValueError(f"{results} is about other checkpoints: evaluate samples of these (sample.py --npz) first")
    return f"{text}{head} {'; '.join(parts)} (mean of {report['seeds']})."


def names_of(model: LatentDiffusion, facts: dict, prompts: list[str]) -> list[str]:
    """What there are samples of: the prompts, or without captions all classes. ValueError for the wrong prompts."""
    if not isinstance(model.embedder, TextEmbedder):
        if prompts:
            raise ValueError("this model was trained on classes, not on captions: leave out --prompt")
        return facts["classes"]
    if not prompts:
        raise ValueError("this model was trained on captions: say what to sample by --prompt TEXT")
    check_prompts(prompts, model.architecture["text"]["length"])
    return prompts


def grid_panel(model: LatentDiffusion, names: list[str], source: dict,
               args: argparse.Namespace) -> tuple[str, np.ndarray, list[str]]:
    """Title, samples [rows, columns, H, W, C] and row names of one checkpoint, for data.save_grid."""
    labels = np.repeat(model.conditions(names).numpy(), args.columns, axis=0)
    images = sample(model.to(args.device), labels, args.steps, args.eta, args.order, args.guidance, args.seed)
    return title(source), images.reshape(len(names), args.columns, *images.shape[1:]), names


def write_npz(args: argparse.Namespace) -> None:
    """Write --npz: --count samples of the one checkpoint, evenly of all its classes or of the prompts."""
    model, facts = load_checkpoint(args.checkpoints[0])
    names = names_of(model, facts, args.prompt)
    labels = uniform_labels(args.count, len(names))
    conditions = model.conditions(names).numpy()[labels]
    images = sample(model.to(args.device), conditions, args.steps, args.eta, args.order, args.guidance, args.seed)
    source = dict(origin(args.checkpoints[0], facts), steps=args.steps, order=args.order, eta=args.eta,
                  guidance=args.guidance, seed=args.seed, **({"prompts": names} if args.prompt else {}))
    data.save_arrays(args.npz, images=images, labels=labels, origin=np.array(json.dumps(source)))
    print(f"wrote {args.count:,} images to {args.npz}")


def write_grid(args: argparse.Namespace) -> None:
    """Write --grid: a panel of samples of every checkpoint, after one of real images if --real says which."""
    loaded = [load_checkpoint(path) for path in args.checkpoints]
    names = [names_of(model, facts, args.prompt) for model, facts in loaded]
    origins = [origin(path, facts) for path, (_, facts) in zip(args.checkpoints, loaded, strict=True)]
    text, panels = caption(origins, args.caption_from), []
    if args.real:
        vae = loaded[0][1]["architecture"]["vae"]
        real = data.load(args.real, "test", args.data_dir, vae["resolution"], vae["in_channels"])
        rows = data.rows_by_caption(real, args.prompt, args.columns) if args.prompt else data.rows_by_class(
            real, args.columns)
        panels.append(("real", *rows))
    panels += [grid_panel(model, shown if args.prompt else shown[:10], source, args)
               for (model, _), shown, source in zip(loaded, names, origins, strict=True)]
    data.save_grid(args.grid, panels, text)
    print(f"wrote {args.grid}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="checkpoint files of train.py")
    parser.add_argument("--grid", type=Path, help="write this PNG: samples by class, the checkpoints side by side")
    parser.add_argument("--npz", type=Path, help="write this .npz: images uint8 [n, H, W, C], labels int64 [n]")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="for a model of captions: what to sample; several give one row each, and the .npz all in "
                        "turn, labelled by their number")
    parser.add_argument("--count", type=int, default=10_000, help="images in the .npz (default 10000)")
    parser.add_argument("--real", help="first panel of the grid: real test images (letters, digits, mnist, ...)")
    parser.add_argument("--caption-from", type=Path, metavar="FILE",
                        help="put the accuracies in this file of evaluate.py --json below the grid")
    parser.add_argument("--data-dir", default="data", help="folder of the files of named data sets")
    parser.add_argument("--columns", type=int, default=10, help="images per class in the grid (default 10)")
    parser.add_argument("--steps", type=int, default=12, help="network evaluations (default 12)")
    parser.add_argument("--order", type=int, default=2, help="1: DDIM, 2: DPM-Solver++ 2M (default 2)")
    parser.add_argument("--eta", type=float, default=0.0, help="with --order 1 up to 1, DDPM's noise (default 0)")
    parser.add_argument("--guidance", type=float, default=1.5, help="classifier-free guidance; 1 is none (default 1.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ..., or auto (default)")
    args = parser.parse_args(argv)
    if not args.grid and not args.npz:
        raise ValueError("nothing to do: give --grid FILE.png or --npz FILE.npz")
    if args.npz and (len(args.checkpoints) != 1 or args.count < 1):
        raise ValueError("--npz takes one checkpoint and a --count of at least 1")
    for path, suffix in ((args.grid, ".png"), (args.npz, ".npz")):   # a checkpoint named there would be lost
        if path and (path.suffix != suffix or path.is_dir()):
            raise ValueError(f"{path} must be the name of a {suffix} file")
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance must be finite, not {args.guidance:g}")
    if args.columns < 1:
        raise ValueError(f"--columns must be at least 1, not {args.columns}")
    if args.caption_from and not args.grid:
        raise ValueError("--caption-from is for --grid FILE.png: give that too")
    check_sampling(args.steps, args.eta, args.order)   # complains now rather than after loading
    args.device = find_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.npz:
        write_npz(args)
    if args.grid:
        write_grid(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
