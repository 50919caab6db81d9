"""The ledger of private steps: complete, added up, recomputed, never overspent."""

import dataclasses
import json

import pytest
import torch

import accountant
import sample
import train
from accountant import in_words
from dp_sgd import PrivacyPlan, make_plan
from runtime import ledger
from runtime.checkpoints import load_checkpoint
from runtime.files import read_arrays
from tiny import arguments, refuse
from variants import pld

PLAN = PrivacyPlan(1_000, 20, 300, 1.5, 0.1, 1e-5)
OTHER = PrivacyPlan(500, 50, 50, 8.0, 2.0, 1e-6)


# ---- entries -----------------------------------------------------------------------------------

def test_an_entry_holds_the_plan_and_the_steps_made():
    entry = ledger.ledger_entry(PLAN, 7)
    assert entry.items() >= {**dataclasses.asdict(PLAN), "steps": 7, "sample_rate": 0.02}.items()
    assert entry["neighbours"] == "one example added or removed"
    assert set(entry["versions"]) == {"python", "torch", "numpy", "scipy"}
    assert json.loads(json.dumps(entry)) == entry   # plain values


def test_a_seed_of_the_noise_is_on_record():
    honest, seeded = ledger.ledger_entry(PLAN, 7), ledger.ledger_entry(PLAN, 7, 0)
    assert seeded == {**honest, "insecure_noise_seed": 0}
    assert ledger.is_seeded([honest, seeded, honest]) and not ledger.is_seeded([honest, honest])


def test_segments_are_what_the_accountant_composes():
    entries = [ledger.ledger_entry(PLAN, 7), ledger.ledger_entry(OTHER, 50),
               ledger.ledger_entry(PLAN, 300)]
    assert ledger.segments(entries) == [(0.02, 1.5, 7), (0.1, 8.0, 50), (0.02, 1.5, 300)]


@pytest.mark.parametrize("name, module", [("rdp", accountant), ("pld", pld)])
def test_budgets_of_several_runs_add_up(name, module):
    entries = [ledger.ledger_entry(PLAN, 300), ledger.ledger_entry(OTHER, 50)]
    spent = ledger.spent_epsilon(entries, 1e-5, name)
    assert spent == module.total_epsilon([(0.02, 1.5, 300), (0.1, 8.0, 50)], 1e-5)
    assert spent > max(ledger.spent_epsilon([entry], 1e-5, name) for entry in entries)
    assert ledger.all_epsilons(entries, 1e-5)[name] == spent


def test_where_pld_does_not_reach_rdp_stands_alone():
    entries = [ledger.ledger_entry(PrivacyPlan(1_000, 10, 5, 0.05, 1.0, 1e-5), 5)]
    assert set(ledger.all_epsilons(entries, 1e-5)) == {"rdp"}


# ---- the budget --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ledger.ACCOUNTANTS)
def test_overspending_is_refused_with_what_remains(name):
    plan = make_plan(1_000, 50, 2.0, 1.0, 2.0, 1e-5, ledger.ACCOUNTANTS[name])
    assert 1.998 < ledger.check_overspending([], plan, 2.0, name) <= 2
    longer = dataclasses.replace(plan, steps=plan.steps + 1)
    with pytest.raises(ValueError, match="past the budget of 2, of which 2 remains"):
        ledger.check_overspending([], longer, 2.0, name)
    before = ledger.ledger_entry(plan, plan.steps)
    with pytest.raises(ValueError, match=r"past the budget of 2, of which (0|0\.00\d+) remains"):
        ledger.check_overspending([before], plan, 2.0, name)


@pytest.mark.parametrize("name", ledger.ACCOUNTANTS)
def test_a_second_plan_spends_what_remains(name):
    module, first = ledger.ACCOUNTANTS[name], ledger.ledger_entry(PLAN, 300)
    budget = ledger.spent_epsilon([first], 1e-5, name) + 1
    plan = make_plan(500, 50, 1.0, 1.0, budget, 1e-5, module, ledger.segments([first]))
    spent = ledger.check_overspending([first], plan, budget, name)
    assert 0.999 * budget < spent <= budget
    assert ledger.spent_epsilon([ledger.ledger_entry(plan, plan.steps)], 1e-5, name) < budget


# ---- the readable copy -------------------------------------------------------------------------

def test_the_readable_copy_lies_beside_its_checkpoint(tmp_path):
    path = tmp_path / "private-eps0.2.pt"
    entries = [ledger.ledger_entry(PLAN, 300)]
    ledger.write_privacy_json(path, entries, 1e-4)
    [written] = tmp_path.iterdir()
    assert written.name == "private-eps0.2.privacy.json"
    report = json.loads(written.read_text())
    assert report == {
        "delta": 1e-4, "ledger": entries,
        "guarantee": "(epsilon, delta)-differential privacy; neighbours: one example added or "
                     "removed",
        "epsilon": {"rdp": accountant.total_epsilon([(0.02, 1.5, 300)], 1e-4),
                    "pld": pld.total_epsilon([(0.02, 1.5, 300)], 1e-4)}}


