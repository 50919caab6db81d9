"""Frechet distances that equal their closed forms, and features in the network's own format."""

import numpy as np
import pytest
import torch

from variants.fid import frechet_distance, inception_features, mean_and_covariance


def random_covariance(size: int, rank: int) -> np.ndarray:
    half = np.random.default_rng(2).standard_normal((size, rank))
    return half @ half.T


def test_frechet_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    (mean_a, mean_b), (a, b) = rng.standard_normal((2, 30)), rng.random((2, 30))
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(mean_a, np.diag(a), mean_b, np.diag(b))
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2)."""
    a, b = np.array([[2.0, 1.5], [1.5, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected, zero = np.trace(a) + np.trace(b) - 2 * root, np.zeros(2)
    assert not np.allclose(a @ b, b @ a)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zero, b, zero, a) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_scaled_gaussians():
    cov = random_covariance(50, 80)
    distance = frechet_distance(np.zeros(50), cov, np.ones(50), 9 * cov)
    assert distance == pytest.approx(50 + 4 * np.trace(cov), rel=1e-10)   # (3 - 1)^2


def test_frechet_distance_of_singular_covariances():
    """u u^T and v v^T: |u|^2 + |v|^2 - 2 |u v|."""
    u, v = np.random.default_rng(1).standard_normal((2, 200))
    expected, zero = u @ u + v @ v - 2 * abs(u @ v), np.zeros(200)
    found = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    assert found == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_anything_to_itself_is_zero():
    thin, zero = random_covariance(200, 20), np.zeros(200)
    distance = frechet_distance(zero, thin, zero, thin)
    assert distance == pytest.approx(0.0, abs=1e-9 * np.trace(thin))


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_mean_and_covariance_of_batches_equal_those_of_all(offset):
    features = np.random.default_rng(0).standard_normal((103, 7)) * np.arange(1, 8) + offset
    mean, cov = mean_and_covariance(torch.from_numpy(features).split(10))
    assert mean == pytest.approx(features.mean(0), rel=1e-12)
    assert cov == pytest.approx(np.cov(features.T), rel=1e-7, abs=1e-7)
    assert cov.dtype == np.float64


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_sees_three_channels_of_uint8(channels):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, channels), np.uint8)
    seen = []

    def network(x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        seen.append(x)
        return x.float().mean((2, 3))

    features = torch.cat(list(inception_features(network, images, torch.device("cpu"), batch=3)))
    assert [len(x) for x in seen] == [3, 3, 1] and features.shape == (7, 3)
    expected = torch.from_numpy(np.repeat(images, 3 // channels, axis=3)).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(seen), expected)   # the same numbers, still uint8
