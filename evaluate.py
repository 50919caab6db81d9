"""How useful are the samples? Train classifiers on samples, test them on real images.

    python evaluate.py eps1.npz eps10.npz --real digits --real-baseline
    python evaluate.py eps10.npz --real photos.zip --classifiers logreg mlp cnn --epochs 20
    python evaluate.py eps10.npz --real digits --inception inception-2015-12-05.pt --download
    python evaluate.py eps10.npz --real digits --frechet

The third line also gives the FID. The last one gives a Frechet distance without that network, which
is no FID. --json FILE keeps every number.

The protocol is the honest one of DPImageBench (Gong et al. 2025). A classifier is trained on nine
tenths of the *synthetic* images. The last tenth decides which of about ten snapshots is kept. The
finished classifier sees the real test images once, for the number that is reported.
--real-baseline does the same with the real training images.

Classes are matched by name. Samples of a model without classes get distances and no accuracy.

What is measured on private images is not covered by epsilon: accuracies, distances, and the
statistics in data/cache.
"""

if __name__ == "__main__":   # Ctrl-C while packages load
    import runtime.quiet  # noqa: F401

import argparse
import hashlib
import json
import math
import platform
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import scipy
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
from accountant import in_words
from datasets import Dataset, download, listing, rendered
from ldm import lr_factor, normalize_images
from runtime import threads
from runtime.checkpoints import is_plain
from runtime.cli import Parser, find_device, one_line_errors
from runtime.files import array_names, atomic_write, read_arrays
from runtime.ledger import as_json
from runtime.outputs import check_outputs, check_suffix
from runtime.terminal import on_one_line
from variants.fid import frechet_distance, inception_features, mean_and_covariance


class NetworkFile(NamedTuple):
    """Where a network is published, and what tells it from any other."""
    url: str
    size: int   # bytes
    sha256: str


# The TorchScript network of StyleGAN2-ADA, with the weights of Heusel et al. 2017.
INCEPTION = NetworkFile(
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt", 95_607_719,
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4")


# ---- classifiers -------------------------------------------------------------------------------

class Recipe(NamedTuple):
    """How AdamW trains a classifier."""
    batch: int
    lr: float                # at its peak
    weight_decay: float
    shift: int = 0           # images are shifted at random by up to so many pixels
    smoothing: float = 0.0   # of the labels
    cosine: bool = True      # warm-up and cosine decay; otherwise the rate stays


# The literature takes 50 epochs of Adam: DPDM at a constant 3e-4, DPImageBench (WRN) at 1e-2,
# lowered twice. A cosine from a rate in between takes fewer. As there, only the small CNN sees
# augmented images.
RECIPES = {
    "small-cnn": Recipe(64, 2e-3, 0.01, shift=2, smoothing=0.1),
    "logreg": Recipe(128, 1e-3, 0.0),
    "mlp": Recipe(128, 1e-3, 0.0),
    "cnn": Recipe(128, 1e-3, 0.0),
    "wrn": Recipe(128, 2e-3, 0.01),
}
FEATURE_RECIPE = Recipe(64, 2e-3, 0.01, cosine=False)


class WideBlock(nn.Module):
    """Pre-activation residual block with dropout in it (Zagoruyko and Komodakis 2016)."""

    def __init__(self, before: int, after: int, stride: int, dropout: float = 0.3):
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Dropout(dropout), nn.Conv2d(after, after, 3, 1, 1, bias=False))
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.activate(x)
        shortcut = self.shortcut(x if isinstance(self.shortcut, nn.Identity) else active)
        return self.residual(active) + shortcut


def wide_resnet(channels: int, classes: int, depth: int, width: int) -> nn.Module:
    """WRN-depth-width: three groups of (depth - 4) / 6 blocks of 16, 32 and 64 * width channels.

    ValueError for sizes that do not exist.
    """
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError("--wrn must be a depth of 10, 16, 22, ... and a width of at least 1, not "
                         f"{depth} {width}")
    layers, before = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)], 16
    for group, after in enumerate((16 * width, 32 * width, 64 * width)):
        for i in range((depth - 4) // 6):
            layers.append(WideBlock(before, after, 2 if group and not i else 1))
            before = after
    return nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(before, classes))


