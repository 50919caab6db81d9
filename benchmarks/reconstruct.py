"""What does the autoencoder alone cost? Real training images, encoded and decoded, as evaluate.py takes them.

    python benchmarks/reconstruct.py runs/mnist/public.pt decoded.npz --real mnist --data-dir data/mnist
    python evaluate.py decoded.npz --real mnist --data-dir data/mnist --classifiers cnn --epochs 10

Prints the mean squared error, with pixels from -1 to 1, and the variance of each latent channel, in units in which that
of all public latents is 1: the KL term leaves channels that it finds no use for at 0. The output is made of private
images without privacy: it must not be published.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
from config import find_device  # noqa: E402
from ldm import load_checkpoint  # noqa: E402
from train import encode_all  # noqa: E402


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("npz", type=Path, help="write this file: images uint8 [n, H, W, C], labels int64 [n]")
    parser.add_argument("--real", default="digits")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    model, facts = load_checkpoint(args.checkpoint)
    real = data.load(args.real, "train", args.data_dir, facts["config"]["image_size"], facts["config"]["channels"])
    model.to(find_device("auto"))
    z_0 = encode_all(model, real.images, model.latent_scale.device)
    images = np.concatenate([model.decode(part).cpu().numpy() for part in tqdm(z_0.split(500), desc="decoding")])
    error = np.mean([((a / 127.5 - b / 127.5) ** 2).mean() for a, b in zip(images, real.images, strict=True)])
    print(f"mean squared error {error:.5f}; variances of the channels of the latents: "
          + ", ".join(f"{v:.2f}" for v in z_0.var((0, 2, 3)).tolist()))
    data.save_arrays(args.npz, images=images, labels=real.labels)
    print(f"wrote {len(images):,} images to {args.npz}")


if __name__ == "__main__":
    main()
