"""How useful are the samples? Train a small classifier on them and test it on real images.

    python evaluate.py eps1.npz eps10.npz --real digits --ceiling
    python evaluate.py eps10.npz --real mnist --data-dir data/mnist

Every .npz (of sample.py) trains --seeds classifiers, for the same number of steps. Which of ten snapshots is
kept is decided on a held-out tenth of the *synthetic* images; the real test images are used once, for the number
that is reported.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

import data
from config import Parser, find_device, one_line_errors
from train import lr_at, to_pixels


def make_classifier(channels: int, classes: int) -> nn.Module:
    """A CNN of three strided convolutions: images [B, channels, H, W] -> logits [B, classes]."""
    layers = []
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, classes))


@torch.inference_mode()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    hits = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(1_000), y.split(1_000), strict=True))
    return hits / len(y)


def train_and_test(train: data.Dataset, test: data.Dataset, seed: int, steps: int, device: torch.device,
                   batch: int = 64) -> float:
    """Accuracy on `test` of a classifier trained on nine tenths of `train`, chosen on the last tenth."""
    torch.manual_seed(seed)
    x, y = to_pixels(train.images, device), torch.from_numpy(train.labels).to(device)
    order = torch.randperm(len(y), device=device)
    held_out, kept = order[:len(y) // 10], order[len(y) // 10:]
    model = make_classifier(x.shape[1], len(test.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    best, best_weights = -1.0, None
    for step in trange(steps, desc=f"classifier, seed {seed}", leave=False):
        model.train()
        chosen = kept[torch.randint(len(kept), (batch,), device=device)]
        dy, dx = torch.randint(-2, 3, (2,)).tolist()   # small random shifts, as digits are centred by hand
        loss = F.cross_entropy(model(x[chosen].roll((dy, dx), (2, 3))), y[chosen], label_smoothing=0.1)
        optimizer.param_groups[0]["lr"] = 2e-3 * lr_at(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0 or step == steps - 1:
            score = accuracy(model, x[held_out], y[held_out])
            if score >= best:
                best, best_weights = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return accuracy(model, to_pixels(test.images, device), torch.from_numpy(test.labels).to(device))


def load_synthetic(path: Path) -> data.Dataset:
    """The images and labels of an .npz of sample.py; ValueError if it is not one."""
    images, labels = data.read_arrays(path)
    if images.dtype != np.uint8 or images.ndim != 4 or labels.ndim != 1 or len(labels) < 10 or labels.min() < 0:
        raise ValueError(f"{path} must hold uint8 images [n, H, W, C] and labels [n] from 0 up, at least 10 of them")
    return data.Dataset(images, labels.astype(np.int64), [])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("synthetic", nargs="*", type=Path, help=".npz files of sample.py")
    parser.add_argument("--real", default="digits", help="digits (default), mnist, or a folder or zip of images")
    parser.add_argument("--data-dir", default="data", help="folder of the files of named data sets")
    parser.add_argument("--ceiling", action="store_true", help="also train on the real training images")
    parser.add_argument("--steps", type=int, default=2_000, help="steps of 64 images per classifier (default 2000)")
    parser.add_argument("--seeds", type=int, default=3, help="classifiers per data set (default 3)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ..., or auto (default)")
    args = parser.parse_args(argv)
    if not args.synthetic and not args.ceiling:
        raise ValueError("nothing to do: give .npz files of sample.py, or --ceiling")
    if args.seeds < 1 or args.steps < 1:
        raise ValueError("--seeds and --steps must be at least 1")

    device = find_device(args.device)
    sources = [(path.stem, load_synthetic(path)) for path in args.synthetic]
    _, size, _, channels = sources[0][1].images.shape if sources else (0, 32, 32, 1)
    test = data.load(args.real, "test", args.data_dir, size, channels)
    if args.ceiling:
        sources.append((f"real {args.real}", data.load(args.real, "train", args.data_dir, size, channels)))
    for name, train in sources:
        if train.images.shape[1:] != test.images.shape[1:] or train.labels.max() >= len(test.classes):
            raise ValueError(f"{name} has other image sizes or more classes than the real images of {args.real}")
    print(f"{'training images':<24}{'number':>8}   accuracy on {len(test.labels):,} real test images")
    for name, train in sources:
        scores = [train_and_test(train, test, seed, args.steps, device) for seed in range(args.seeds)]
        spread = np.std(scores, ddof=1) if args.seeds > 1 else 0.0
        print(f"{name:<24}{len(train.labels):>8,}   {np.mean(scores):.2%} +- {spread:.2%} ({args.seeds} seeds)")


if __name__ == "__main__":
    with one_line_errors():
        main()
