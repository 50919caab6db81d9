"""Latents of a whole data set: encoded once, in memory or in a file without a name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from ldm import normalize_images
from runtime import latents
from runtime.fingerprint import each_digest
from runtime.latents import MappedLatents, encode_dataset
from tiny import arguments, tiny_model

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1)).astype(np.uint8)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """little_memory(size): from here on the machine has so many bytes."""
    return lambda size=0: monkeypatch.setattr(latents, "memory_of", lambda device: size)


@torch.no_grad()
def test_latents_are_those_of_each_batch(monkeypatch):
    model, digests = tiny_model().float(), []
    monkeypatch.setattr(latents, "images_at_once", lambda resolution: 7)
    monkeypatch.setattr(latents, "AHEAD", 3)   # 21 images are read together
    z_0 = encode_dataset(model, IMAGES, CPU, digests=digests)
    parts = [model.encode(normalize_images(IMAGES[k:k + 7], CPU)) for k in range(0, 50, 7)]
    assert torch.equal(z_0, torch.cat(parts)) and digests == each_digest(IMAGES)


@pytest.mark.parametrize("spare, kind", [(0, torch.Tensor), (-1, MappedLatents)])
def test_latents_in_memory_take_at_most_a_quarter(tmp_path, little_memory, spare, kind):
    little_memory(4 * (50 * 4 * 4 * 4 * 4) + spare)
    assert isinstance(encode_dataset(tiny_model().float(), IMAGES, CPU, tmp_path), kind)


def test_mapped_latents_are_used_as_a_tensor_is(tmp_path, little_memory):
    model = tiny_model().float()
    expected = encode_dataset(model, IMAGES, CPU)
    little_memory()
    z_0 = encode_dataset(model, IMAGES, CPU, tmp_path)
    for factor in (1.0, torch.tensor(2.5)):
        z_0 *= factor
        expected *= factor
        for index in (3, slice(4, 9), torch.tensor([7, 7, 0]), torch.tensor([], dtype=torch.long)):
            assert z_0[index].dtype == torch.float32
            torch.testing.assert_close(z_0[index], expected[index], rtol=2**-11, atol=1e-6)
        torch.testing.assert_close(z_0.std(), expected.std(), rtol=1e-3, atol=0)
    assert (len(z_0), z_0.shape, z_0.device) == (50, expected.shape, CPU)
    z_0[2:4] = expected[:2]
    torch.testing.assert_close(z_0[2:4], expected[:2], rtol=2**-11, atol=1e-6)


def test_latents_that_find_no_room_are_refused(tmp_path, little_memory, full_disk):
    little_memory()
    with full_disk(1000), pytest.raises(OSError, match=f"{tmp_path} has no room for 6,400 bytes"):
        encode_dataset(tiny_model().float(), IMAGES, CPU, tmp_path)


def test_private_latents_lie_in_no_named_file(public, tmp_path, little_memory, in_step):
    seen = []

    def look() -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines()
                  if str(tmp_path) in line]
        assert mapped and all(line.endswith("(deleted)") for line in mapped)

    little_memory()
    in_step(2, look)   # a kill would leave what is here
    train.main(arguments(public, tmp_path, "--epochs", 1))
    assert seen and all(name.startswith("private-eps3.") for name in seen)
