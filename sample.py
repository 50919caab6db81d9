"""Sample images from checkpoints of train.py: a labelled PNG grid, or an .npz of images and labels.

    python sample.py runs/glyphs/private-eps1.pt --grid digits.png
    python sample.py runs/glyphs/private-eps1.pt --npz digits.npz --count 10000
    python sample.py runs/glyphs-text/private-eps10.pt --prompt "a bold digit 7" --grid sevens.png
    python sample.py PUBLIC.pt EPS10.pt EPS1.pt --real digits --grid figure.png \\
        --caption-from results.json

The last line puts samples side by side. The caption has the accuracies that `evaluate.py --json
results.json` found.

Sampling is post-processing: it reads only the checkpoint and costs no privacy, however many images
are drawn. `--real` is the exception: it shows real test images, so their data must be fit to show.
"""

if __name__ == "__main__":   # Ctrl-C while packages load
    import runtime.quiet  # noqa: F401

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import datasets
from ldm import LatentDiffusion, images_at_once
from runtime import threads
from runtime.checkpoints import load_checkpoint
from runtime.cli import Parser, find_device, one_line_errors
from runtime.config import check_sampling
from runtime.files import save_arrays
from runtime.outputs import check_outputs, check_suffix
from runtime.pictures import rows_by_caption, rows_by_class, save_grid
from runtime.samples import SOLVERS, caption, provenance, title
from variants.text import TextEmbedder, check_prompts


