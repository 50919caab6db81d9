"""A private run: stopped, killed, taken up again; and nothing but noisy gradients leaves it."""

import json
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

import dp_sgd
import sample
import train
from ldm import EMA
from runtime import runs
from runtime.checkpoints import load_checkpoint
from runtime.cli import one_line_errors
from runtime.ledger import spent_epsilon
from tiny import FLAGS, arguments, configure, refuse, tiny_data, tiny_model, write_images

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def crash() -> None:
    raise RuntimeError("power cut")


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def broken_off(public, tmp_path, in_step):
    """(folder of a run that crashed in its 6th step, the list of its steps)."""
    steps = in_step(6, crash)
    with pytest.raises(RuntimeError):
        train.main(arguments(public, tmp_path))
    return tmp_path, steps


# ---- stopped and taken up again ----------------------------------------------------------------

def test_a_crashed_run_goes_on_to_the_planned_steps(public, broken_off, capsys):
    folder, steps = broken_off
    metadata = load_checkpoint(folder / "private-eps3.unfinished.pt")[1]
    assert metadata["ledger"][0]["steps"] == metadata["training"]["step"] == 4   # after 0, 2, 4
    partial = json.loads((folder / "private-eps3.unfinished.privacy.json").read_text())
    assert partial["epsilon"]["rdp"] < 2.5
    train.main(arguments(public, folder, "--resume"))
    assert "going on with" in capsys.readouterr().out
    assert len(steps) == 6 + STEPS - 4
    ledger = load_checkpoint(folder / "private-eps3.pt")[1]["ledger"]
    assert [entry["steps"] for entry in ledger] == [STEPS]
    assert not list(folder.glob("*unfinished*"))


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    """All that is random is made a constant: the batch, its draws, and the noise."""
    plan, kept = dp_sgd.PrivacyPlan(5, 5, 6, 0.0, 1.0, 1e-5), {}
    names = dp_sgd.private_parameter_names(tiny_model())

    class SameNumbers:
        def __getattr__(self, method: str) -> object:
            return getattr(np.random.default_rng(0), method)

    def finished(start: dict | None, stop_at: int) -> dict:
        model = tiny_model()
        if start:
            model.load_state_dict(start["model"])

        def on_step(step, parameters, optimizer, ema):
            if step == stop_at:
                path = tmp_path / "state.pt"
                torch.save(dict(step=step, parameters=parameters, ema=ema.shadow,
                                optimizer=optimizer.state_dict(), model=model.state_dict()), path)
                kept.update(torch.load(path, weights_only=True))
                crash()

        train.train_private(model, *tiny_data(5), names, plan, configure(), SameNumbers(),
                            start=start, on_step=on_step)
        return model.state_dict()

    whole = finished(None, -1)
    with pytest.raises(RuntimeError):
        finished(None, 3)
    resumed = finished(kept, -1)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], p) for name, p in tiny_model().state_dict().items())


def test_ctrl_c_ends_the_step_saves_and_says_how_to_resume(public, tmp_path, in_step, capsys):
    steps = in_step(3, press_ctrl_c)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        train.main(arguments(public, tmp_path))
    assert stop.value.code == 130 and len(steps) == 3
    message = capsys.readouterr().err
    assert f"stopped after 3 of {STEPS} steps" in message and "--resume" in message
    unfinished = load_checkpoint(tmp_path / "private-eps3.unfinished.pt")[1]
    assert unfinished["training"]["step"] == 3
    train.main(arguments(public, tmp_path, "--resume"))
    assert len(steps) == STEPS


@pytest.mark.parametrize("more, word", [
    (("--epochs", 8), "--epochs"), (("--max-grad-norm", 1), "--max-grad-norm"),
    (("--expected-batch", 12), "--expected-batch"), (("--noise-multiplicity", 2), "--noise-mult"),
    (("--accountant", "pld"), "--accountant"), (("--set", "unet.num_heads=4"), "unet.num_heads")])
def test_a_resumed_run_keeps_mechanism_and_model(public, broken_off, capsys, more, word):
    folder, steps = broken_off
    before = contents(folder)
    capsys.readouterr()
    assert word in refuse(capsys, train.main, arguments(public, folder, "--resume", *more))
    assert len(steps) == 6 and contents(folder) == before


