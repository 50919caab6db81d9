"""Two processes of torchrun make one run: one batch, one noise, the same weights everywhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sample
import train
from runtime import distributed
from runtime.checkpoints import load_checkpoint
from tiny import arguments, assert_poisson_sampled, refuse

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(script: object, *more: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([*TORCHRUN, *map(str, (script, *more))], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)


# ---- alone -------------------------------------------------------------------------------------

def test_without_torchrun_nothing_changes():
    def clipped_sum(model, parameters, batch, C):
        return {}

    asked = []
    assert distributed.rank_and_world() == (0, 1)
    for wrap in (distributed.of_share, distributed.summed, distributed.by_first_process):
        assert wrap(clipped_sum) is clipped_sum
    assert distributed.shared_stop(asked) is asked
    assert distributed.local_batch_size(7) == 7
    weight = nn.Parameter(torch.ones(2))
    with distributed.process_group(), distributed.averaged_gradients():
        weight.sum().backward()
        torch.optim.SGD([weight], lr=1.0).step()
    assert weight.tolist() == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_writes(as_process, capsys, rank):
    as_process(rank)
    assert distributed.is_first_process() == (rank == 0)
    for _ in range(2):
        distributed.log_once(f"a line of process {rank}")
    assert capsys.readouterr().out.count("a line") == (rank == 0)


@pytest.fixture(params=[
    {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "1"}, {"WORLD_SIZE": "two", "RANK": ""},
    {"WORLD_SIZE": "", "RANK": ""}, {"WORLD_SIZE": "", "TORCHELASTIC_RUN_ID": "of a parent"},
    {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}],
    ids=str)
def left_over(request, monkeypatch) -> dict[str, str]:
    """What a cluster has left in the environment, though torchrun has not started the program."""
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    return request.param


def test_a_program_that_works_alone_ignores_left_overs(private, tmp_path, left_over, capsys):
    sample.main([str(private), "--npz", str(tmp_path / "s.npz"), "--count", "2", "--steps", "1"])
    assert "wrote 2 images" in capsys.readouterr().out and (tmp_path / "s.npz").exists()
    assert "a.pt does not exist" in refuse(capsys, sample.main, [
        tmp_path / "a.pt", "--npz", tmp_path / "t.npz"])


def test_left_overs_never_make_several_private_runs(public, tmp_path, left_over, capsys):
    if left_over.get("WORLD_SIZE"):
        assert "unset WORLD_SIZE" in refuse(capsys, train.main, arguments(public, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    else:
        train.main(arguments(public, tmp_path / "out", "--epochs", 1))
        assert (tmp_path / "out/private-eps3.pt").exists()


# ---- functions of two processes ----------------------------------------------------------------

PARTS = """
import sys
from contextlib import nullcontext
import numpy as np, torch
from torch import nn
import dp_sgd
from runtime import distributed
from tiny import included_by


class Scaled(nn.Module):   # the gradient of each of its weights is x, averaged over the draws
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(50, 50, dtype=torch.float64)) for _ in "ab")

    def forward(self, x):
        return ((self.a + self.b) * x).flatten(1).sum(1)


folder, found = sys.argv[1], {}
with distributed.process_group():
    rank, world = distributed.rank_and_world()
    model = Scaled()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    alone = dp_sgd.in_chunks(dp_sgd.clipped_gradient_sum, 3)
    together = distributed.summed(alone)
    add_noise = distributed.by_first_process(dp_sgd.add_noise)
    rng = dp_sgd.secure_generator()
    plan = dp_sgd.PrivacyPlan(20, 10, 1, 0.7, 0.5, 1e-5)
    for count in (7, 1, 0):
        batch = torch.from_numpy(np.load(f"{folder}/batch.npy"))[:count]
        for name, function, part in (("alone", alone, batch),
                                     ("together", together, batch[rank::world])):
            total = torch.stack(list(function(model, parameters, (part,), 0.5).values()))
            found[f"{name}-{count}"] = total.numpy()
        noisy = add_noise({"": total.clone()}, plan, rng)[""]
        found[f"noisy-{count}"] = noisy.numpy()
    sample = distributed.of_share(dp_sgd.poisson_sample)
    batches = [sample(plan, rng).tolist() for _ in range(4000)]
    found["included"] = included_by(plan, batches)
    asked = []
    stop = distributed.shared_stop(asked)
    found["before"] = bool(stop)
    if rank:
        asked.append(2)   # Ctrl-C reached the second process only
    found["after"] = bool(stop)
    messages, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: messages.append(all_reduce(tensor))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for name, inside in (("gradient", distributed.averaged_gradients), ("own", nullcontext)):
        with inside():
            optimizer.zero_grad()
            (model.a.sum() * (1 + rank) + model.b.sum()).backward()
            optimizer.step()
        found[name] = torch.stack([model.a.grad, model.b.grad]).numpy()
    found["messages"] = len(messages)
    found["share"] = distributed.local_batch_size(7)
    print("speaks")
    np.savez(f"{folder}/{rank}.npz", **found)
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[dict, dict, str]:
    """(what the first process found, what the second one found, what they printed)."""
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(-4, 1, (7, 1, 1, 1))   # some are clipped
    np.save(folder / "batch.npy", rng.standard_normal((7, 1, 50, 50)) * sizes)
    (folder / "parts.py").write_text(PARTS)
    done = torchrun(folder / "parts.py", folder)
    assert done.returncode == 0, done.stderr
    found = [dict(np.load(folder / f"{rank}.npz")) for rank in (0, 1)]
    return *found, done.stdout