def dpdm_cnn(channels: int, size: int, classes: int) -> nn.Module:
    """The CNN of DPDM (Dockhorn et al. 2023, official code). ValueError for smaller images."""
    side = ((size - 2) // 2 - 2) // 2 - 2
    if side < 1:
        raise ValueError(f"the cnn needs images of at least 18x18, not {size}x{size}: choose other "
                         "--classifiers")
    layers = []
    for before, after in ((channels, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(128 * side ** 2, 128), nn.ReLU(), nn.Dropout(0.5),
                         nn.Linear(128, classes))


def small_cnn(channels: int, classes: int) -> nn.Module:
    """Three strided convolutions; its last two layers are dropout and logits."""
    layers = []
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after),
                   nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(512, classes))


def make_classifier(name: str, channels: int, size: int, classes: int,
                    wrn: tuple[int, int] = (40, 4)) -> nn.Module:
    """A classifier of images [B, channels, size, size] -> logits [B, classes].

    name: one of RECIPES.
        small-cnn  quick: for demos
        logreg     logistic regression
        mlp        one hidden layer of 100 (Dockhorn et al. 2023, official code)
        cnn        DPDM's, in which the literature's MNIST figures are given
        wrn        WideResNet of depth and width `wrn`; DPImageBench has 40 and 4

    ValueError for images that are too small for it.
    """
    if name == "small-cnn":
        return small_cnn(channels, classes)
    if name == "cnn":
        return dpdm_cnn(channels, size, classes)
    if name == "wrn":
        return wide_resnet(channels, classes, *wrn)
    inputs = channels * size ** 2
    if name == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, classes))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def optimise(model: nn.Module, train: Dataset, rows: torch.Tensor, recipe: Recipe,
             steps: int) -> Iterator[int]:
    """Train `model` in place on the images `rows`, int [n].

    Yields the number of steps done, after each step.
    """
    device, labels = device_of(model), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    for step in range(steps):
        model.train()
        chosen = rows[torch.randint(len(rows), (recipe.batch,))]
        x = normalize_images(train.images[chosen.numpy()], device)
        if recipe.shift:
            x = x.roll(torch.randint(-recipe.shift, recipe.shift + 1, (2,)).tolist(), (2, 3))
        target = labels[chosen].to(device)
        loss = F.cross_entropy(model(x), target, label_smoothing=recipe.smoothing)
        if recipe.cosine:
            optimizer.param_groups[0]["lr"] = recipe.lr * lr_factor(step, steps)
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
        seen = model(normalize_images(images[i:i + 250], device)).argmax(1).cpu().numpy()
        hits += int((seen == labels[i:i + 250]).sum())
    return hits / len(labels)


