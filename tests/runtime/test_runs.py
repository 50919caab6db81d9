"""A private run: stopped, killed, taken up again; and nothing but noisy gradients leaves it."""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

import dp_sgd
import sample
import train
from accountant import in_words
from ldm import EMA
from runtime import engines, fingerprint, runs
from runtime.checkpoints import load_checkpoint
from runtime.cli import one_line_errors
from runtime.ledger import all_epsilons, spent_epsilon
from tiny import (
    FLAGS,
    arguments,
    configure,
    refuse,
    seed_everything,
    tiny_data,
    tiny_model,
    write_images,
)

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
    (("--accountant", "pld"), "--accountant"), (("--delta", 1e-4), "--delta"),
    (("--set", "unet.num_heads=4"), "unet.num_heads")])
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
    (other / "c").rename(other / "b")
    (other / "b/3.png").unlink()
    assert "24 examples" in refuse(capsys, train.main, [*command, "--resume"])


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


@pytest.mark.parametrize("lies_there, more, told", [
    ("nothing", [], "damaged or of another program"),
    ("public.pt", [], "no finished private run"),
    ("private-eps3.unfinished.pt", [], "no finished private run"),
    ("private-eps3.pt", ["--private-data", "digits"], "private-images, not digits"),
    ("private-eps3.pt", ["--epochs", 5], "was made with --epochs 4.0, not 5.0")])
def test_what_is_called_complete_was_looked_at(public, private, broken_off, tmp_path, capsys,
                                               lies_there, more, told):
    out = tmp_path / "another"
    out.mkdir()
    kept = {path.name: path.read_bytes() for folder in (public, private.parent, broken_off[0])
            for path in folder.glob("*.pt")}
    (out / "private-eps3.pt").write_bytes(kept.get(lies_there, b""))
    capsys.readouterr()
    assert told in refuse(capsys, train.main, arguments(public, out, "--resume", *more))
    assert contents(out) == {"private-eps3.pt": kept.get(lies_there, b"")}


def test_overwriting_is_more_than_resuming(public, private, tmp_path, monkeypatch, capsys):
    command = arguments(public, tmp_path, "--resume")
    (tmp_path / "private-eps3.pt").write_bytes(private.read_bytes())
    train.main(command)
    assert "private-eps3.pt is complete" in capsys.readouterr().out
    with open(os.devnull, "w") as silence:   # as torchrun's other processes speak
        monkeypatch.setattr(train.distributed, "process_group", lambda: redirect_stdout(silence))
        train.main(command)
    assert not capsys.readouterr().out
    monkeypatch.undo()
    train.main([*command, "--overwrite", "--epochs", "1"])
    assert "nothing to resume in" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"][0]["steps"] == 3


def test_resume_begins_where_nothing_was_begun(public, tmp_path, capsys):
    train.main(arguments(public, tmp_path, "--resume", "--epochs", 1))
    assert f"nothing to resume in {tmp_path}: a new run" in capsys.readouterr().out
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

    monkeypatch.setitem(engines.ENGINES, "ghost", poisoned)
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


@pytest.mark.parametrize("stage, steps, rate", [
    ("private", STEPS, "--private-lr"), ("public", 2, "public.lr"),
    ("public", 3, "autoencoder.lr")])
def test_networks_that_give_no_numbers_are_not_saved(public, tmp_path, monkeypatch, capsys, stage,
                                                     steps, rate):
    """A huge step leaves weights that are all finite."""
    monkeypatch.setattr(train, "lr_factor", lambda step, total: 1e20 if total == steps else 1.0)
    model = public / "public.pt" if stage == "private" else tmp_path / "public.pt"
    command = arguments(public, tmp_path, "--stage", stage, "--public-checkpoint", model,
                        "--save-every", 99, "--set", "autoencoder.steps=3")
    with pytest.raises(ValueError, match=f"nothing is saved: give a lower {rate}"):
        train.main(command)
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"public.pt", "private-eps3.pt"} and (rate == "public.lr") == (
        "autoencoder.pt" in left)


