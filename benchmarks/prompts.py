"""Do samples show what their captions ask for: the digit, its slant, the weight of its stroke?

    python benchmarks/prompts.py runs/glyphs-text/private-eps10.pt runs/glyphs-text/private-eps1.pt

Samples are drawn of all ninety captions of `captioned-digits`. Captions whose combination the
private training data lacked are counted apart. A classifier trained on real digits tells the digit.
Image moments tell slant and weight: the nearest mean over real training images of the same digit
counts. The row "real test images" does the same to real images. All this looks at private images,
and is not covered by epsilon.
"""

import argparse
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

import datasets
from datasets.glyphs import COMBINATIONS, SLANTS, WEIGHTS, caption, held_out
from evaluate import features_and_predictions, train_feature_classifier
from runtime.checkpoints import load_checkpoint
from runtime.samples import provenance, title
from sample import draw_samples

CPU = torch.device("cpu")
# caption: (digit, weight, slant), numbers of the words
MEANINGS = {caption("digit", string.digits[d], weight, slant):
            (d, [*WEIGHTS].index(weight), [*SLANTS].index(slant))
            for d in range(10) for weight, slant in COMBINATIONS}
IS_HELD_OUT = {caption("digit", d, *words): held_out(d, *words)
               for d in string.digits for words in COMBINATIONS}


def moments(images: np.ndarray) -> np.ndarray:
    """What tells weight and slant of white-on-black images uint8 [N, H, W, 1]: [N, 2].

    Let the ink have the mass m and the central second moments mu. m / sqrt(mu_yy) grows with the
    width of the stroke but not with the height of the glyph. -mu_xy / mu_yy is the shear to the
    right per pixel upwards.
    """
    ink = images[..., 0] / 255.0
    y, x = np.mgrid[:ink.shape[1], :ink.shape[2]]
    mass = ink.sum((1, 2)).clip(1e-6)
    dy, dx = (v - ((ink * v).sum((1, 2)) / mass)[:, None, None] for v in (y, x))
    mu_yy, mu_xy = ((ink * dy * v).sum((1, 2)) / mass for v in (dy, dx))
    mu_yy = mu_yy.clip(1e-6)
    # A stroke of a constant width has m ~ width * height, and height ~ sqrt(mu_yy).
    return np.stack([mass / np.sqrt(mu_yy), -mu_xy / mu_yy], axis=1)


def calibrate(images: np.ndarray, meanings: np.ndarray) -> np.ndarray:
    """Mean moments of each digit by weight and by slant, [2, 10, 3].

    images: uint8 [N, H, W, 1] with known meanings int [N, 3].
    """
    found = moments(images)

    def mean(part: int, digit: int, word: int) -> float:
        rows = (meanings[:, 0] == digit) & (meanings[:, 1 + part] == word)
        return found[rows, part].mean()

    return np.array([[[mean(part, digit, word) for word in range(3)] for digit in range(10)]
                     for part in range(2)])


def read(images: np.ndarray, digits: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The meanings int [N, 3] of images of the digits int [N]."""
    found = moments(images)
    nearest = (np.abs(found[:, part, None] - means[part][digits]).argmin(1) for part in range(2))
    return np.stack([digits, *nearest], 1)


def row(name: str, asked: np.ndarray, seen: np.ndarray, chosen: np.ndarray) -> str:
    """Shares of the `chosen` images with the right digit, slant, weight, and all three."""
    right = (asked == seen)[chosen]
    shares = [*right.mean(0)[[0, 2, 1]], right.all(1).mean()]
    return f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |"


def print_rows(name: str, images: np.ndarray, captions: list[str], classifier: torch.nn.Module,
               means: np.ndarray) -> None:
    """Two rows: captions whose combinations were seen in training, and the others."""
    asked = np.array([MEANINGS[c] for c in captions])
    seen = read(images, features_and_predictions(classifier, images)[1], means)
    apart = np.array([IS_HELD_OUT[c] for c in captions])
    print(row(f"{name} | seen", asked, seen, ~apart))
    print(row(f"{name} | held out", asked, seen, apart), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--each", type=int, default=20, help="samples per caption (default 20)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.set_defaults(solver="dpm", eta=0.0, seed=5, device=CPU)
    args = parser.parse_args()
    train, test = (datasets.load("captioned-digits", split) for split in ("train", "test"))
    means = calibrate(train.images, np.array([MEANINGS[c] for c in train.captions]))
    classifier = train_feature_classifier(train, CPU)
    captions = [c for c in MEANINGS for _ in range(args.each)]
    print("| samples | captions | digit | slant | weight | all three |\n|---|---|---|---|---|---|")
    print_rows("real test images", test.images, test.captions, classifier, means)
    for path in args.checkpoints:
        model, metadata = load_checkpoint(path)
        images = draw_samples(model, model.embedder.conditions(captions).numpy(), args)
        print_rows(title(provenance(path, metadata)), images, captions, classifier, means)
    print("| chance | - | 10% | 33.3% | 33.3% | 1.1% |")


if __name__ == "__main__":
    main()
