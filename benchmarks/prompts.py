"""Do samples show what their captions ask for: the digit, its slant, the weight of its stroke?

    python benchmarks/prompts.py runs/glyphs-text/private-eps10.pt runs/glyphs-text/private-eps1.pt

Samples of all ninety captions of `captioned-digits`; those whose combination the private training data lacked are
counted apart. A classifier trained on real digits tells the digit. Slant and weight are told by image moments: of the
slants (or weights) the one whose mean over real training images of the same digit is nearest. The row "real" does the
same to real test images. This looks at private images, and is not covered by epsilon.
"""

import argparse
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from dp_sgd import spent_epsilon  # noqa: E402
from evaluate import judged, train_judge  # noqa: E402
from glyphs import COMBINATIONS, SLANTS, WEIGHTS, caption, held_out  # noqa: E402
from ldm import load_checkpoint  # noqa: E402
from sample import sample  # noqa: E402

# caption: (digit, weight, slant), numbers of the words
MEANINGS = {caption("digit", string.digits[d], weight, slant): (d, [*WEIGHTS].index(weight), [*SLANTS].index(slant))
            for d in range(10) for weight, slant in COMBINATIONS}
IS_HELD_OUT = {caption("digit", d, *words): held_out(d, *words) for d in string.digits for words in COMBINATIONS}


def moments(images: np.ndarray) -> np.ndarray:
    """What tells weight and slant of white-on-black images uint8 [N, H, W, 1]: [N, 2].

    With the ink's mass m and its central second moments mu: m / sqrt(mu_yy), which grows with the width of the
    stroke but not with the height of the glyph; and -mu_xy / mu_yy, the shear to the right per pixel upwards.
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
    """Mean moments of each digit by weight and by slant, [2, 10, 3], from images with known meanings int [N, 3]."""
    found = moments(images)
    return np.array([[[found[(meanings[:, 0] == d) & (meanings[:, 1 + part] == word), part].mean()
                       for word in range(3)] for d in range(10)] for part in range(2)])


def read(images: np.ndarray, digits: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The meanings int [N, 3] of images of the digits int [N]."""
    found = moments(images)
    return np.stack([digits, *(np.abs(found[:, part, None] - means[part][digits]).argmin(1) for part in range(2))], 1)


def row(name: str, asked: np.ndarray, seen: np.ndarray, chosen: np.ndarray) -> str:
    """Shares of the `chosen` images in which digit, slant, weight and all three are as asked for."""
    right = (asked == seen)[chosen]
    shares = [*right.mean(0)[[0, 2, 1]], right.all(1).mean()]
    return f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--each", type=int, default=20, help="samples of each of the 90 captions (default 20)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=1.5)
    args = parser.parse_args()
    train, test = (data.load("captioned-digits", split) for split in ("train", "test"))
    means = calibrate(train.images, np.array([MEANINGS[c] for c in train.captions]))
    judge = train_judge(train, torch.device("cpu"))
    captions = [c for c in MEANINGS for _ in range(args.each)]
    print("| samples | captions | digit | slant | weight | all three |\n|---|---|---|---|---|---|")
    sources = [("real test images", test.captions, lambda: test.images)]
    for path in args.checkpoints:
        model, facts = load_checkpoint(path)
        epsilon = spent_epsilon(facts["ledger"], facts["plan"]["delta"], facts["config"]["accountant"]) if (
            "ledger" in facts) else None
        sources.append((f"eps = {epsilon:.3g}" if epsilon else "public only", captions, lambda model=model: sample(
            model, model.conditions(captions).numpy(), args.steps, 0.0, 2, args.guidance, seed=5)))
    for name, asked_for, draw in sources:
        images = draw()
        asked = np.array([MEANINGS[c] for c in asked_for])
        seen = read(images, judged(judge, images)[1], means)
        apart = np.array([IS_HELD_OUT[c] for c in asked_for])
        print(row(f"{name} | seen", asked, seen, ~apart), row(f"{name} | held out", asked, seen, apart), sep="\n",
              flush=True)
    print("| chance | - | 10% | 33.3% | 33.3% | 1.1% |")


if __name__ == "__main__":
    main()
