"""The ledger of private steps: complete, recomputed, resumed exactly; and nothing else leaks from private data."""

import dataclasses
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
from PIL import Image
from test_cli import refuse

import accountant
import dp_sgd
import sample
import train
from config import one_line_errors
from ldm import EMA, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--vae-channels 8 --vae-mult 1 1 2 --latent-channels 4 --vae-steps 2 --vae-batch 4 --unet-channels 16 "
        "--unet-mult 1 --attention-resolutions 1 --num-heads 2 --context-dim 8 --public-steps 2 --public-batch 4 "
        "--image-size 8 --epochs 4 --expected-batch 8 --sample-steps 2 --device cpu --save-every 2 --eps 3").split()
STEPS = 12   # 4 epochs of 24 images, 8 expected in a batch


def write_images(folder: Path, per_class: list[int], seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in zip("ab", per_class, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A folder with images for both stages and a public model."""
    folder = tmp_path_factory.mktemp("public")
    write_images(folder / "public-images", [6, 6], seed=0)
    write_images(folder / "private-images", [12, 12], seed=1)
    train.main(["--stage", "public", "--out", str(folder), "--public-data", str(folder / "public-images"), *TINY])
    return folder


def arguments(public: Path, out: Path, *more) -> list[str]:
    return ["--public-checkpoint", str(public / "public.pt"), "--public-data", str(public / "public-images"),
            "--private-data", str(public / "private-images"), "--out", str(out), *TINY, *map(str, more)]


def run(public: Path, out: Path, *more) -> None:
    with one_line_errors():
        train.main(arguments(public, out, *more))


def refused(capsys, public: Path, out: Path, *more) -> str:
    capsys.readouterr()
    return refuse(capsys, train, arguments(public, out, *more))


@pytest.fixture
def interrupt(monkeypatch):
    """Make something happen in a chosen private step (counted from 1 over all runs of the test)."""
    calls, gradient = [], train.noisy_gradient

    def at(step: int, action) -> list:
        def noisy_gradient(*args):
            calls.append(args)
            if len(calls) == step:
                action()
            return gradient(*args)
        monkeypatch.setattr(train, "noisy_gradient", noisy_gradient)
        return calls
    return at


def crash():
    raise RuntimeError("power cut")


# ---- the ledger --------------------------------------------------------------------------------------

def test_a_checkpoint_carries_its_ledger_and_a_readable_copy_lies_beside_it(public, tmp_path, capsys):
    run(public, tmp_path)
    ledger = load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"]
    facts = json.loads((tmp_path / "private-eps3.privacy.json").read_text())
    assert facts["ledger"] == ledger and facts["checkpoint"] == "private-eps3.pt"
    (entry,) = ledger
    assert (entry["num_examples"], entry["expected_batch"], entry["steps"]) == (24, 8, STEPS)
    assert (entry["sample_rate"], entry["max_grad_norm"], entry["delta"]) == (8 / 24, 0.1, 1e-5)
    assert entry["neighbours"] == "one example added or removed"
    assert set(entry["versions"]) == {"python", "torch", "numpy", "scipy"}
    by_hand = accountant.epsilon(8 / 24, entry["noise_multiplier"], STEPS, 1e-5)
    assert facts["epsilon"]["rdp"] == pytest.approx(by_hand, rel=1e-9) and 2.99 < by_hand <= 3
    printed = capsys.readouterr().out
    for rule in accountant.ACCOUNTANTS:
        assert f"{facts['epsilon'][rule]:.4f} ({rule.upper()})" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"private-eps3.pt", "private-eps3.png", "private-eps3.privacy.json"}


def test_epsilon_is_recomputed_and_not_read(public, tmp_path, monkeypatch):
    run(public, tmp_path)
    content = torch.load(tmp_path / "private-eps3.pt", weights_only=True)
    assert not any("epsilon" in key for key in [*content, *content["ledger"][0], *content["plan"]])
    content["ledger"][0]["noise_multiplier"] *= 2
    torch.save(content, tmp_path / "quieter.pt")
    panels = []
    monkeypatch.setattr(sample.data, "save_grid", lambda path, p, caption="": panels.extend(p))
    sample.main([str(tmp_path / "private-eps3.pt"), str(tmp_path / "quieter.pt"), "--grid", "x.png", "--steps", "1"])
    shown = [float(title.removeprefix("eps = ")) for title, *_ in panels]
    assert shown[0] == 3 and shown[1] == pytest.approx(accountant.epsilon(
        8 / 24, content["ledger"][0]["noise_multiplier"], STEPS, 1e-5), rel=5e-3)


def test_budgets_of_two_private_runs_add_up(public, tmp_path, capsys):
    run(public, tmp_path)
    capsys.readouterr()
    more = ("--public-checkpoint", tmp_path / "private-eps3.pt", "--eps", 5)
    run(public, tmp_path, *more)
    printed = capsys.readouterr().out
    first, second = load_checkpoint(tmp_path / "private-eps5.pt")[1]["ledger"]
    assert first == load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"][0]
    total = accountant.epsilon_and_order(
        [(8 / 24, entry["noise_multiplier"], entry["steps"]) for entry in (first, second)], 1e-5)[0]
    assert 4.99 < total <= 5
    assert f"{total:.4f} at delta = 1e-05" in printed and re.search(r"(2.9999|3.0000) was spent before", printed)


def test_a_budget_that_is_spent_is_refused_with_what_remains(public, tmp_path, capsys):
    run(public, tmp_path)
    before = sorted(tmp_path.iterdir())
    for eps in (2, 2.9999):
        message = refused(capsys, public, tmp_path, "--public-checkpoint", tmp_path / "private-eps3.pt", "--eps", eps)
        assert "spent epsilon" in message and "epsilon 0 remains" in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_private_checkpoint_without_a_ledger_is_refused(public, tmp_path, capsys):
    content = torch.load(public / "public.pt", weights_only=True)
    torch.save({**content, "privacy": {"steps": 3}}, tmp_path / "old.pt")
    assert "has no ledger" in refused(capsys, public, tmp_path / "out", "--public-checkpoint", tmp_path / "old.pt")


def test_overspending_is_refused_with_what_remains():
    plan = dp_sgd.make_plan(1000, 50, 2.0, 1.0, 2.0, 1e-5)
    dp_sgd.refuse_overspending([], plan, 2.0)
    longer = dataclasses.replace(plan, steps=plan.steps + 1)
    with pytest.raises(ValueError, match=r"past the budget of 2, of which 2.0000 remains"):
        dp_sgd.refuse_overspending([], longer, 2.0)
    with pytest.raises(ValueError, match=r"past the budget of 2, of which 0.0000 remains"):
        dp_sgd.refuse_overspending([dp_sgd.ledger_entry(plan, plan.steps)], plan, 2.0)


# ---- stopped and taken up again ----------------------------------------------------------------------

def test_a_crashed_run_goes_on_to_exactly_the_planned_steps(public, tmp_path, interrupt, capsys):
    calls = interrupt(6, crash)
    with pytest.raises(RuntimeError):
        run(public, tmp_path)
    model, facts = load_checkpoint(tmp_path / "private-eps3.unfinished.pt")
    assert facts["ledger"][0]["steps"] == facts["training"]["steps"] == 4   # saved at 0, 2, 4: step 6 crashed
    partial = json.loads((tmp_path / "private-eps3.unfinished.privacy.json").read_text())
    assert partial["epsilon"]["rdp"] < 2.5
    run(public, tmp_path, "--resume")
    assert "going on with" in capsys.readouterr().out
    assert len(calls) == 6 + STEPS - 4
    ledger = load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"]
    assert [entry["steps"] for entry in ledger] == [STEPS]
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_resumed_run_equals_an_unbroken_one(public, tmp_path, monkeypatch):
    """Without noise and with every example in every batch, what is left of randomness is made a constant."""
    monkeypatch.setattr(train, "poisson_sample", lambda plan, rng: torch.arange(plan.num_examples))
    draws = train.noise_draws
    monkeypatch.setattr(train, "noise_draws", lambda *a: draws(*a[:5], np.random.default_rng(0), *a[6:]))
    plan = train.make_plan
    monkeypatch.setattr(train, "make_plan", lambda *a: dataclasses.replace(plan(*a), noise_multiplier=1e6))
    sums = dp_sgd.noisy_gradient
    monkeypatch.setattr(train, "noisy_gradient", lambda loss, p, b, plan, *a: sums(
        loss, p, b, dataclasses.replace(plan, noise_multiplier=0.0), *a))
    run(public, tmp_path / "whole")
    gradient, calls = train.noisy_gradient, []

    def stop_in_step_7(*a):
        calls.append(1)
        return crash() if len(calls) == 7 else gradient(*a)

    monkeypatch.setattr(train, "noisy_gradient", stop_in_step_7)
    with pytest.raises(RuntimeError):
        run(public, tmp_path / "broken")
    run(public, tmp_path / "broken", "--resume")
    one, other = (load_checkpoint(tmp_path / n / "private-eps3.pt")[0].state_dict() for n in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = load_checkpoint(public / "public.pt")[0].state_dict()
    assert any(not torch.equal(one[name], start[name]) for name in one if name.startswith("unet."))


def test_ctrl_c_ends_the_step_saves_and_says_how_to_resume(public, tmp_path, interrupt, capsys):
    calls = interrupt(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        run(public, tmp_path)
    assert stop.value.code == 130 and len(calls) == 3
    message = capsys.readouterr().err
    assert f"stopped after 3 of {STEPS} steps" in message and "--resume" in message
    assert load_checkpoint(tmp_path / "private-eps3.unfinished.pt")[1]["training"]["steps"] == 3
    run(public, tmp_path, "--resume")
    assert len(calls) == STEPS
    assert load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"][0]["steps"] == STEPS


def test_a_run_that_is_older_than_a_flag_can_be_resumed(public, tmp_path, interrupt):
    interrupt(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit):
        run(public, tmp_path)
    unfinished = tmp_path / "private-eps3.unfinished.pt"
    checkpoint = torch.load(unfinished, weights_only=True)
    del checkpoint["config"]["private_timesteps"]
    torch.save(checkpoint, unfinished)
    run(public, tmp_path, "--resume")
    assert load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"][0]["steps"] == STEPS


def test_a_clipped_sum_that_is_not_finite_stops_and_keeps_the_last_checkpoint(public, tmp_path, monkeypatch, capsys):
    clipped, calls = dp_sgd.clipped_gradient_sum, []

    def poisoned(*a):
        calls.append(1)
        total = clipped(*a)
        return {n: s * float("nan") for n, s in total.items()} if len(calls) == 4 else total

    monkeypatch.setattr(dp_sgd, "clipped_gradient_sum", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(public, tmp_path)
    assert stop.value.code == 2 and len(calls) == 4
    assert "not finite" in capsys.readouterr().err
    model, facts = load_checkpoint(tmp_path / "private-eps3.unfinished.pt")
    assert facts["training"]["steps"] == 2 and all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize("change, word", [(("--epochs", 8), "--epochs"), (("--max-grad-norm", 1), "--max-grad-norm"),
                                          (("--expected-batch", 12), "--expected-batch")])
def test_steps_beyond_the_plan_are_refused_before_they_run(public, tmp_path, interrupt, capsys, change, word):
    calls = interrupt(5, crash)
    with pytest.raises(RuntimeError):
        run(public, tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert word in refused(capsys, public, tmp_path, "--resume", *change)
    assert len(calls) == 5 and files == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_an_unfinished_file_that_would_overspend_is_refused(public, tmp_path, interrupt, capsys):
    calls = interrupt(5, crash)
    with pytest.raises(RuntimeError):
        run(public, tmp_path)
    path = tmp_path / "private-eps3.unfinished.pt"
    content = torch.load(path, weights_only=True)
    content["plan"]["steps"] += 1
    torch.save(content, path)
    assert "past the budget of 3" in refused(capsys, public, tmp_path, "--resume") and len(calls) == 5


def test_an_unfinished_run_is_neither_forgotten_nor_overwritten(public, tmp_path, interrupt, capsys):
    interrupt(1, crash)
    with pytest.raises(RuntimeError):
        run(public, tmp_path)
    assert "--resume to go on" in refused(capsys, public, tmp_path)
    run(public, tmp_path, "--overwrite")
    assert "private-eps3.unfinished.pt" not in {p.name for p in tmp_path.iterdir()}
    capsys.readouterr()
    run(public, tmp_path, "--resume")
    assert "complete" in capsys.readouterr().out


def test_resume_starts_where_nothing_was_begun(public, tmp_path):
    run(public, tmp_path, "--resume")
    assert load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"][0]["steps"] == STEPS


def test_a_run_killed_at_random_moments_ends_with_the_planned_ledger(public, tmp_path):
    """benchmarks/kill.py does the same with 20 kills."""
    command = [sys.executable, "train.py", *arguments(public, tmp_path, "--epochs", 20, "--save-every", 3, "--resume")]
    rng = np.random.default_rng()
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 30
        while not (tmp_path / "private-eps3.unfinished.pt").exists() and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    model, facts = load_checkpoint(tmp_path / "private-eps3.pt")
    assert [e["steps"] for e in facts["ledger"]] == [60] and dp_sgd.spent_epsilon(facts["ledger"], 1e-5) <= 3
    assert all(v.isfinite().all() for v in model.state_dict().values())


# ---- nothing else leaks ------------------------------------------------------------------------------

def everything_written(folder: Path) -> dict:
    """Every file's content; of checkpoints what they hold, since a zip's bytes may differ."""
    def flat(value):
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else \
            {k: flat(v) for k, v in value.items()} if isinstance(value, dict) else value
    return {p.name: flat(torch.load(p, weights_only=True)) if p.suffix == ".pt" else p.read_bytes()
            for p in folder.iterdir()}


def test_without_gradients_private_data_changes_no_file(public, tmp_path, monkeypatch, capsys):
    """All that a run writes or prints follows from the noisy gradients: take them away, and it is constant."""
    monkeypatch.setattr(train, "noisy_gradient", lambda loss, parameters, *a: {
        n: torch.zeros_like(p) for n, p in parameters.items()})
    written, printed = [], []
    for seed, per_class in ((1, [12, 12]), (2, [3, 21])):   # other images, other label counts, the same N
        images = write_images(tmp_path / str(seed) / "images", per_class, seed)
        images.rename(tmp_path / "images")
        capsys.readouterr()
        run(public, tmp_path / "out", "--private-data", tmp_path / "images")
        sample.main([str(tmp_path / "out/private-eps3.pt"), "--npz", str(tmp_path / "out/s.npz"), "--count", "20",
                     "--steps", "2"])
        printed.append(capsys.readouterr().out)
        written.append(everything_written(tmp_path / "out"))
        (tmp_path / "images").rename(tmp_path / str(seed) / "used")
        (tmp_path / "out").rename(tmp_path / str(seed) / "out")
    assert len(written[0]) == 4 and written[0] == written[1]
    assert printed[0] == printed[1]


def test_a_private_run_prints_no_loss_and_no_label_counts(public, tmp_path, capfd):
    run(public, tmp_path)
    out, err = capfd.readouterr()
    assert not re.search(r"loss", out + err)


def test_insecure_noise_is_reproducible_loud_and_on_record(public, tmp_path, capsys):
    for name in ("one", "other"):
        run(public, tmp_path / name, "--insecure-noise-seed", 7)
    assert "THIS RUN IS NOT PRIVATE" in capsys.readouterr().out
    one, other = (load_checkpoint(tmp_path / n / "private-eps3.pt")[0].state_dict() for n in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    facts = json.loads((tmp_path / "one/private-eps3.privacy.json").read_text())
    assert facts["guarantee"].startswith("NONE") and facts["ledger"][0]["insecure_noise_seed"] == 7


def test_seeded_noise_is_remembered_by_what_is_made_of_it(public, tmp_path, capsys):
    run(public, tmp_path / "one", "--insecure-noise-seed", 7)
    seeded, samples = tmp_path / "one/private-eps3.pt", tmp_path / "s.npz"
    sample.main([str(seeded), "--npz", str(samples), "--count", "10"])
    with np.load(samples) as arrays:
        assert json.loads(str(arrays["origin"]))["epsilon"] == float("inf")
    capsys.readouterr()
    train.main([*arguments(public, tmp_path / "two", "--eps", 6), "--public-checkpoint", str(seeded)])
    assert "THIS RUN IS NOT PRIVATE" in capsys.readouterr().out


@pytest.mark.parametrize("full", ["the disk", "nothing"])
def test_the_readable_ledger_is_never_that_of_another_checkpoint(public, tmp_path, monkeypatch, full):
    run(public, tmp_path)
    readable, before = tmp_path / "private-eps3.privacy.json", (tmp_path / "private-eps3.privacy.json").read_text()
    model = load_checkpoint(public / "public.pt")[0]
    if full == "the disk":
        monkeypatch.setattr(torch, "save", lambda content, file: crash())
        with pytest.raises(RuntimeError):
            train.save_private(tmp_path / "private-eps3.pt", model, [], {"delta": 0.1})
        assert readable.read_text() == before
    else:
        train.save_private(tmp_path / "private-eps3.pt", model, [], {"delta": 0.1})
        assert json.loads(readable.read_text())["delta"] == 0.1


def test_an_interrupted_run_does_not_go_on_with_other_classes(public, tmp_path, interrupt):
    interrupt(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    other = write_images(tmp_path / "other", [12, 12], seed=1)
    command = [*arguments(public, tmp_path / "out"), "--private-data", str(other)]
    with pytest.raises(SystemExit), one_line_errors():
        train.main(command)
    (other / "b").rename(other / "c")
    with pytest.raises(ValueError, match="the data have changed"):
        train.main([*command, "--resume"])


def test_weights_that_are_not_finite_are_not_saved(public, tmp_path, monkeypatch):
    monkeypatch.setattr(EMA, "update", lambda self, parameters: [p.fill_(np.nan) for p in self.shadow.values()])
    with pytest.raises(ValueError, match="training has diverged"):
        train.main(arguments(public, tmp_path))
    assert not (tmp_path / "private-eps3.pt").exists()


def test_the_private_images_are_not_public_by_another_path(public, tmp_path, capsys):
    detour = public / "private-images/../private-images"
    command = [*arguments(public, tmp_path), "--public-data"]
    assert "they must differ" in refuse(capsys, train, [*command, detour])
    assert "they must differ" in refuse(capsys, train, ["--public-data", "celeba", "--private-data", "celeba:Smiling"])


def test_private_runs_with_one_seed_have_other_noise_and_other_batches(public, tmp_path, interrupt):
    calls = interrupt(-1, None)
    for name in ("one", "other"):
        run(public, tmp_path / name, "--seed", 3)
    sizes = [len(args[2][0]) for args in calls]
    assert sizes[:STEPS] != sizes[STEPS:]   # chance of equality about 1e-9
    one, other = (load_checkpoint(tmp_path / n / "private-eps3.pt")[0].state_dict() for n in ("one", "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_chunk_size_changes_neither_epsilon_nor_the_update(public, tmp_path):
    results = []
    for chunk in (1, 3, 64, "auto"):
        run(public, tmp_path / str(chunk), "--chunk", chunk, "--epochs", 1, "--insecure-noise-seed", 7)
        results.append(load_checkpoint(tmp_path / str(chunk) / "private-eps3.pt"))
    for model, facts in results[1:]:
        assert facts["ledger"] == results[0][1]["ledger"]
        for (name, one), other in zip(results[0][0].state_dict().items(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


def test_average_and_learning_rate_count_logical_steps(public, tmp_path, monkeypatch):
    """Whatever the chunks, and though some batches are empty."""
    updates, rates, update, rate = [], [], EMA.update, train.lr_at
    monkeypatch.setattr(EMA, "update", lambda self, p: (update(self, p), updates.append(self.step))[0])
    monkeypatch.setattr(train, "lr_at", lambda step, steps: (rates.append((step, steps)), rate(step, steps))[1])
    sampled = train.poisson_sample
    monkeypatch.setattr(train, "poisson_sample", lambda plan, rng: sampled(plan, rng)[:0 if len(rates) % 2 else None])
    run(public, tmp_path, "--chunk", 3)
    assert updates == list(range(1, STEPS + 1))
    assert rates == [(step, STEPS) for step in range(STEPS)]


def test_sampled_labels_do_not_follow_private_counts(public, tmp_path):
    write_images(tmp_path / "skewed", [22, 2], seed=4)
    run(public, tmp_path / "out", "--private-data", tmp_path / "skewed")
    sample.main([str(tmp_path / "out/private-eps3.pt"), "--npz", str(tmp_path / "s.npz"), "--count", "20",
                 "--steps", "1"])
    with np.load(tmp_path / "s.npz") as arrays:
        assert np.bincount(arrays["labels"]).tolist() == [10, 10]


# ---- the tighter accountant --------------------------------------------------------------------------

def test_pld_needs_less_noise_for_the_same_budget(public, tmp_path, capsys):
    run(public, tmp_path, "--accountant", "pld")
    (entry,) = load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"]
    segments = [(8 / 24, entry["noise_multiplier"], STEPS)]
    assert 2.99 < accountant.epsilon_bounds(segments, 1e-5)[1] <= 3 < accountant.epsilon_and_order(segments, 1e-5)[0]
    printed = capsys.readouterr().out
    assert re.search(r"spends epsilon = (2.9999|3.0000) at delta = 1e-05 \(PLD\)", printed)
    assert re.search(r"spent epsilon = 3\.\d+ \(RDP\), (2.9999|3.0000) \(PLD\)", printed)


@pytest.mark.parametrize("rule", accountant.ACCOUNTANTS)
def test_noise_is_calibrated_to_what_earlier_steps_have_left(rule):
    spent = [(0.01, 1.5, 200), (0.1, 8.0, 50)]
    sigma = accountant.calibrate_noise(2.0, 1e-5, 0.02, 300, rule, spent=spent)

    def total(sigma):
        segments = [*spent, (0.02, sigma, 300)]
        return (accountant.epsilon_and_order(segments, 1e-5)[0] if rule == "rdp" else
                accountant.epsilon_bounds(segments, 1e-5)[1])

    assert total(sigma) <= 2.0 < total(0.999 * sigma)
    assert sigma > accountant.calibrate_noise(2.0, 1e-5, 0.02, 300, rule)


def test_where_pld_does_not_reach_rdp_is_reported_alone():
    ledger = [dp_sgd.ledger_entry(dp_sgd.PrivacyPlan(1000, 10, 5, 0.05, 1.0, 1e-5), 5)]
    assert set(dp_sgd.all_epsilons(ledger, 1e-5)) == {"rdp"}