@pytest.mark.parametrize("count", [7, 1, 0])   # 1: the second process has no example
def test_the_sum_and_the_noise_are_one_process_s(parts, count):
    one, other, _ = parts
    alone, together, noisy = (one[f"{name}-{count}"] for name in ("alone", "together", "noisy"))
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-12)
    for name in ("together", "noisy"):   # else the weights would drift apart
        assert np.array_equal(one[f"{name}-{count}"], other[f"{name}-{count}"])
    noise = noisy * 10 * 0.5 - alone
    assert noise.std() == pytest.approx(0.7 * 0.5, rel=0.06)   # 5,000 numbers: six deviations
    assert abs(noise.mean()) < 0.03


def test_each_process_draws_from_a_share_of_its_own(parts):
    one, other = (found["included"] for found in parts[:2])
    assert not one[:, 1::2].any() and not other[:, ::2].any()
    # Examples of both processes are included independently, each with probability q.
    assert_poisson_sampled(one | other, 0.5)


def test_all_processes_stop_where_one_is_asked_to(parts):
    assert [(bool(found["before"]), bool(found["after"])) for found in parts[:2]] == [
        (False, True)] * 2


def test_a_public_gradient_is_the_mean_of_all_shares(parts):
    for rank, found in enumerate(parts[:2]):
        assert (found["gradient"][0] == 1.5).all() and (found["gradient"][1] == 1).all()
        assert (found["own"][0] == 1 + rank).all() and found["share"] == 4


def test_all_public_gradients_travel_in_one_message(parts):
    assert [found["messages"] for found in parts[:2]] == [1, 1]


def test_one_of_the_processes_speaks(parts):
    assert parts[-1].count("speaks") == 1


ENDINGS = """
import os, sys, time
import torch
from runtime import distributed
from runtime.cli import one_line_errors, stop_after_step

with one_line_errors(several=True), distributed.process_group(), stop_after_step() as asked:
    if os.environ["RANK"] == "1":
        if sys.argv[1] == "kill":
            os._exit(9)
        raise {"OSError": OSError, "KeyError": KeyError}[sys.argv[1]]("of the second process")
    while sys.argv[1] == "kill" and not asked:
        time.sleep(0.01)   # until torchrun sends its SIGTERM to who is left
    distributed.sum_over_processes([torch.ones(1)])
"""


@pytest.mark.parametrize("how, line", [
    ("OSError", "error: of the second process"), ("KeyError", "KeyError: 'of the second process'"),
    ("kill", "error: another process of this run has ended")])
def test_the_first_error_is_reported_and_no_other(tmp_path, how, line):
    (tmp_path / "endings.py").write_text(ENDINGS)
    done = torchrun(tmp_path / "endings.py", how)
    said = [text for text in done.stderr.splitlines()
            if re.match(r"\w*rror: |Traceback|terminate", text.split("]:")[-1].strip())]
    if how == "KeyError":
        assert said.pop(0).endswith("Traceback (most recent call last):")
    # torchrun's own account comes last.
    assert line in said[0] and done.returncode == 1
    assert ["Traceback" in text for text in said[1:]] == [True], done.stderr


def test_an_error_before_they_meet_is_said_once():
    done = torchrun("train.py", "--eps", "none")
    assert done.stderr.count("error: argument --eps") == 1 and done.returncode == 1


# ---- runs of two processes ---------------------------------------------------------------------

# train.py, whose second process breaks down in its 6th step. Both write what they saw before.
BREAKDOWN = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook
import train

sums = []


def count(optimizer, *details):
    weights = optimizer.param_groups[0]["params"]
    sums.append(sum(p.grad.double().sum().item() for p in weights))
    if len(sums) == 5:
        with open(sys.argv[1] + os.environ["RANK"], "w") as file:
            file.write(repr(sums))
    if len(sums) == 6 and os.environ["RANK"] == "1":
        os._exit(9)


register_optimizer_step_pre_hook(count)
train.main(sys.argv[2:])
"""


def test_two_processes_do_both_stages_as_one_run(public, tmp_path):
    command = arguments(public, tmp_path / "two", "--epochs", 1)[2:]   # without the public model
    done = torchrun("train.py", *command)
    assert done.returncode == 0, done.stderr
    bars = re.findall(r"autoencoder: +0%.*0/2 \[00:00<\?, \?it/s\]", done.stderr)   # each begins so
    assert done.stdout.count("public stage: autoencoder") == 1 and len(bars) == 1
    assert done.stdout.count("private stage: N = 24") == 1
    train.main([*command, "--public-checkpoint", str(tmp_path / "two/public.pt"),
                "--out", str(tmp_path / "one")])
    one, two = (load_checkpoint(tmp_path / name / "private-eps3.pt")[1]["ledger"]
                for name in ("one", "two"))
    assert one == two


def test_a_lost_process_ends_the_run_and_one_goes_on(public, tmp_path):
    (tmp_path / "breakdown.py").write_text(BREAKDOWN)
    command = arguments(public, tmp_path / "out", "--resume")
    done = torchrun(tmp_path / "breakdown.py", tmp_path / "gradients", *command)
    assert done.returncode != 0   # the other process does not wait for ever
    one, other = (json.loads((tmp_path / f"gradients{rank}").read_text()) for rank in (0, 1))
    assert one == other and len(set(one)) == 5   # one secret noise for both
    assert not (tmp_path / "out/private-eps3.pt").exists()
    unfinished = load_checkpoint(tmp_path / "out/private-eps3.unfinished.pt")[1]
    assert unfinished["training"]["step"] == 4
    train.main(command)
    ledger = load_checkpoint(tmp_path / "out/private-eps3.pt")[1]["ledger"]
    assert [entry["steps"] for entry in ledger] == [12]
