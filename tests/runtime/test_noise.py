"""A private run's numbers are its generator's, drawn ahead, each of them used once."""

import os

import numpy as np
import pytest

import train
from runtime import noise
from runtime.checkpoints import load_checkpoint
from tiny import arguments


@pytest.mark.parametrize("count", [1, 12, 100])   # less than is asked for, or more
def test_numbers_drawn_ahead_are_the_generator_s_in_order(count, monkeypatch):
    monkeypatch.setattr(noise, "BLOCK", 5)
    rng, shapes = noise.Ahead(np.random.default_rng(0), count), [(3, 2), (0, 4), (7,), (1, 20)]
    found = np.concatenate([rng.standard_normal(shape).ravel() for shape in shapes])
    expected = np.random.default_rng(0).standard_normal(len(found))
    np.testing.assert_array_equal(found, expected)
    single = rng.standard_normal((2, 3), dtype=np.float32)
    assert single.shape == (2, 3) and single.dtype == np.float32


def test_an_insecure_seed_names_step_and_process(monkeypatch):
    def numbers(seed: int, step: int, rank: int) -> list:
        monkeypatch.setattr(noise, "rank_and_world", lambda: (rank, 2))
        return noise.private_generator(seed, step, 1).random(4).tolist()

    assert numbers(3, 0, 0) == numbers(3, 0, 0)
    different = [numbers(3, 0, 0), numbers(3, 0, 1), numbers(3, 1, 0), numbers(5, 0, 0)]
    assert len({tuple(row) for row in different}) == 4


def test_a_private_run_reads_everything_from_the_system(public, tmp_path, monkeypatch):
    counts, urandom = [], os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: counts.append(count) or urandom(count))
    train.main(arguments(public, tmp_path))
    model, metadata = load_checkpoint(tmp_path / "private-eps3.pt")
    names = train.dp_sgd.private_parameter_names(model)
    noise_of_a_step = sum(model.get_parameter(name).numel() for name in names)
    assert sum(counts) >= 8 * metadata["plan"]["steps"] * (noise_of_a_step + 24)