def test_a_resumed_run_may_change_cost_and_place(public, broken_off):
    folder, _ = broken_off
    more = ("--resume", "--clipping", "vmap", "--physical-batch", 5, "--save-every", 3,
            "--guidance", 2, "--data-dir", "elsewhere")
    train.main(arguments(public, folder, *more))
    assert load_checkpoint(folder / "private-eps3.pt")[1]["ledger"][0]["steps"] == STEPS


def test_a_resumed_run_keeps_its_data(public, tmp_path, in_step, capsys):
    other = write_images(tmp_path / "other", [12, 12], seed=1)
    command = [*arguments(public, tmp_path / "out"), "--private-data", str(other)]
    in_step(3, crash)
    with pytest.raises(RuntimeError):
        train.main(command)
    (other / "b").rename(other / "c")
    capsys.readouterr()
    assert "the data have changed" in refuse(capsys, train.main, [*command, "--resume"])


def test_an_unfinished_file_that_would_overspend_is_refused(public, broken_off, capsys):
    folder, steps = broken_off
    path = folder / "private-eps3.unfinished.pt"
    content = torch.load(path, weights_only=True)
    content["plan"]["steps"] += 1
    torch.save(content, path)
    capsys.readouterr()
    message = refuse(capsys, train.main, arguments(public, folder, "--resume"))
    assert "past the budget of 3" in message and len(steps) == 6


def test_an_unfinished_run_is_neither_forgotten_nor_overwritten(public, broken_off, capsys):
    folder, _ = broken_off
    capsys.readouterr()
    assert "--resume to go on" in refuse(capsys, train.main, arguments(public, folder))
    train.main(arguments(public, folder, "--overwrite"))
    assert not list(folder.glob("*unfinished*"))
    capsys.readouterr()
    train.main(arguments(public, folder, "--resume"))
    assert "complete" in capsys.readouterr().out


def test_resume_begins_where_nothing_was_begun(public, tmp_path):
    train.main(arguments(public, tmp_path, "--resume", "--epochs", 1))
    assert load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"][0]["steps"] == 3


