"""A program computes on as many threads as bring something; OMP_NUM_THREADS is obeyed."""

import os

import numpy as np
import pytest
import torch

import audit
import evaluate
import sample
import train
from datasets import Dataset
from runtime import threads
from runtime.distributed import log_once
from tiny import FLAGS, configure, tiny_model


@pytest.fixture
def chosen(monkeypatch) -> list[int]:
    """The numbers of threads that torch is told, on a machine of six cores, four of them free."""
    told = []
    log_once.cache_clear()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "CORES", 6)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(threads, "gain",
                        lambda numbers, few, many: min(numbers, many) / min(numbers, few))
    return told


@pytest.mark.parametrize("useful, expected", [(1, 1), (2, 2), (4, 4), (5, 4), (6, 6)])
def test_threads_are_doubled_while_that_brings_much(chosen, useful, expected):
    threads.choose(useful, torch.device("cpu"))
    assert chosen == [expected]


def test_a_later_choice_still_knows_of_all_cores(chosen, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    for useful in (1, 6):
        threads.choose(useful, torch.device("cpu"))
    assert chosen == [1, 6]


def test_fewer_threads_are_spoken_of_once(chosen, capsys):
    for _ in range(2):
        threads.choose(2, torch.device("cpu"))
    assert capsys.readouterr().out == (
        "computing on 2 of 6 cores, as more bring little now: OMP_NUM_THREADS=6 takes all\n")


@pytest.mark.parametrize("numbers, tried", [
    (3 * 2048, 3 * 2048), (0, 2048), (10**12, threads.MOST)])
def test_gain_is_of_medians_over_turns(monkeypatch, numbers, tried):
    """A convolution takes 10 ms on one thread, 5 ms on two; the first of each takes longer."""
    clock, told = [0.0], []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def convolution(images, weight, padding):
        clock[0] += (0.01 if told[-1] == 1 else 0.005) + (1.0 if len(told) <= 2 else 0.0)
        assert images.numel() == tried

    monkeypatch.setattr(threads.F, "conv2d", convolution)
    assert threads.gain.__wrapped__(numbers, 1, 2) == pytest.approx(2)
    assert told == [1, 2] * threads.ROUNDS


@pytest.mark.parametrize("variable, device", [("4", "cpu"), (None, "cuda")])
def test_what_was_asked_for_and_gpus_stay(chosen, monkeypatch, capsys, variable, device):
    if variable:
        monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", variable)
    threads.choose(1, torch.device(device))
    assert not chosen and not capsys.readouterr().out


@pytest.mark.parametrize("settings, numbers", [
    (["autoencoder.batch=100"], 100 * 8 * 8 ** 2),
    (["autoencoder.batch=100", "autoencoder.crop=4"], 100 * 8 * 4 ** 2),
    (["public.batch=100"], 100 * 16 * 4 ** 2)])
def test_the_larger_first_feature_map_counts(settings, numbers):
    config = configure("autoencoder.batch=1", "public.batch=1", *settings)
    assert threads.of_training(config) == numbers
    assert threads.of_unet(tiny_model(), 100) == 100 * 16 * 4 ** 2


@pytest.mark.parametrize("program, numbers", [
    (train, 4 * 8 * 8 ** 2), (sample, 2 * 16 * 4 ** 2), (evaluate, 64 * 32 * 16 ** 2),
    (audit, 0)])
def test_every_program_chooses_its_threads(private, tmp_path, monkeypatch, program, numbers):
    seen = []
    monkeypatch.setattr(threads, "choose", lambda *of: seen.append(of))
    test = Dataset(np.zeros((1, 32, 32, 1), np.uint8), np.zeros(1, int), ["a"])
    monkeypatch.setattr(train, "run_public", lambda config, target: None)
    monkeypatch.setattr(evaluate, "load_images", lambda args: ([], None, test))
    monkeypatch.setattr(audit, "run_canaries", lambda canaries: True)
    program.main({
        train: ["--stage", "public", "--out", str(tmp_path), *FLAGS],
        sample: [str(private), "--npz", str(tmp_path / "s.npz"), "--count", "2", "--steps", "1",
                 "--device", "cpu"],
        evaluate: ["--real-baseline", "--device", "cpu"], audit: []}[program])
    assert seen == [(numbers, torch.device("cpu"))]
