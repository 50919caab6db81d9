"""Samplers compared: how good are 1,000 samples for how many network evaluations per image?

    python benchmarks/samplers.py runs/mnist/private-eps10.pt --real mnist --data-dir data/mnist

Prints the Frechet distance between samples and the first 4,000 real test images, in the features of a classifier
trained on real images (it is no FID), and the share of samples in which that classifier sees the class that was asked
for. Such a comparison looks at private test images: what is chosen by it is not covered by epsilon.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from evaluate import frechet_distance, judged, mean_and_covariance, train_judge  # noqa: E402
from ldm import load_checkpoint  # noqa: E402
from sample import sample, uniform_labels  # noqa: E402

CPU = torch.device("cpu")
SAMPLERS = [(steps, 1.0, 1) for steps in (50, 25, 12, 8)] + [(steps, 0.0, 1) for steps in (50, 25, 12, 8)] + [
    (steps, 0.0, 2) for steps in (50, 25, 12, 8, 5)]   # steps, eta, order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--real", default="digits")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--count", type=int, default=1_000)
    args = parser.parse_args()
    model, facts = load_checkpoint(args.checkpoint)
    size = facts["config"]["image_size"], facts["config"]["channels"]
    judge = train_judge(data.load(args.real, "train", args.data_dir, *size), CPU)
    real = mean_and_covariance([judged(judge, data.load(args.real, "test", args.data_dir, *size).images[:4_000])[0]])
    labels = uniform_labels(args.count, len(facts["classes"]))
    print("| sampler | evaluations | Frechet distance | recognised | seconds |\n|---|---|---|---|---|")
    for steps, eta, order in SAMPLERS:
        start = time.perf_counter()
        images = sample(model, labels, steps, eta, order, args.guidance, seed=3)
        seconds = time.perf_counter() - start
        features, seen = judged(judge, images)
        distance = frechet_distance(*mean_and_covariance([features]), *real)
        name = "second order" if order == 2 else f"DDIM, eta {eta:g}"
        print(f"| {name} | {steps} | {distance:.2f} | {np.mean(seen == labels):.1%} | {seconds:.0f} |",
              flush=True)


if __name__ == "__main__":
    main()