def test_a_killed_run_ends_with_the_planned_ledger(public, tmp_path):
    """benchmarks/kill.py does the same with 20 kills."""
    command = [sys.executable, "train.py", *arguments(public, tmp_path, "--resume")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (tmp_path / "private-eps3.unfinished.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    train.main(arguments(public, tmp_path, "--resume"))
    model, metadata = load_checkpoint(tmp_path / "private-eps3.pt")
    assert [entry["steps"] for entry in metadata["ledger"]] == [STEPS]
    assert spent_epsilon(metadata["ledger"], 1e-5) <= 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_diverged_run_keeps_its_last_checkpoint(public, tmp_path, monkeypatch):
    calls = []

    def poisoned(model, parameters, batch, C):
        calls.append(1)
        value = float("nan") if len(calls) == 4 else 0.0
        return {name: torch.full_like(p, value) for name, p in parameters.items()}

    monkeypatch.setitem(train.ENGINES, "ghost", poisoned)
    more = ("--physical-batch", 64, "--expected-batch", 24, "--epochs", 12)   # no batch is empty
    with pytest.raises(ValueError, match="not finite"):
        train.main(arguments(public, tmp_path, *more))
    model, metadata = load_checkpoint(tmp_path / "private-eps3.unfinished.pt")
    assert metadata["training"]["step"] == 2 and all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_not_finite_are_not_saved(public, tmp_path, monkeypatch):
    monkeypatch.setattr(EMA, "update", lambda self, parameters: [
        p.fill_(np.nan) for p in self.shadow.values()])
    with pytest.raises(ValueError, match="training has diverged"):
        train.main(arguments(public, tmp_path, "--save-every", 99))
    assert not (tmp_path / "private-eps3.pt").exists()


def test_nothing_is_overwritten_unless_asked_for(public, private, capsys):
    before = contents(private.parent)
    for more in ([], ["--stage", "public"]):
        command = arguments(public, private.parent, *more)
        assert "--overwrite" in refuse(capsys, train.main, command)
    assert contents(private.parent) == before


# ---- nothing else leaks ------------------------------------------------------------------------

def everything_written(folder: Path) -> dict:
    """Every file's content; of checkpoints what they hold, since a zip's bytes may differ."""
    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {path.name: plain(torch.load(path, weights_only=True)) if path.suffix == ".pt"
            else path.read_bytes() for path in folder.iterdir()}


def test_without_gradients_private_data_changes_no_file(public, tmp_path, monkeypatch, capsys):
    """All that a run writes or prints follows from the noisy gradients, here noise alone."""
    monkeypatch.setitem(train.ENGINES, "ghost", lambda model, parameters, batch, C: {
        name: torch.zeros_like(p) for name, p in parameters.items()})
    written, printed = [], []
    for seed, per_class in ((1, [12, 12]), (2, [3, 21])):   # other images and counts, the same N
        write_images(tmp_path / "images", per_class, seed)
        capsys.readouterr()
        train.main(arguments(public, tmp_path / "out", "--private-data", tmp_path / "images",
                             "--insecure-noise-seed", 7))
        sample.main([str(tmp_path / "out/private-eps3.pt"), "--npz", str(tmp_path / "out/s.npz"),
                     "--count", "20", "--steps", "2"])
        printed.append(capsys.readouterr().out)
        written.append(everything_written(tmp_path / "out"))
        for name in ("images", "out"):
            (tmp_path / name).rename(tmp_path / f"{name}-{seed}")
    assert len(written[0]) == 4 and written[0] == written[1]
    assert printed[0] == printed[1]


def test_private_runs_with_one_seed_differ(public, tmp_path):
    for name in ("one", "other"):
        train.main(arguments(public, tmp_path / name, "--seed", 3))
    one, other = (load_checkpoint(tmp_path / name / "private-eps3.pt")[0].state_dict()
                  for name in ("one", "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_insecure_noise_is_repeatable_loud_and_on_record(public, tmp_path, capsys):
    for name in ("one", "other"):
        train.main(arguments(public, tmp_path / name, "--insecure-noise-seed", 7))
    assert "THIS RUN IS NOT PRIVATE" in capsys.readouterr().out
    one, other = (load_checkpoint(tmp_path / name / "private-eps3.pt")[0].state_dict()
                  for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    report = json.loads((tmp_path / "one/private-eps3.privacy.json").read_text())
    assert report["guarantee"].startswith("NONE")
    assert report["ledger"][0]["insecure_noise_seed"] == 7
    again = ("--public-checkpoint", tmp_path / "one/private-eps3.pt", "--eps", 6)
    train.main(arguments(public, tmp_path / "two", *again))
    assert "THIS RUN IS NOT PRIVATE" in capsys.readouterr().out


def test_a_run_on_captions_keeps_them_to_itself(public, tmp_path, capsys):
    folder = write_images(tmp_path / "images", [6, 6], seed=1)
    lines = [json.dumps({"file_name": f"{name}/{i}.png", "text": f"secret {name} {i}"})
             for name in "ab" for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    public_folder = write_images(tmp_path / "public", [4, 4], seed=2)
    (public_folder / "metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": f"{name}/{i}.png", "text": f"open {i}"})
        for name in "ab" for i in range(4)))
    command = ["--public-data", str(public_folder), "--private-data", str(folder), *FLAGS, "--out",
               str(tmp_path / "out"), "--set", "text.length=12", "--set", "text.layers=1"]
    train.main(command)
    printed = capsys.readouterr().out
    assert "secret" not in printed and not (tmp_path / "out/private-eps3.png").exists()
    content = torch.load(tmp_path / "out/private-eps3.pt", weights_only=True)
    assert not re.search("secret", repr({k: v for k, v in content.items() if k != "model"}))


# ---- privacy.json ------------------------------------------------------------------------------

@pytest.mark.parametrize("full", [True, False])
def test_a_privacy_json_is_never_another_checkpoints(public, private, tmp_path, monkeypatch, full):
    path, readable = tmp_path / "private-eps3.pt", tmp_path / "private-eps3.privacy.json"
    for source in (private, private.with_suffix(".privacy.json")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    before = readable.read_text()
    plan = dp_sgd.PrivacyPlan(10, 5, 2, 1.0, 0.1, 0.1)
    run = runs.PrivateRun(load_checkpoint(public / "public.pt")[0], plan, [], {})
    if full:   # the disk
        monkeypatch.setattr(torch, "save", lambda content, file: crash())
        with pytest.raises(RuntimeError):
            run.save(path, configure(), ["a"], 2)
        assert readable.read_text() == before
    else:
        run.save(path, configure(), ["a"], 2)
        assert json.loads(readable.read_text())["delta"] == 0.1