def test_seeded_noise_guarantees_nothing(tmp_path):
    entries = [ledger.ledger_entry(PLAN, 300, 5), ledger.ledger_entry(PLAN, 300)]
    ledger.write_privacy_json(tmp_path / "a.pt", entries, 1e-5)
    report = json.loads((tmp_path / "a.privacy.json").read_text())
    assert report["guarantee"].startswith("NONE: the noise follows from a seed")


def test_an_infinite_epsilon_is_valid_json(tmp_path):
    entries = [ledger.ledger_entry(dataclasses.replace(PLAN, noise_multiplier=1e-200), 300)]
    ledger.write_privacy_json(tmp_path / "a.pt", entries, 1e-5)
    report = json.loads((tmp_path / "a.privacy.json").read_text(), parse_constant=pytest.fail)
    assert report["epsilon"] == {"rdp": "Infinity"}


# ---- in a run ----------------------------------------------------------------------------------

def test_a_checkpoint_carries_its_ledger(private):
    content = torch.load(private, weights_only=True)
    report = json.loads(private.with_suffix(".privacy.json").read_text())
    assert report["ledger"] == content["ledger"]
    [entry] = content["ledger"]
    assert (entry["num_examples"], entry["expected_batch"], entry["steps"]) == (24, 8, 12)
    assert (entry["max_grad_norm"], entry["delta"]) == (0.1, 1e-5)
    assert not any("epsilon" in key for key in [*content, *entry, *content["plan"]])


def test_epsilon_is_recomputed_and_not_read(private, tmp_path, monkeypatch):
    content = torch.load(private, weights_only=True)
    content["ledger"][0]["noise_multiplier"] *= 2
    torch.save(content, tmp_path / "quieter.pt")
    panels = []
    monkeypatch.setattr(sample, "save_grid", lambda path, drawn, text: panels.extend(drawn))
    sample.main([str(private), str(tmp_path / "quieter.pt"), "--grid", "x.png", "--steps", "1",
                 "--columns", "1"])
    shown = [float(title.removeprefix("eps = ")) for title, *_ in panels]
    sigma = content["ledger"][0]["noise_multiplier"]
    assert shown == pytest.approx([3, accountant.epsilon(8 / 24, sigma, 12, 1e-5)], rel=5e-3)


def power_cut() -> None:
    raise RuntimeError


def test_a_third_run_tells_of_all_three(public, private, tmp_path, in_step, capsys):
    """Though later ones are interrupted, and their flags name other public data."""
    last, entries = private, load_checkpoint(private)[1]["ledger"]
    for eps in (4, 5):
        command = arguments(public, tmp_path, "--public-checkpoint", last, "--eps", eps, "--epochs",
                            1, "--public-data", "letters")
        in_step(3, power_cut)
        with pytest.raises(RuntimeError):
            train.main(command)
        [*before, own] = load_checkpoint(tmp_path / f"private-eps{eps}.unfinished.pt")[1]["ledger"]
        assert before == entries and own["steps"] == 2
        train.main([*command, "--resume"])
        last = tmp_path / f"private-eps{eps}.pt"
        metadata = load_checkpoint(last)[1]
        [*before, own] = metadata["ledger"]
        assert before == entries and own["steps"] == 3
        entries = metadata["ledger"]
    assert metadata["public_config"] == load_checkpoint(private)[1]["public_config"]
    epsilons = ledger.all_epsilons(entries, 1e-5)
    report = json.loads(last.with_suffix(".privacy.json").read_text())
    assert (report["ledger"], report["epsilon"]) == (entries, epsilons)
    assert len(entries) == 3 and 4.995 < epsilons["rdp"] <= 5
    printed = capsys.readouterr().out
    assert printed.count("spends epsilon = 5 at delta = 1e-05") == 2
    assert printed.count("of that epsilon, 4 was spent before") == 2
    assert f"spent epsilon = 5 (RDP), {in_words(epsilons['pld'])} (PLD)" in printed
    sample.main([str(last), "--npz", str(tmp_path / "s.npz"), "--count", "2", "--steps", "1"])
    [origin] = read_arrays(tmp_path / "s.npz", ["origin"])
    assert json.loads(str(origin))["epsilon"] == epsilons["rdp"]


@pytest.mark.parametrize("eps", [2, 2.99])
def test_a_spent_budget_is_refused(public, private, tmp_path, capsys, eps):
    message = refuse(capsys, train.main, arguments(
        public, tmp_path, "--public-checkpoint", private, "--eps", eps))
    assert "spent epsilon" in message and "epsilon 0 remains" in message
    assert not list(tmp_path.iterdir())


def test_pld_needs_less_noise_for_the_same_budget(public, private, tmp_path, capsys):
    train.main(arguments(public, tmp_path, "--accountant", "pld", "--save-every", 99))
    entries = load_checkpoint(tmp_path / "private-eps3.pt")[1]["ledger"]
    rdp = load_checkpoint(private)[1]["ledger"]
    assert entries[0]["noise_multiplier"] < rdp[0]["noise_multiplier"]
    epsilons = ledger.all_epsilons(entries, 1e-5)
    assert 2.99 < epsilons["pld"] <= 3 < epsilons["rdp"]
    printed = capsys.readouterr().out
    assert "spends epsilon = 3 at delta = 1e-05 (PLD)" in printed
    assert f"spent epsilon = {in_words(epsilons['rdp'])} (RDP), 3 (PLD)" in printed
