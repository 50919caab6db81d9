"""Samplers compared: how good are 1,000 samples for how many network evaluations per image?

    python benchmarks/samplers.py runs/mnist/private-eps10.pt --real mnist

Prints the Frechet distance between samples and the first 4,000 real test images, in the features of
a classifier trained on real images: it is no FID. Beside it stands the share of samples in which
that classifier sees the class that was asked for. Such a comparison looks at private test images:
what is chosen by it is not covered by epsilon.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

import datasets
from evaluate import features_and_predictions, train_feature_classifier
from runtime.checkpoints import load_checkpoint
from sample import draw_samples, uniform_labels
from variants.fid import frechet_distance, mean_and_covariance

CPU = torch.device("cpu")
# name, solver, eta, network evaluations
SAMPLERS = [(name, solver, eta, steps) for name, solver, eta, evaluations in (
    ("DDIM, eta 1", "ddim", 1.0, (50, 25, 12, 8)),
    ("DDIM, eta 0", "ddim", 0.0, (50, 25, 12, 8)),
    ("DPM-Solver++ 2M", "dpm", 0.0, (50, 25, 12, 8, 5))) for steps in evaluations]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--real", default="digits")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--count", type=int, default=1_000)
    parser.set_defaults(seed=3, device=CPU)
    args = parser.parse_args()
    model, metadata = load_checkpoint(args.checkpoint)
    vae = model.architecture["vae"]
    train, test = (datasets.load(args.real, split, args.data_dir, vae["resolution"],
                                 vae["in_channels"]) for split in ("train", "test"))
    classifier = train_feature_classifier(train, CPU)
    real = mean_and_covariance([features_and_predictions(classifier, test.images[:4_000])[0]])
    labels = uniform_labels(args.count, len(metadata["classes"]))
    print("| sampler | evaluations | Frechet distance | recognised | seconds |\n"
          "|---|---|---|---|---|")
    for name, args.solver, args.eta, args.steps in SAMPLERS:
        start = time.perf_counter()
        images = draw_samples(model, labels, args)
        seconds = time.perf_counter() - start
        features, seen = features_and_predictions(classifier, images)
        distance = frechet_distance(*mean_and_covariance([features]), *real)
        print(f"| {name} | {args.steps} | {distance:.2f} | {np.mean(seen == labels):.1%} | "
              f"{seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
