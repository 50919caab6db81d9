"""Two processes (torchrun, gloo) make one private run: one batch, one noise, the same weights everywhere."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ledger import TINY, arguments, write_images

import dp_sgd
import train
from ldm import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def torchrun(world: int, script, *more, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*TORCHRUN, str(world), str(script), *map(str, more)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A folder with images for both stages and a public model, trained by two processes."""
    folder = tmp_path_factory.mktemp("public")
    write_images(folder / "public-images", [6, 6], seed=0)
    write_images(folder / "private-images", [12, 12], seed=1)
    done = torchrun(2, "train.py", "--stage", "public", "--out", folder, "--public-data", folder / "public-images",
                    *TINY)
    assert done.returncode == 0, done.stderr
    bars = re.findall(r"autoencoder: +0%.*0/2 \[00:00<\?, \?it/s\]", done.stderr)   # how each begins
    assert done.stdout.count("public stage: 12 images") == 1 and len(bars) == 1
    return folder


STEP = """
import sys, time, numpy as np, torch, torch.distributed as dist
import dp_sgd
dist.init_process_group("gloo")
batch = (torch.from_numpy(np.load(sys.argv[1])),)
loss = lambda parameters, x: sum((p * x).sum() for p in parameters.values())
parameters = {name: torch.zeros(batch[0].shape[1:], dtype=torch.float64) for name in ("a", "b")}
for sigma in (0.0, 0.7):
    plan = dp_sgd.PrivacyPlan(100, 10, 1, sigma, 0.5, 1e-5)
    gradient = dp_sgd.noisy_gradient(loss, parameters, batch, plan, 3, dp_sgd.secure_generator())
    np.save(f"{sys.argv[2]}-{dist.get_rank()}-{sigma}.npy", np.stack([g.numpy() for g in gradient.values()]))
dist.barrier()
dist.destroy_process_group()
time.sleep(0.5)   # see train.process_group
"""


@pytest.mark.parametrize("count", [7, 1, 0])   # 1: the second process has nothing to do; 0: neither has
def test_the_sum_is_that_of_one_process_and_the_noise_is_added_once(tmp_path, count):
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((count, 100, 100)) * 10.0 ** rng.integers(-4, 1, (count, 1, 1))
    np.save(tmp_path / "batch.npy", batch)
    (tmp_path / "step.py").write_text(STEP)
    done = torchrun(2, tmp_path / "step.py", tmp_path / "batch.npy", tmp_path / "g")
    assert done.returncode == 0, done.stderr

    def loss(parameters, x):
        return sum((p * x).sum() for p in parameters.values())

    parameters = {name: torch.zeros(100, 100, dtype=torch.float64) for name in ("a", "b")}
    alone = dp_sgd.clipped_gradient_sum(loss, parameters, (torch.from_numpy(batch),), 0.5, 3)
    alone = np.stack([s.numpy() for s in alone.values()]) / (10 * 0.5)
    exact, noisy = ([np.load(tmp_path / f"g-{rank}-{sigma}.npy") for rank in (0, 1)] for sigma in (0.0, 0.7))
    np.testing.assert_allclose(exact[0], alone, rtol=1e-6, atol=1e-12)
    for both in (exact, noisy):
        assert np.array_equal(*both)   # else the weights would drift apart
    noise = (noisy[0] - alone) * (10 * 0.5)   # 20,000 numbers: their standard deviation is right to 3% surely
    assert noise.std() == pytest.approx(0.7 * 0.5, rel=0.03) and abs(noise.mean()) < 0.02


def test_two_processes_train_what_one_trains(public, tmp_path):
    """With a seed for the noise, batches and draws are the same: what remains is the order of a sum."""
    flags = ("--insecure-noise-seed", 7, "--epochs", 1)
    train.main(arguments(public, tmp_path / "one", *flags))
    done = torchrun(2, "train.py", *arguments(public, tmp_path / "two", *flags))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("private stage: N = 24") == 1   # one of them speaks
    (one, facts), (two, others) = (load_checkpoint(tmp_path / n / "private-eps3.pt") for n in ("one", "two"))
    assert facts["ledger"] == others["ledger"]
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)   # Adam magnifies the last bits


def test_a_lost_process_ends_the_run_and_one_process_goes_on(public, tmp_path):
    command = arguments(public, tmp_path, "--epochs", 40, "--save-every", 2, "--resume")   # 120 steps
    process = subprocess.Popen([*TORCHRUN, "2", "train.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    unfinished, deadline = tmp_path / "private-eps3.unfinished.pt", time.time() + 60
    while not unfinished.exists() and time.time() < deadline:
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0   # the other one does not wait for ever
    assert not (tmp_path / "private-eps3.pt").exists()
    steps = load_checkpoint(unfinished)[1]["training"]["steps"]
    assert 0 <= steps < 120
    train.main(command)
    assert [e["steps"] for e in load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"]] == [120]


def test_bad_input_is_one_line_of_one_process(tmp_path):
    done = torchrun(2, "train.py", "--eps", "-1", "--out", tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: --eps must be positive") == 1