def draw_samples(model: LatentDiffusion, conditions: np.ndarray,
                 args: argparse.Namespace) -> np.ndarray:
    """Images uint8 [N, H, W, C] of the classes int [N], or captions int [N, L], `conditions`.

    They are the same for the same seed, machine and number of threads.
    """
    model = model.to(args.device)
    batch = 2 * images_at_once(model.vae.resolution)   # decoding splits them again
    threads.choose(threads.of_unet(model, min(batch, len(conditions))), args.device)
    generator = torch.Generator().manual_seed(args.seed)
    images = []
    with tqdm(total=len(conditions), desc="sampling", unit="image") as progress:
        for part in np.array_split(conditions, max(1, -(-len(conditions) // batch))):
            condition = torch.from_numpy(part).to(args.device)
            drawn = model.generate(condition, args.steps, args.eta, args.guidance, generator,
                                   SOLVERS[args.solver])
            images.append(drawn.cpu().numpy())
            progress.update(len(part))
    return np.concatenate(images)


def uniform_labels(count: int, classes: int) -> np.ndarray:
    """`count` labels, as evenly spread as can be: the private class counts would be a leak."""
    return np.arange(count) % classes


def names_of(model: LatentDiffusion, metadata: dict, prompts: list[str]) -> list[str]:
    """What there are samples of: the prompts, or all classes. ValueError for the wrong prompts."""
    if not isinstance(model.embedder, TextEmbedder):
        if prompts:
            raise ValueError("this model was trained on classes, not on captions: leave out "
                             "--prompt")
        return metadata["classes"]
    if not prompts:
        raise ValueError("this model was trained on captions: say what to sample by --prompt TEXT")
    check_prompts(prompts, model.embedder.length)
    return prompts


def write_npz(args: argparse.Namespace) -> None:
    """Write --npz: --count samples of the one checkpoint, evenly of its classes or the prompts."""
    model, metadata = load_checkpoint(args.checkpoints[0])
    names = names_of(model, metadata, args.prompt)
    labels = uniform_labels(args.count, len(names))
    images = draw_samples(model, model.embedder.conditions(names).numpy()[labels], args)
    origin = {**provenance(args.checkpoints[0], metadata), "prompts": args.prompt,
              **{name: vars(args)[name] for name in ("steps", "solver", "eta", "guidance", "seed")}}
    classes = names if model.architecture["unet"]["context_dim"] else []   # none without condition
    save_arrays(args.npz, images=images, labels=labels, classes=np.array(classes, str),
                origin=np.array(json.dumps(origin)))
    print(f"wrote {args.count:,} images to {args.npz}")


def write_grid(args: argparse.Namespace) -> None:
    """Write --grid: samples of every checkpoint, after real images if --real says which."""
    loaded = [load_checkpoint(path) for path in args.checkpoints]
    names = [names_of(model, metadata, args.prompt) for model, metadata in loaded]
    origins = [provenance(path, metadata)
               for path, (_, metadata) in zip(args.checkpoints, loaded, strict=True)]
    text, panels = caption(origins, args.caption_from), []
    if args.real:
        vae = loaded[0][0].architecture["vae"]
        real = datasets.load(args.real, "test", args.data_dir, vae["resolution"],
                             vae["in_channels"])
        rows = rows_by_caption(real, args.prompt, args.columns) if args.prompt else rows_by_class(
            real, args.columns)
        panels.append(("real", *rows))
    for (model, _), shown, origin in zip(loaded, names, origins, strict=True):
        panels.append(grid_panel(model, shown if args.prompt else shown[:10], title(origin), args))
    save_grid(args.grid, panels, text)
    print(f"wrote {args.grid}")


def grid_panel(model: LatentDiffusion, names: list[str], heading: str,
               args: argparse.Namespace) -> tuple[str, np.ndarray, list[str]]:
    """Heading, samples [rows, columns, H, W, C] and names of the rows, for save_grid."""
    conditions = np.repeat(model.embedder.conditions(names).numpy(), args.columns, axis=0)
    images = draw_samples(model, conditions, args)
    return heading, images.reshape(len(names), args.columns, *images.shape[1:]), names


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, help="checkpoint files of train.py")
    add("--grid", type=Path, help="write this PNG: samples by class, checkpoints side by side")
    add("--npz", type=Path, help="write this .npz: images uint8 [n, H, W, C], labels int64 [n]")
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="what to sample from a model of captions; several take turns")
    add("--count", type=int, default=10_000, help="images in the .npz (default 10000)")
    add("--real", help="first panel of the grid: real test images (letters, digits, mnist, ...)")
    add("--caption-from", nargs="+", default=[], type=Path, metavar="FILE",
        help="put the accuracies in these files of evaluate.py --json below the grid")
    add("--data-dir", default="data", help="folder of the files of named data sets")
    add("--columns", type=int, default=10, help="images per class in the grid (default 10)")
    add("--steps", type=int, default=12, help="network evaluations (default 12)")
    add("--solver", choices=SOLVERS, default="dpm", help="ddim, or dpm: DPM-Solver++ 2M (default)")
    add("--eta", type=float, default=0.0, help="with ddim up to 1, DDPM's noise (default 0)")
    add("--guidance", type=float, default=1.5, help="1 is no guidance (default 1.5)")
    add("--seed", type=int, default=0, help="seed of the samples (default 0)")
    add("--device", default="auto", help="cpu, cuda, ..., or auto (default)")
    args = parser.parse_args(argv)
    check(args)
    args.device = find_device(args.device)
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError for flags that cannot work: now rather than after loading."""
    if not args.grid and not args.npz:
        raise ValueError("nothing to do: give --grid FILE.png or --npz FILE.npz")
    if args.npz and (len(args.checkpoints) != 1 or args.count < 1):
        raise ValueError("--npz takes one checkpoint and a --count of at least 1")
    if args.columns < 1:
        raise ValueError(f"--columns must be at least 1, not {args.columns}")
    if args.caption_from and not args.grid:
        raise ValueError("--caption-from is for --grid FILE.png: give that too")
    check_sampling(args.steps, args.solver, args.eta, args.guidance)
    check_suffix(args.grid, ".png")
    check_suffix(args.npz, ".npz")
    check_outputs(filter(None, (args.grid, args.npz)),
                  filter(None, (*args.checkpoints, args.real, *args.caption_from)))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.grid:   # first: it reads all that --npz reads and more, before it draws
        write_grid(args)
    if args.npz:
        write_npz(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
