"""The Frechet distance between two sets of images, in the features of a network.

FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6) is this distance in the features of one published
Inception network. In other features it is no FID. Where that network comes from does not matter
here: the caller gives it as a module.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from scipy import linalg
from torch import nn
from tqdm import trange


@torch.no_grad()
def inception_features(network: nn.Module, images: np.ndarray, device: torch.device,
                       batch: int = 100) -> Iterator[torch.Tensor]:
    """Features [B, 2048] of batches of images uint8 [N, H, W, C], grey or colour.

    network: StyleGAN2-ADA's TorchScript version, which resizes and normalises images itself.
    """
    for i in trange(0, len(images), batch, desc="Inception features", unit="batch", leave=False):
        x = torch.from_numpy(images[i:i + batch]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        yield network(x.contiguous().to(device), return_features=True)


def mean_and_covariance(batches: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d], float64, of features that come in batches [B, d].

    The divisor of the covariance is N - 1.
    """
    count = 0
    for batch in batches:
        features = batch.to("cpu", torch.float64).numpy()
        if not count:   # sums are taken around the first batch's mean: far from it, digits cancel
            centre = features.mean(0)
            total, products = np.zeros_like(centre), np.zeros((len(centre), len(centre)))
        features = features - centre
        total += features.sum(0)
        products += features.T @ features
        count += len(features)
    mean = total / count
    return centre + mean, (products - count * np.outer(mean, mean)) / (count - 1)


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray,
                     mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians (Dowson and Landau 1982).

    Means [d], covariances A and B [d, d]. With A = L L^T and B = M M^T the trace of the root is the
    sum of the singular values of L^T M. They need no inverse, unlike a matrix root: A and B are
    singular where there are fewer images than features.
    """
    factors = []
    for covariance in (cov_a, cov_b):
        values, vectors = linalg.eigh(covariance)
        factors.append(vectors * np.sqrt(values.clip(0.0)))
    cross = linalg.svdvals(factors[0].T @ factors[1]).sum()
    traces = np.trace(cov_a) + np.trace(cov_b)
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + traces - 2.0 * cross))