@pytest.mark.parametrize("name", ["unet.out.2.weight", "vae.post_quant_conv.weight",
                                  "embedder.embedding.weight", "latent_scale", "embedder.scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_each_part_of_a_model_must_be_finite(name, value):
    model = tiny_model().float()
    runs.check_finite(model, "--private-lr")
    model.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match="give a lower --private-lr"):
        runs.check_finite(model, "--private-lr")


def test_nothing_is_overwritten_unless_asked_for(public, private, capsys):
    before = contents(private.parent)
    for more in ([], ["--stage", "public"]):
        command = arguments(public, private.parent, *more)
        assert "--overwrite" in refuse(capsys, train.main, command)
    assert contents(private.parent) == before


# ---- the noise of whole runs --------------------------------------------------------------------

def no_gradients(model: object, parameters: dict, batch: tuple, C: float) -> dict:
    return {name: torch.zeros_like(p) for name, p in parameters.items()}


def test_every_step_s_noise_is_full_and_fresh(public, tmp_path, monkeypatch, in_step,
                                              optimizer_steps):
    """In 24 steps, and in the 5 that a crash made be repeated."""
    norms = []
    monkeypatch.setitem(engines.ENGINES, "ghost", lambda *a: norms.append(a[3]) or no_gradients(*a))
    command = arguments(public, tmp_path, "--epochs", 8, "--save-every", 10)
    in_step(16, crash)
    with pytest.raises(RuntimeError):
        train.main(command)
    del optimizer_steps[15:]   # the step that was not made
    train.main([*command, "--resume"])
    plan = dp_sgd.PrivacyPlan(**load_checkpoint(tmp_path / "private-eps3.pt")[1]["plan"])
    noise = torch.stack([torch.cat([g.flatten() for g in step]) for step in optimizer_steps])
    assert len(noise) == 15 + 24 - 10 and noise.shape[1] > 1_000
    noise = noise.double() * plan.expected_batch / plan.noise_multiplier   # N(0, 1) each
    errors = noise @ noise.T / noise.shape[1] - torch.eye(len(noise))
    assert errors.abs().max() < 6 * math.sqrt(2 / noise.shape[1])   # that is six deviations
    assert max(norms) <= plan.max_grad_norm and min(norms) > 0.9999 * plan.max_grad_norm


@pytest.mark.parametrize("resumed", [False, True])
def test_private_runs_with_one_seed_differ(public, broken_off, resumed):
    found, left = [], contents(broken_off[0]) if resumed else {}
    for name in ("one", "other"):
        folder = broken_off[0] / name
        folder.mkdir()
        for file, content in left.items():
            (folder / file).write_bytes(content)
        seed_everything()
        train.main(arguments(public, folder, "--resume", "--seed", 0))
        found.append(load_checkpoint(folder / "private-eps3.pt")[0].state_dict())
    assert any(not torch.equal(found[0][name], p) for name, p in found[1].items())


# ---- nothing else leaks ------------------------------------------------------------------------

def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of all that is inside dictionaries and lists; tensors as their bytes."""
    if isinstance(value, dict | list | tuple):
        yield name, len(value)
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key}")
    elif isinstance(value, torch.Tensor):
        yield name, (value.dtype, value.numpy().tobytes())
    else:
        yield name, value


def differences(one: object, other: object) -> list[str]:
    """Where the two differ."""
    one, other = dict(leaves(one)), dict(leaves(other))
    return [name for name in one | other if one.get(name, ...) != other.get(name, ...)]


def files_in(folder: Path) -> dict:
    """Every file's content; of checkpoints what they hold, since a zip's bytes may differ."""
    return {path.name: torch.load(path, weights_only=True) if path.suffix == ".pt"
            else path.read_bytes() for path in folder.iterdir()}


def without_times(text: str) -> list[str]:
    """The lines, and all states of progress bars."""
    return [re.sub(r"\[[^,\]]*<[^,\]]*,[^,\]]*", "[", line).rstrip()
            for line in re.split(r"[\r\n]+", text)]


@pytest.fixture
def course(public, tmp_path, monkeypatch, capsys, in_step) -> Callable:
    """course(pixels, label, *more, **parts): all that a run writes and prints.

    The last of its 24 examples is of this grey and label; others have the labels 0 and 1 of three.
    The run crashes in its 6th step and is taken up again. parts: drop-ins in train_private.
    """
    load_images, train_private = train.load_images, train.train_private
    monkeypatch.setattr(fingerprint.secrets, "token_hex", "{:064}".format)   # no name is random
    # Every state of a bar is printed.
    monkeypatch.setattr(train, "trange", functools.partial(train.trange, mininterval=0))
    monkeypatch.setattr(sample, "tqdm", functools.partial(sample.tqdm, mininterval=0))

    def follow(pixels: int, label: int, *more: object, **parts: Callable) -> dict:
        def load(*source: object) -> object:
            dataset = load_images(*source)
            dataset.images[23], dataset.labels[23] = pixels, label
            dataset.classes.append("c")
            return dataset

        monkeypatch.setattr(train, "load_images", load)
        monkeypatch.setattr(train, "train_private", lambda *values, **others: train_private(
            *values, **others | parts))
        out = tmp_path / "out"
        command = arguments(public, out, *more)
        in_step(6, crash)
        capsys.readouterr()
        with pytest.raises(RuntimeError):
            train.main(command)
        found = dict(unfinished=files_in(out))
        train.main([*command, "--resume"])
        sample.main([str(out / "private-eps3.pt"), "--npz", str(out / "s.npz"), "--count", "20",
                     "--steps", "2"])
        found |= dict(finished=files_in(out), printed=without_times("\n".join(capsys.readouterr())))
        assert len(found["unfinished"]) == 2 and len(found["finished"]) == 4
        assert sum("private: " in line for line in found["printed"]) > STEPS
        shutil.rmtree(out)
        return found

    return follow


def test_an_example_changes_its_own_gradients_only(course, monkeypatch):
    """One of 24 is replaced. Every gradient is zero, and the noise is the same."""
    found, rows = [], []

    def watch(model, parameters, batch, C):
        state = dict(model=model.state_dict(), parameters=parameters, C=C)
        of_run, states = rows[-1]
        of_run += zip(*batch, strict=True)   # z_0, t, eps and condition of each example
        states.append(dict(leaves(state)))
        return no_gradients(model, parameters, batch, C)

    monkeypatch.setitem(engines.ENGINES, "ghost", watch)
    for pixels, label in ((255, 2), (0, 0)):   # the only one of its class, or one of many
        rows.append(([], []))
        found.append(course(pixels, label, "--insecure-noise-seed", 7))
    assert differences(*found) == []
    (one, states), (other, other_states) = rows
    assert differences(states, other_states) == []
    changed = [k for k, pair in enumerate(zip(one, other, strict=True)) if differences(*pair)]
    assert all(differences(one[k][1:3], other[k][1:3]) == [] for k in changed)   # t, eps
    assert changed and len({one[k][0].numpy().tobytes() for k in changed}) == 1


def test_the_size_of_a_batch_changes_nothing(course, monkeypatch):
    """Every gradient is zero, and the noise is the same whatever was drawn before it."""
    monkeypatch.setitem(engines.ENGINES, "ghost", no_gradients)

    def of_sizes(seed: int) -> dict:
        sizes, noise = np.random.default_rng(seed), np.random.default_rng(0)
        # The average starts with smaller decays than its own: this one is small enough to matter.
        return course(0, 0, "--set", "diffusion.ema_decay=0.3",
                      sample=lambda plan, rng: torch.arange(sizes.integers(25)),
                      add_noise=lambda total, plan, rng: dp_sgd.add_noise(total, plan, noise))

    assert differences(of_sizes(1), of_sizes(2)) == []


def test_only_weights_depend_on_data_and_noise(public, course):
    """No other number in a checkpoint does, and nothing that is printed."""
    names = dp_sgd.private_parameter_names(load_checkpoint(public / "public.pt")[0])
    tensors = "model", "training/parameters", "training/ema"
    allowed = {f"{tensor}/{name}" for tensor in tensors for name in names} | {
        f"training/optimizer/state/{k}/{moment}" for k in range(len(names))
        for moment in ("exp_avg", "exp_avg_sq")}
    found = differences(course(255, 2), course(0, 0))
    samples = {"/finished/private-eps3.png", "/finished/s.npz"}
    assert {name.partition(".pt/")[2] or name for name in found} - samples == allowed


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


def test_a_privacy_json_comes_before_its_checkpoint(public, tmp_path, monkeypatch):
    """A crash between the two leaves no weights whose spending is not on record."""
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: replaced.append(
        target.name) or replace(source, target))
    plan = dp_sgd.PrivacyPlan(10, 5, 2, 1.0, 0.1, 0.1)
    run = runs.PrivateRun(load_checkpoint(public / "public.pt")[0], plan, [], {})
    run.save(tmp_path / "mine.pt", configure(), ["a"], 2)
    assert replaced == ["mine.privacy.json", "mine.pt"]


# ---- what is said ------------------------------------------------------------------------------

@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_what_is_said_is_computed_and_not_the_target(capsys, accountant):
    plan, before = dp_sgd.PrivacyPlan(1_000, 20, 300, 1.5, 0.1, 1e-4), [
        runs.ledger.ledger_entry(dp_sgd.PrivacyPlan(500, 50, 50, 8.0, 2.0, 1e-6), 50)]
    run = runs.PrivateRun(tiny_model(), plan, before, {"data": {"public": "letters"}})
    config = configure("private.epsilon=9", f"private.accountant={accountant}")
    runs.announce(run, config)
    runs.report(run, config, Path("mine.pt"))
    printed = capsys.readouterr().out
    spent = all_epsilons([*before, runs.ledger.ledger_entry(plan, 300)], 1e-4)
    assert f"spends epsilon = {in_words(spent[accountant])} at delta = 0.0001 (" in printed
    assert f"{in_words(all_epsilons(before, 1e-4)[accountant])} was spent before" in printed
    rdp, pld = (in_words(spent[name]) for name in ("rdp", "pld"))
    assert f"spent epsilon = {rdp} (RDP), {pld} (PLD) at delta = 0.0001: see mine" in printed