def train_classifier(name: str, train: Dataset, classes: int, seed: int, steps: int,
                     device: torch.device, wrn: tuple[int, int] = (40, 4)) -> nn.Module:
    """A classifier trained on nine tenths of `train`: the best of ten snapshots on the last tenth.

    It is given no test images, so that nothing can be chosen by them.
    """
    torch.manual_seed(seed)
    order = torch.randperm(len(train.labels))
    held_out, kept = order[:len(order) // 10].numpy(), order[len(order) // 10:]
    held_out_images, held_out_labels = train.images[held_out], train.labels[held_out]
    _, size, _, channels = train.images.shape
    model = make_classifier(name, channels, size, classes, wrn).to(device)
    best, best_weights = -1.0, None
    updates = optimise(model, train, kept, RECIPES[name], steps)
    for done in tqdm(updates, total=steps, desc=f"{name}, seed {seed}", leave=False):
        if done % max(1, steps // 10) == 0 or done == steps:
            score = accuracy(model, held_out_images, held_out_labels)
            if score >= best:
                best = score
                best_weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return model


def train_and_test(name: str, train: Dataset, test: Dataset, seed: int, steps: int,
                   device: torch.device, wrn: tuple[int, int] = (40, 4)) -> float:
    """Accuracy on `test` of a classifier that is trained and chosen on `train` alone.

    The test images are looked at once.
    """
    model = train_classifier(name, train, len(test.classes), seed, steps, device, wrn)
    return accuracy(model, test.images, test.labels)


# ---- Frechet distances -------------------------------------------------------------------------

class Distance(NamedTuple):
    """The Frechet distance to images whose features have these statistics."""
    name: str
    features: Callable[[np.ndarray], Iterable[torch.Tensor]]   # images -> batches [B, d]
    statistics: tuple[np.ndarray, np.ndarray]                  # mean [d], covariance [d, d]

    def to(self, images: np.ndarray) -> float:
        """Of images uint8 [N, H, W, C]."""
        found = mean_and_covariance(self.features(images))
        return frechet_distance(*found, *self.statistics)


def fetch_inception(path: Path, published: NetworkFile = INCEPTION) -> None:
    """Download the Inception network to `path`. ValueError with the address if that fails."""
    try:
        download.fetch(path, [published.url], published.size, published.sha256)
    except ValueError as error:
        raise ValueError(
            f"cannot fetch {published.url} ({error}): put that file at {path}") from error


def load_inception(path: Path, device: torch.device,
                   published: NetworkFile = INCEPTION) -> nn.Module:
    """The TorchScript network in `path`. ValueError if it is not the published one."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: add --download, or fetch {published.url} and put "
                         "it there")
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the name of one")
    if hashlib.sha256(path.read_bytes()).hexdigest() != published.sha256:
        raise ValueError(f"{path} is damaged or another network: FID is defined by the one from "
                         f"{published.url}")
    with warnings.catch_warnings():   # newer versions of torch call TorchScript deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path, map_location=device).eval()


def real_statistics(source: str, images: np.ndarray,
                    features: Callable[[np.ndarray], Iterable[torch.Tensor]],
                    network: str) -> tuple[np.ndarray, np.ndarray]:
    """mean_and_covariance of the features of real training images, kept in the cache.

    source: the data set's name. network: the digest of the network behind `features`. The file's
    name has a digest of it and of the images.
    """
    content = hashlib.sha256(f"{network} {images.shape}".encode())
    for image in images:
        content.update(np.ascontiguousarray(image))
    digest = content.hexdigest()[:16]
    name = f"inception-{Path(source).stem}-train-{images.shape[1]}-{digest}"
    return rendered.cached(name, ("mean", "covariance"),
                           lambda: mean_and_covariance(features(images)))


def train_feature_classifier(real: Dataset, device: torch.device, steps: int = 1_500) -> nn.Module:
    """A small CNN trained on all of `real`, whose features stand in for Inception's."""
    torch.manual_seed(0)
    _, size, _, channels = real.images.shape
    model = make_classifier("small-cnn", channels, size, len(real.classes)).to(device)
    updates = optimise(model, real, torch.arange(len(real.labels)), FEATURE_RECIPE, steps)
    for _ in tqdm(updates, total=steps, desc="classifier of real images", leave=False):
        pass
    return model.eval()


@torch.inference_mode()
def features_and_predictions(classifier: nn.Module,
                             images: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """(features [N, 512], predicted class int [N]) of images uint8 [N, H, W, C].

    classifier: train_feature_classifier's.
    """
    device = device_of(classifier)
    parts = (normalize_images(images[i:i + 500], device) for i in range(0, len(images), 500))
    features = torch.cat([classifier[:-2](x) for x in parts])
    return features, classifier[-1](features).argmax(1).cpu().numpy()


def classifier_features(classifier: nn.Module, images: np.ndarray) -> Iterator[torch.Tensor]:
    """features_and_predictions' features alone, in one batch."""
    yield features_and_predictions(classifier, images)[0]


def distances(args: argparse.Namespace, real: Dataset | None, test: Dataset,
              inception: NetworkFile) -> list[Distance]:
    """The distances that the command line asks for."""
    found = []
    if args.inception:
        if args.download and not args.inception.exists():
            fetch_inception(args.inception, inception)
        network = load_inception(args.inception, args.device, inception)
        features = partial(inception_features, network, device=args.device)
        statistics = real_statistics(args.real, real.images, features, inception.sha256)
        found.append(Distance("FID", features, statistics))
    if args.frechet:
        features = partial(classifier_features, train_feature_classifier(real, args.device))
        # To test images: features of images that the classifier has learnt are like no others.
        found.append(Distance("Frechet", features, mean_and_covariance(features(test.images))))
    return found


# ---- command line ------------------------------------------------------------------------------

class Source(NamedTuple):
    """Images to train classifiers on: a row of the table."""
    name: str
    train: Dataset   # without classes if they are samples of a model without classes
    origin: dict     # what sample.py says of them, or {"real": True}


def load_synthetic(path: Path, name: str, by_number: bool) -> Source:
    """An .npz of sample.py, as the row `name`. ValueError naming the file if it is not one.

    by_number: see class_names.
    """
    images, labels = read_arrays(path)
    integers = labels.dtype.kind in "iu" and labels.shape == (len(images),)
    pictures = images.dtype == np.uint8 and images.ndim == 4
    if not (pictures and integers and len(labels) >= 10
            and labels.astype(np.int64).min() >= 0):   # beyond int64 they turn negative
        raise ValueError(f"{path} must hold uint8 images [n, H, W, C] and integer labels [n] from "
                         "0 up, at least 10")
    origin = read_origin(path)
    if origin.get("prompts"):
        raise ValueError(f"{path} holds samples of captions: their labels number the prompts, and "
                         "are no classes")
    classes = class_names(path, labels, by_number)
    return Source(name, Dataset(images, labels.astype(np.int64), classes), origin)


def read_origin(path: Path) -> dict:
    """What sample.py says in an .npz of where it is from: {} if nothing.

    ValueError naming the file if it says what sample.py never does.
    """
    if "origin" not in array_names(path):
        return {}
    try:
        origin = dict(json.loads(str(*read_arrays(path, ("origin",)))))
        epsilon = origin.get("epsilon")
        if epsilon is not None and not 0 <= epsilon <= float(epsilon):   # text cannot be compared
            raise ValueError(f"its epsilon is {epsilon}")
        if "real" in origin or not is_plain(origin):
            raise ValueError("it has other things in it")
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has an entry 'origin' that is not sample.py's: {error}") from error
    return origin


def class_names(path: Path, labels: np.ndarray, by_number: bool) -> list[str]:
    """What the labels of an .npz of sample.py are labels of: nothing if it lists no classes.

    by_number: names may be missing, and are made up then. Labels that are all 0 are taken for those
    of a model without classes. ValueError naming the file for missing or strange names.
    """
    if "classes" not in array_names(path):
        if not by_number:
            raise ValueError(f"{path} does not name its classes: sample again, or add --by-number "
                             "if its labels number the classes of --real")
        return [str(k) for k in np.unique(labels)] if labels.any() else []
    names, = read_arrays(path, ("classes",))
    strings = names.ndim == 1 and (names.dtype.kind == "U" or not names.size)
    if not strings or 0 < names.size <= labels.max():
        raise ValueError(f"{path} has an entry 'classes' that is not sample.py's: give one name "
                         "for each label")
    return names.tolist()


def with_classes_of(test: Dataset, source: Source, args: argparse.Namespace) -> Source:
    """The source with labels that number the classes of `test`, matched by name.

    With --by-number they do so already. ValueError if they cannot.
    """
    labels, classes = source.train.labels, source.train.classes
    if not classes:
        return source
    if args.by_number:
        if labels.max() >= len(test.classes):
            raise ValueError(f"{source.name} has more classes than the {len(test.classes)} of "
                             f"{args.real}")
        return source._replace(train=replace(source.train, classes=test.classes))
    own, wanted = ([listing.normal(name) for name in names] for names in (classes, test.classes))
    for whose, names in ((source.name, own), (args.real, wanted)):
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{whose} has two classes called {some_of(twice)}")
    strangers = [f"{some_of(names)} only in {whose}" for whose, names in (
        (source.name, {*own} - {*wanted}), (args.real, {*wanted} - {*own})) if names]
    if strangers:
        raise ValueError(f"the classes of {source.name} are not those of {args.real} "
                         f"({'; '.join(strangers)}): add --by-number if their numbers agree")
    numbers = np.array([wanted.index(name) for name in own])
    train = replace(source.train, labels=numbers[labels], classes=test.classes)
    return source._replace(train=train)


def some_of(names: Iterable[str]) -> str:
    """A few names for a message, each on one line."""
    names = sorted(names)
    return ", ".join([*(repr(name) for name in names[:4]), "..."][:len(names)])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("synthetic", nargs="*", type=Path, help=".npz files of sample.py")
    add("--real", default="digits", help="digits (default), mnist, ..., or a folder or zip")
    add("--data-dir", default="data", help="folder of the files of named data sets")
    add("--by-number", action="store_true",
        help="labels of samples number the classes of --real: do not match names")
    add("--real-baseline", action="store_true", help="also train on the real training images")
    add("--classifiers", nargs="+", choices=RECIPES, default=["small-cnn"],
        help="small-cnn (default, quick), logreg, mlp, cnn (DPDM's, for results), wrn")
    add("--wrn", nargs=2, type=int, default=(40, 4), metavar=("DEPTH", "WIDTH"),
        help="size of the WideResNet (default 40 4; 10 1 is for a CPU)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=2_000,
                        help="batches per classifier (default 2000)")
    length.add_argument("--epochs", type=float,
                        help="expected passes over the training images, instead")
    add("--seeds", type=int, default=3, help="classifiers per kind and data set (default 3)")
    add("--inception", type=Path, metavar="FILE", help="also give the FID, by this network")
    add("--download", action="store_true", help="fetch that network first if it is missing: 96 MB")
    add("--frechet", action="store_true",
        help="also give a Frechet distance in features of a classifier of real images: no FID")
    add("--json", type=Path, metavar="FILE", help="write everything to this file")
    add("--overwrite", action="store_true", help="replace that file")
    add("--device", default="auto", help="cpu, cuda, ..., or auto (default)")
    args = parser.parse_args(argv)
    check(args)
    args.device = find_device(args.device)
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError for flags that cannot work: now rather than after hours."""
    if not args.synthetic and not args.real_baseline:
        raise ValueError("nothing to do: give .npz files of sample.py, or --real-baseline")
    epochs = 1.0 if args.epochs is None else args.epochs
    if args.seeds < 1 or args.steps < 1 or not 0 < epochs < math.inf:
        raise ValueError("--seeds and --steps must be at least 1, --epochs positive")
    if args.json and args.json.exists() and not args.overwrite:
        raise ValueError(f"{args.json} exists: give another name, or --overwrite")
    if args.download and not args.inception:
        raise ValueError("--download needs --inception FILE, where to put the network")
    check_suffix(args.json, ".json")
    network = [args.inception] if args.inception else []
    fetched = network if args.download and not args.inception.exists() else []
    check_outputs([*([args.json] if args.json else []), *fetched],
                  [*args.synthetic, args.real, *network])


def load_images(args: argparse.Namespace) -> tuple[list[Source], Dataset | None, Dataset]:
    """(what to train on, real training images if anything needs them, real test images).

    ValueError for images that do not go together.
    """
    baseline = f"real {args.real}"
    names = Counter([*(path.stem for path in args.synthetic), baseline])
    sources = [load_synthetic(path, path.stem if names[path.stem] == 1 else str(path),
                              args.by_number) for path in args.synthetic]
    _, size, _, channels = sources[0].train.images.shape if sources else (0, 32, 32, 1)
    test = datasets.load(args.real, "test", args.data_dir, size, channels)
    real = None
    if args.real_baseline or args.inception or args.frechet:
        real = datasets.load(args.real, "train", args.data_dir, size, channels)
    for flag, wanted, images in (("inception", "training", real), ("frechet", "test", test)):
        if vars(args)[flag] and len(images.labels) < 2:   # one has no covariance
            raise ValueError(f"--{flag} needs at least two {wanted} images, and {args.real} has "
                             f"{len(images.labels)}")
    if args.real_baseline:
        sources.append(Source(baseline, real, {"real": True}))
    for source in sources:
        check_source(source, test, args)
    sources = [with_classes_of(test, source, args) for source in sources]
    for name, train, origin in sources:
        seen = {*np.unique(train.labels)}
        missing = [c for k, c in enumerate(train.classes) if k not in seen]
        if missing and not origin.get("real"):   # of real ones, datasets.load has said so
            print(f"{name} has no image of {some_of(missing)}")
    return sources, real, test


def check_source(source: Source, test: Dataset, args: argparse.Namespace) -> None:
    """ValueError unless the images have the size of the test images and can be worked with."""
    name, train, _ = source
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"{name} has images of the shape {train.images.shape[1:]}, where those of "
                         f"{args.real} are converted to {test.images.shape[1:]}")
    if len(train.labels) < 10:
        raise ValueError(f"{name} has {len(train.labels)} images: a tenth of them is held out, "
                         "so give at least 10")
    if not (train.classes or args.inception or args.frechet):
        raise ValueError(f"{name} holds samples of a model without classes, which have no accuracy:"
                         " add --inception or --frechet")


def measure(train: Dataset, test: Dataset, args: argparse.Namespace) -> dict:
    """{classifier: accuracies of all seeds, their mean and spread, steps and seconds}.

    Images without classes have none.
    """
    measured = {}
    for name in args.classifiers if train.classes else ():
        steps = args.steps
        if args.epochs:
            kept = len(train.labels) - len(train.labels) // 10
            steps = math.ceil(args.epochs * kept / RECIPES[name].batch)
        start = time.perf_counter()
        scores = [train_and_test(name, train, test, seed, steps, args.device, args.wrn)
                  for seed in range(args.seeds)]
        spread = np.std(scores, ddof=1) if args.seeds > 1 else None
        measured[name] = dict(mean=np.mean(scores), spread=spread, scores=scores, steps=steps,
                              seconds=round(time.perf_counter() - start, 1))
    return measured


def new_report(args: argparse.Namespace, argv: list[str] | None, test_images: int) -> dict:
    """What --json says before the first result."""
    arguments = sys.argv[1:] if argv is None else argv
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    numpy=np.__version__, scipy=scipy.__version__, pillow=PIL.__version__)
    return dict(command=shlex.join(["python", "evaluate.py", *arguments]), real=args.real,
                test_images=test_images, seeds=args.seeds, wrn=args.wrn, device=str(args.device),
                versions=versions, results=[])


def print_row(cells: list[str]) -> None:
    row = f"{on_one_line(cells[0]):<24}{cells[1]:>8}{cells[2]:>9}"
    print(row + "".join(f"{cell:>19}" for cell in cells[3:]), flush=True)


def result_cells(result: dict, classifiers: list[str], measures: list[Distance]) -> list[str]:
    """The row of the table that one of the report's results makes."""
    epsilon = result["origin"].get("epsilon")
    cells = [result["name"], f"{result['images']:,}", in_words(epsilon, 3) if epsilon else "-"]
    for found in result["accuracy"].values():
        spread = "" if found["spread"] is None else f" +- {found['spread']:.2%}"
        cells.append(f"{found['mean']:.2%}{spread}")
    if not result["accuracy"]:
        cells += ["-"] * len(classifiers)
    return cells + [f"{result[m.name]:.2f}" for m in measures if m.name in result]


def first_feature_map(size: int) -> int:
    """Its numbers in a batch of the small CNN, whose images are `size` wide: for threads.choose."""
    return RECIPES["small-cnn"].batch * 32 * (size // 2) ** 2


def main(argv: list[str] | None = None, inception: NetworkFile = INCEPTION) -> None:
    args = parse_args(argv)
    sources, real, test = load_images(args)
    for name in args.classifiers:   # complains now rather than after hours
        make_classifier(name, test.images.shape[3], test.images.shape[1], len(test.classes),
                        args.wrn)
    threads.choose(first_feature_map(test.images.shape[1]), args.device)
    measures = distances(args, real, test, inception)
    report = new_report(args, argv, len(test.labels))
    print(f"accuracy on {len(test.labels):,} real test images: mean and spread of {args.seeds} "
          "classifiers each")
    print_row(["training images", "number", "epsilon", *args.classifiers,
               *(distance.name for distance in measures)])
    for name, train, origin in sources:
        result = dict(name=name, images=len(train.labels), origin=origin,
                      accuracy=measure(train, test, args))
        if not origin.get("real"):   # to themselves, the real images have no distance
            result |= {distance.name: distance.to(train.images) for distance in measures}
        report["results"].append(result)
        print_row(result_cells(result, args.classifiers, measures))
        if args.json:   # after every row: hours of work may follow
            with atomic_write(args.json) as file:
                file.write(as_json(report))


if __name__ == "__main__":
    with one_line_errors():
        main()
