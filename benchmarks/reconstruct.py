"""What does the autoencoder alone cost? Real training images, encoded and decoded.

    python benchmarks/reconstruct.py runs/mnist/public.pt decoded.npz --real mnist
    python evaluate.py decoded.npz --real mnist --classifiers cnn --epochs 10

Prints the mean squared error, with pixels from -1 to 1, and the variance of each latent channel in
units of the variance of all public latents. The KL term leaves channels at 0 that it finds no use
for. The output is made of private images without privacy: it must not be published.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from tqdm import tqdm

import datasets
from runtime.checkpoints import load_checkpoint
from runtime.cli import find_device
from runtime.files import save_arrays
from runtime.latents import encode_dataset


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("npz", type=Path,
                        help="write this file: images uint8 [n, H, W, C], labels int64 [n]")
    parser.add_argument("--real", default="digits")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    model = load_checkpoint(args.checkpoint)[0].to(find_device("auto"))
    vae = model.architecture["vae"]
    real = datasets.load(args.real, "train", args.data_dir, vae["resolution"], vae["in_channels"])
    z_0 = encode_dataset(model, real.images, model.latent_scale.device)
    parts = tqdm(z_0.split(500), desc="decoding")
    images = np.concatenate([model.decode(part).cpu().numpy() for part in parts])
    error = np.mean([((a / 127.5 - b / 127.5) ** 2).mean()
                     for a, b in zip(images, real.images, strict=True)])
    variances = ", ".join(f"{v:.2f}" for v in z_0.var((0, 2, 3)).tolist())
    print(f"mean squared error {error:.5f}; variances of the channels of the latents: {variances}")
    save_arrays(args.npz, images=images, labels=real.labels,
                classes=np.array(real.classes, str))
    print(f"wrote {len(images):,} images to {args.npz}")


if __name__ == "__main__":
    main()
