"""The largest physical batch that the memory is enough for."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from runtime import memory

MB = 10**6


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function (bytes of memory) -> the sizes of batches tried on a machine that has so much.

    100 MB are in use before, and an example takes 10 MB.
    """
    sizes = [0]

    def peak(who: int) -> SimpleNamespace:
        return SimpleNamespace(ru_maxrss=(100 * MB + 10 * MB * max(sizes)) / 1024)

    def with_memory(size: int) -> list[int]:
        pages = {"SC_PHYS_PAGES": size / 4096, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr(memory.os, "sysconf", pages.get)
        return sizes

    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.resource, "getrusage", peak)
    return with_memory


def largest(sizes: list[int], most: int) -> int:
    def clipped_sum(model: object, parameters: dict, batch: tuple, C: float) -> None:
        x, y = batch
        assert x.shape[1:] == (2, 4) and len(y) == len(x)
        sizes.append(len(x))

    example = torch.zeros(1, 2, 4), torch.zeros(1, 2)
    return memory.largest_physical_batch(clipped_sum, None, {}, example, most)


@pytest.mark.parametrize("total, expected", [(4000, 64), (400, 16), (40, 2), (1, 1)])
def test_the_physical_batch_fits_into_half_of_the_memory(machine, total, expected):
    sizes = machine(total * MB)
    assert largest(sizes, most=50) == expected   # 64 is enough for 50 examples
    assert 10 * max(sizes) <= max(10, total / 2)   # not even tried beyond


@pytest.mark.parametrize("environment, expected", [
    ({"TORCHELASTIC_RUN_ID": "torchrun has started this"}, 4),
    ({}, 16)])   # a cluster has left WORLD_SIZE behind
def test_torchrun_s_processes_share_the_memory(machine, monkeypatch, environment, expected):
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", **environment}.items():
        monkeypatch.setenv(name, value)
    assert largest(machine(400 * MB), most=50) == expected


@pytest.mark.parametrize("platform, factor", [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes_on_every_system(monkeypatch, platform, factor):
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    assert memory.peak_memory(torch.device("cpu")) == 5 * factor
