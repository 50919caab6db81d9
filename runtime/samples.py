"""Grids of samples: drawn beside a checkpoint, and what is said of where samples come from."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from accountant import in_words
from ldm import LatentDiffusion, ddim_sample
from runtime.config import Config
from runtime.files import UNREADABLE
from runtime.ledger import is_seeded, spent_epsilon
from runtime.pictures import save_grid
from variants.solvers import dpm_solver_2m

SOLVERS = {"ddim": ddim_sample, "dpm": dpm_solver_2m}


def save_samples(model: LatentDiffusion, names: list[str], config: Config, target: Path,
                 title: str) -> None:
    """Write, beside the checkpoint `target`, a PNG of samples of up to ten classes or captions."""
    if not names:
        print(f"wrote {target}; python sample.py {target} --prompt TEXT --grid FILE shows samples")
        return
    model.eval()
    settings, rows, columns = config.samples, min(10, len(names)), 10
    condition = model.embedder.conditions(names)[:rows].repeat_interleave(columns, dim=0)
    generator = torch.Generator().manual_seed(config.public.seed)
    images = model.generate(condition.to(config.device), settings.steps, settings.eta,
                            settings.guidance, generator, SOLVERS[settings.solver])
    picture = target.with_suffix(".png")
    grid = images.cpu().numpy().reshape(rows, columns, *images.shape[1:])
    save_grid(picture, [(title, grid, names[:rows])])
    print(f"wrote {target} and {picture}")


def provenance(path: Path, metadata: dict) -> dict:
    """Which checkpoint samples are from, and what it has spent: epsilon None if only public data.

    metadata: what is stored in the checkpoint `path`.
    """
    found = dict(checkpoint=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                 epsilon=None, delta=None)
    if ledger := metadata.get("ledger"):
        found["delta"] = metadata["plan"]["delta"]
        accountant = metadata["config"]["private"]["accountant"]
        found["epsilon"] = math.inf if is_seeded(ledger) else spent_epsilon(
            ledger, found["delta"], accountant)
    return found


def title(origin: dict) -> str:
    return f"eps = {in_words(origin['epsilon'], 3)}" if origin["epsilon"] else "public only"


def caption(origins: list[dict], results: Sequence[Path]) -> str:
    """What is said below samples: their delta, and the accuracies in files of evaluate.py --json.

    ValueError if one of `results` is no such file, if they measured differently, or if none is
    about these checkpoints.
    """
    deltas = sorted({o["delta"] for o in origins if o["delta"]})
    text = f"delta = {', '.join(f'{d:g}' for d in deltas)}. " if deltas else ""
    shown = {o["sha256"]: title(o) for o in origins}
    parts, protocols, known = [], set(), not results
    for path in results:
        try:
            report = json.loads(path.read_text())
            parts += [f"{name}: {scores}" for name, scores in accuracies(report, shown)]
            protocols.add((f"Accuracy on {report['test_images']:,} real test images of classifiers "
                           "trained on ", f" (mean of {report['seeds']})."))
            known |= any(row["origin"].get("sha256") in shown for row in report["results"])
        except (*UNREADABLE, AttributeError) as error:
            raise ValueError(
                f"{path} is no readable file of evaluate.py --json: {error!r}") from error
    files = ", ".join(map(str, results))
    if not known:
        raise ValueError(f"{files} is about other checkpoints: evaluate samples of these "
                         "(sample.py --npz) first")
    if len(protocols) > 1:
        raise ValueError(f"{files} differ in their test images or in the number of classifiers")
    if not parts:
        return text
    [(head, tail)] = protocols
    return text + head + "; ".join(parts) + tail


def accuracies(report: dict, shown: dict[str, str]) -> list[tuple[str, str]]:
    """(title, accuracies) of the rows about real images or the checkpoints {sha256: title}."""
    rows = []
    for row in report["results"]:
        origin = row["origin"]
        if origin.get("sha256") in shown or origin.get("real"):
            scores = ", ".join(f"{name} {a['mean']:.2%}" for name, a in row["accuracy"].items())
            if scores:   # samples without classes have none
                rows.append((shown.get(origin.get("sha256"), "real images"), scores))
    return rows
