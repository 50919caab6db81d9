"""How useful are the samples? Train classifiers on them, test these on real images; compare the distributions.

    python evaluate.py eps1.npz eps10.npz --real digits --ceiling
    python evaluate.py eps10.npz --real photos.zip --classifiers logreg mlp cnn --epochs 20 --json eps10.json
    python evaluate.py eps10.npz --real digits --inception inception-2015-12-05.pt --download     # FID
    python evaluate.py eps10.npz --real digits --frechet       # a Frechet distance without that network: no FID

The protocol is DPImageBench's honest one (Gong et al. 2025). A classifier is trained on nine tenths of the *synthetic*
images, and the last tenth decides which of about ten snapshots is kept. The finished classifier sees the real test
images once, for the number that is reported. --ceiling does the same with the real training images.

What is measured on private images (accuracies, distances, the statistics in data/cache) is not covered by epsilon.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import scipy
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import nn
from tqdm import tqdm, trange

import data
import download
from config import Parser, find_device, one_line_errors
from formats import array_names, read_arrays
from train import lr_at, to_pixels

# The TorchScript network of StyleGAN2-ADA; the same weights as in Heusel et al. 2017.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_BYTES = 95_607_719
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


# ---- classifiers -----------------------------------------------------------------------------------

class Recipe(NamedTuple):
    """How AdamW trains a classifier."""
    batch: int
    lr: float                # at its peak
    weight_decay: float
    shift: int = 0           # random shifts of up to so many pixels
    smoothing: float = 0.0   # of the labels
    cosine: bool = True      # warm-up and cosine decay; otherwise the rate stays


# The literature takes 50 epochs of Adam: DPDM at a constant 3e-4, DPImageBench (WRN) at 1e-2, lowered twice. A cosine
# from a rate between these takes fewer. As there, all but the small CNN see the images as they are, not augmented.
RECIPES = {
    "small-cnn": Recipe(64, 2e-3, 0.01, shift=2, smoothing=0.1),
    "logreg": Recipe(128, 1e-3, 0.0),
    "mlp": Recipe(128, 1e-3, 0.0),
    "cnn": Recipe(128, 1e-3, 0.0),
    "wrn": Recipe(128, 2e-3, 0.01),
}
JUDGE = Recipe(64, 2e-3, 0.01, cosine=False)


class WideBlock(nn.Module):
    """Pre-activation residual block with dropout between its convolutions (Zagoruyko and Komodakis 2016)."""

    def __init__(self, before: int, after: int, stride: int, dropout: float = 0.3):
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(after, after, 3, 1, 1, bias=False))
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.activate(x)
        return self.residual(active) + self.shortcut(x if isinstance(self.shortcut, nn.Identity) else active)


def wide_resnet(channels: int, classes: int, depth: int, width: int) -> nn.Module:
    """WRN-depth-width: three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels."""
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(f"--wrn must be a depth of 10, 16, 22, ... and a width of at least 1, not {depth} {width}")
    layers, before = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)], 16
    for group, after in enumerate((16 * width, 32 * width, 64 * width)):
        for i in range((depth - 4) // 6):
            layers.append(WideBlock(before, after, 2 if group and not i else 1))
            before = after
    return nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(before, classes))


def make_classifier(name: str, channels: int, size: int, classes: int, wrn: tuple[int, int] = (40, 4)) -> nn.Module:
    """A classifier of images [B, channels, size, size] -> logits [B, classes], one of RECIPES' names:

    small-cnn  three strided convolutions, quick: for demos
    logreg     logistic regression
    mlp        one hidden layer of 100 (DPDM's: Dockhorn et al. 2023, official code)
    cnn        the CNN of DPDM, in which the literature's MNIST figures are given
    wrn        WideResNet of depth and width `wrn`; DPImageBench has 40 and 4
    """
    if name == "wrn":
        return wide_resnet(channels, classes, *wrn)
    if name == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size ** 2, classes))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size ** 2, 100), nn.ReLU(), nn.Linear(100, classes))
    layers = []
    if name == "cnn":
        side = ((size - 2) // 2 - 2) // 2 - 2
        if side < 1:
            raise ValueError(f"the cnn needs images of at least 18x18, not {size}x{size}: choose other --classifiers")
        for before, after in ((channels, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128 * side ** 2, 128),
                             nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes))
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, classes))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def optimise(model: nn.Module, train: data.Dataset, rows: torch.Tensor, recipe: Recipe, steps: int) -> Iterator[int]:
    """Train `model` in place on the images `rows`, int [n]; yields the number of steps done after each."""
    device, labels = device_of(model), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    for step in range(steps):
        model.train()
        chosen = rows[torch.randint(len(rows), (recipe.batch,))]
        x = to_pixels(train.images[chosen.numpy()], device)
        if recipe.shift:
            x = x.roll(torch.randint(-recipe.shift, recipe.shift + 1, (2,)).tolist(), (2, 3))
        loss = F.cross_entropy(model(x), labels[chosen].to(device), label_smoothing=recipe.smoothing)
        if recipe.cosine:
            optimizer.param_groups[0]["lr"] = recipe.lr * lr_at(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step + 1


@torch.inference_mode()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images uint8 [N, H, W, C] in which the model sees the class `labels` int [N]."""
    model.eval()
    device, hits = device_of(model), 0
    for i in range(0, len(labels), 250):
        seen = model(to_pixels(images[i:i + 250], device)).argmax(1).cpu().numpy()
        hits += int((seen == labels[i:i + 250]).sum())
    return hits / len(labels)


def train_classifier(name: str, train: data.Dataset, classes: int, seed: int, steps: int, device: torch.device,
                     wrn: tuple[int, int] = (40, 4)) -> nn.Module:
    """A classifier trained on nine tenths of `train`: of ten snapshots the best one on the last tenth.

    It is given no test images, so that nothing can be chosen by them.
    """
    torch.manual_seed(seed)
    order = torch.randperm(len(train.labels))
    held_out, kept = order[:len(order) // 10].numpy(), order[len(order) // 10:]
    held_out_images, held_out_labels = train.images[held_out], train.labels[held_out]
    model = make_classifier(name, train.images.shape[-1], train.images.shape[1], classes, wrn).to(device)
    best, best_weights = -1.0, None
    updates = optimise(model, train, kept, RECIPES[name], steps)
    for done in tqdm(updates, total=steps, desc=f"{name}, seed {seed}", leave=False):
        if done % max(1, steps // 10) == 0 or done == steps:
            score = accuracy(model, held_out_images, held_out_labels)
            if score >= best:
                best, best_weights = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return model


def train_and_test(name: str, train: data.Dataset, test: data.Dataset, seed: int, steps: int, device: torch.device,
                   wrn: tuple[int, int] = (40, 4)) -> float:
    """Accuracy on `test`, which is looked at once, of a classifier trained and chosen on `train` alone."""
    model = train_classifier(name, train, len(test.classes), seed, steps, device, wrn)
    return accuracy(model, test.images, test.labels)


# ---- Frechet distance ------------------------------------------------------------------------------

def mean_and_covariance(batches: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] (divisor N - 1), in float64, of features given in batches [B, d]."""
    count = 0
    for batch in batches:
        features = batch.to("cpu", torch.float64).numpy()
        if not count:   # sums are taken around the first batch's mean: around zero, digits would cancel
            centre = features.mean(0)
            total, products = np.zeros_like(centre), np.zeros((len(centre), len(centre)))
        features = features - centre
        total += features.sum(0)
        products += features.T @ features
        count += len(features)
    mean = total / count
    return centre + mean, (products - count * np.outer(mean, mean)) / (count - 1)


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians (Dowson and Landau 1982).

    With A = L L^T and B = M M^T the trace of the root is the sum of the singular values of L^T M. Unlike a matrix root
    they need no inverse of A or B, which are singular where there are fewer images than features.
    """
    factors = []
    for covariance in (cov_a, cov_b):
        values, vectors = linalg.eigh(covariance)
        factors.append(vectors * np.sqrt(values.clip(0.0)))
    cross = linalg.svdvals(factors[0].T @ factors[1]).sum()
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross))


def fetch_inception(path: Path) -> None:
    """Download the Inception network to `path`. ValueError with the address if that fails."""
    try:
        download.fetch(path, [INCEPTION_URL], INCEPTION_BYTES, INCEPTION_SHA256)
    except ValueError as error:
        raise ValueError(f"cannot fetch {INCEPTION_URL} ({error}): put that file at {path}") from error


def load_inception(path: Path, device: torch.device) -> nn.Module:
    """The TorchScript network in `path`; ValueError if it is any other than INCEPTION_URL's: it would give no FID."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: add --download, or fetch {INCEPTION_URL} and put it there")
    if hashlib.sha256(path.read_bytes()).hexdigest() != INCEPTION_SHA256:
        raise ValueError(f"{path} is damaged or another network: FID is defined by the one from {INCEPTION_URL}")
    with warnings.catch_warnings():   # newer versions of torch call TorchScript deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path, map_location=device).eval()


@torch.no_grad()
def inception_features(network: nn.Module, images: np.ndarray, device: torch.device,
                       batch: int = 100) -> Iterator[torch.Tensor]:
    """Features [B, 2048] of images uint8 [N, H, W, C], grey or colour; the network itself resizes them."""
    for i in trange(0, len(images), batch, desc="Inception features", unit="batch", leave=False):
        x = torch.from_numpy(images[i:i + batch]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        yield network(x.contiguous().to(device), return_features=True)


def real_statistics(source: str, images: np.ndarray, network: nn.Module,
                    device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """mean_and_covariance of the real training images' Inception features, kept in data.CACHE.

    The file's name has the data set, split and size, and a digest of the images and the network.
    """
    content = hashlib.sha256(f"{INCEPTION_SHA256} {images.shape}".encode())
    content.update(np.ascontiguousarray(images))
    name = f"inception-{Path(source).stem}-train-{images.shape[1]}-{content.hexdigest()[:16]}"
    return data.cached(name, ("mean", "covariance"),
                       lambda: mean_and_covariance(inception_features(network, images, device)))


def train_judge(real: data.Dataset, device: torch.device, steps: int = 1_500) -> nn.Module:
    """A small CNN trained on all of `real`, whose features stand in for Inception's."""
    torch.manual_seed(0)
    judge = make_classifier("small-cnn", real.images.shape[-1], real.images.shape[1], len(real.classes)).to(device)
    updates = optimise(judge, real, torch.arange(len(real.labels)), JUDGE, steps)
    for _ in tqdm(updates, total=steps, desc="classifier of real images", leave=False):
        pass
    return judge.eval()


@torch.inference_mode()
def judged(judge: nn.Module, images: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """(features [N, 512], class int [N]) of uint8 images."""
    device = device_of(judge)
    features = torch.cat([judge[:-2](to_pixels(images[i:i + 500], device)) for i in range(0, len(images), 500)])
    return features, judge[-1](features).argmax(1).cpu().numpy()


# ---- command line ----------------------------------------------------------------------------------

def load_synthetic(path: Path) -> tuple[data.Dataset, dict]:
    """Images and labels of an .npz of sample.py, and what it says of their origin; ValueError if it is not one."""
    images, labels = read_arrays(path)
    integers = labels.dtype.kind in "iu" and labels.shape == (len(images),)
    if images.dtype != np.uint8 or images.ndim != 4 or not integers or len(labels) < 10 or labels.min() < 0:
        raise ValueError(f"{path} must hold uint8 images [n, H, W, C] and integer labels [n] from 0 up, at least 10")
    try:
        known = "origin" in array_names(path)
        origin = dict(json.loads(str(*read_arrays(path, ("origin",))))) if known else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has an entry 'origin' that is not sample.py's: {error}") from error
    if origin.get("prompts"):
        raise ValueError(f"{path} holds samples of captions: their labels number the prompts, and are no classes")
    return data.Dataset(images, labels.astype(np.int64), []), origin


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("synthetic", nargs="*", type=Path, help=".npz files of sample.py")
    parser.add_argument("--real", default="digits", help="digits (default), mnist, or a folder or zip of images")
    parser.add_argument("--data-dir", default="data", help="folder of the files of named data sets")
    parser.add_argument("--ceiling", action="store_true", help="also train on the real training images")
    parser.add_argument("--classifiers", nargs="+", choices=RECIPES, default=["small-cnn"],
                        help="small-cnn (default, quick), logreg, mlp, cnn (DPDM's, for results), wrn")
    parser.add_argument("--wrn", nargs=2, type=int, default=(40, 4), metavar=("DEPTH", "WIDTH"),
                        help="size of the WideResNet (default 40 4; 10 1 is for a CPU)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=2_000, help="batches per classifier (default 2000)")
    length.add_argument("--epochs", type=float, help="expected passes over the training images, instead")
    parser.add_argument("--seeds", type=int, default=3, help="classifiers per kind and data set (default 3)")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="also give the FID, by this network")
    parser.add_argument("--download", action="store_true", help="fetch that network (96 MB) first if it is missing")
    parser.add_argument("--frechet", action="store_true",
                        help="also give the Frechet distance in features of a classifier of real images (no FID)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ..., or auto (default)")
    args = parser.parse_args(argv)
    if not args.synthetic and not args.ceiling:
        raise ValueError("nothing to do: give .npz files of sample.py, or --ceiling")
    if args.seeds < 1 or args.steps < 1 or args.epochs is not None and not 0 < args.epochs < float("inf"):
        raise ValueError("--seeds and --steps must be at least 1, --epochs positive")
    if args.json and args.json.exists() and not args.overwrite:
        raise ValueError(f"{args.json} exists: give another name, or --overwrite")
    if args.json:   # complains now rather than after hours
        args.json.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(args.json.parent, os.W_OK):
            raise ValueError(f"{args.json} cannot be written: give another name")
    if args.download and not args.inception:
        raise ValueError("--download needs --inception FILE, where to put the network")
    args.device = find_device(args.device)
    return args


def measure(train: data.Dataset, test: data.Dataset, args: argparse.Namespace) -> dict:
    """For each of --classifiers the accuracies of all seeds, their mean and spread, the steps and the seconds."""
    measured = {}
    for name in args.classifiers:
        steps = args.steps
        if args.epochs:
            steps = math.ceil(args.epochs * (len(train.labels) - len(train.labels) // 10) / RECIPES[name].batch)
        start = time.perf_counter()
        scores = [train_and_test(name, train, test, seed, steps, args.device, args.wrn) for seed in range(args.seeds)]
        measured[name] = dict(mean=np.mean(scores), spread=np.std(scores, ddof=1) if args.seeds > 1 else None,
                              scores=scores, steps=steps, seconds=round(time.perf_counter() - start, 1))
    return measured


def distances(args: argparse.Namespace, real: data.Dataset, test: data.Dataset) -> dict:
    """The distances asked for, by name: functions of images uint8 [N, H, W, C]."""
    found = {}
    if args.inception:
        if args.download and not args.inception.exists():
            fetch_inception(args.inception)
        network = load_inception(args.inception, args.device)
        statistics = real_statistics(args.real, real.images, network, args.device)
        found["FID"] = lambda images: frechet_distance(
            *mean_and_covariance(inception_features(network, images, args.device)), *statistics)
    if args.frechet:   # to test images, as the judge's features of its own training images are not like others
        judge = train_judge(real, args.device)
        seen = mean_and_covariance([judged(judge, test.images)[0]])
        found["Frechet"] = lambda images: frechet_distance(*mean_and_covariance([judged(judge, images)[0]]), *seen)
    return found


def row(cells: list[str]) -> str:
    return f"{cells[0]:<24}{cells[1]:>8}{cells[2]:>9}" + "".join(f"{cell:>19}" for cell in cells[3:])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sources = [(path.stem, *load_synthetic(path)) for path in args.synthetic]
    _, size, _, channels = sources[0][1].images.shape if sources else (0, 32, 32, 1)
    test = data.load(args.real, "test", args.data_dir, size, channels)
    needs_real = args.ceiling or args.inception or args.frechet
    real = data.load(args.real, "train", args.data_dir, size, channels) if needs_real else None
    if args.ceiling:
        sources.append((f"real {args.real}", real, {"real": True}))
    for name, train, _ in sources:
        if train.images.shape[1:] != test.images.shape[1:] or train.labels.max() >= len(test.classes):
            raise ValueError(f"{name} has other image sizes or more classes than the real images of {args.real}")
        if len(train.labels) < 10:
            raise ValueError(f"{name} has {len(train.labels)} images: a tenth of them is held out, so give at least 10")
    report = dict(command=shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
                  real=args.real, test_images=len(test.labels), seeds=args.seeds, wrn=args.wrn, device=str(args.device),
                  versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                                scipy=scipy.__version__, pillow=PIL.__version__), results=[])
    for name in args.classifiers:   # complains now rather than after hours
        make_classifier(name, channels, size, len(test.classes), args.wrn)
    measures = distances(args, real, test)
    print(f"accuracy on {len(test.labels):,} real test images: mean and spread of {args.seeds} classifiers each")
    print(row(["training images", "number", "epsilon", *args.classifiers, *measures]))
    for name, train, origin in sources:
        found = measure(train, test, args)
        distance = {kind: distance(train.images) for kind, distance in measures.items() if train is not real}
        report["results"].append(dict(name=name, images=len(train.labels), origin=origin, accuracy=found, **distance))
        spreads = ["" if a["spread"] is None else f" +- {a['spread']:.2%}" for a in found.values()]
        print(row([name, f"{len(train.labels):,}", f"{origin['epsilon']:.3g}" if origin.get("epsilon") else "-",
                   *(f"{a['mean']:.2%}{spread}" for a, spread in zip(found.values(), spreads, strict=True)),
                   *(f"{value:.2f}" for value in distance.values())]), flush=True)
        if args.json:   # after every row: hours of work may follow
            with data.atomic_write(args.json) as file:
                file.write(json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    with one_line_errors():
        main()
