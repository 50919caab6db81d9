"""The audit passes correct code and catches broken copies.

Statistical verdicts on correct code fail with probability 1e-6 or less.
"""

import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import audit
import train
from runtime import engines
from tiny import refuse
from variants import pld

ROOT = Path(__file__).resolve().parents[2]
PLAN = audit.CANARY_PLAN
MU = math.sqrt(PLAN.steps) / PLAN.noise_multiplier
CORRECT = ["correct code", "correct code, ghost engine"]
BROKEN = [name for name in audit.MECHANISMS if name not in CORRECT]
SURROUNDINGS = ["shuffling accounted as Poisson", "accountant fed the physical batch size",
                "a published seed"]


# ---- A and B -----------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=CORRECT)
def scores(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """(included [n], scores [T, n]) of correct code."""
    step = audit.MECHANISMS[request.param](audit.CHUNK)
    return audit.canary_scores(step, PLAN, 20, np.random.default_rng())


def test_correct_code_passes_a(scores):
    included, of_steps = scores
    for one_step in of_steps:
        gap, std, caught = audit.audit_scores(included, one_step, PLAN.noise_multiplier)
        assert not caught
        assert gap == pytest.approx(1, abs=0.2) and std == pytest.approx(2, rel=0.05)


def test_the_bound_of_correct_code_is_near_the_claim(scores):
    mu, caught = audit.audit_guesses(*scores, PLAN.noise_multiplier)
    assert not caught and 0.7 * MU <= mu <= MU


def test_the_scores_of_correct_code_are_independent_normal(scores):
    included, of_steps = scores
    noise = (of_steps - included) / PLAN.noise_multiplier
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-7
    for a, b in ((noise[0], noise[1]), (noise[:, 1:].flatten(), noise[:, :-1].flatten())):
        assert abs((a * b).sum()) < 6 * len(a) ** 0.5


def test_the_audit_calls_the_functions_that_training_calls():
    defaults = inspect.signature(train.train_private).parameters
    for step, engine in ((audit.correct(3), "vmap"), (audit.correct_ghost(3), "ghost")):
        assert step.sample is defaults["sample"].default
        assert step.add_noise is defaults["add_noise"].default
        inside = inspect.getclosurevars(step.clipped_sum).nonlocals
        assert inside == {"clipped_sum": engines.ENGINES[engine], "physical_batch": 3}


@pytest.mark.parametrize("name, audits", [
    ("no clipping", {"A", "B"}), ("noise halved", {"A", "B"}), ("noise once per chunk", {"A"}),
    ("clipping after averaging examples", {"A", "B", "divisor"}),
    ("embedder outside the joint norm", {"A", "B"}),
    ("divisor = actual batch size", {"divisor"})])
def test_every_broken_step_is_caught(name, audits):
    step = audit.MECHANISMS[name](audit.CHUNK)
    _, caught = audit.audit_mechanism(step, 10, np.random.default_rng())
    assert audits <= {verdict.split()[0] for verdict in caught}


def test_every_fault_around_the_step_is_caught():
    rows = audit.audit_surroundings(np.random.default_rng())
    assert [name for name, broken, *_ in rows if broken] == SURROUNDINGS and len(rows) == 6
    assert all(bool(caught) == broken for _, broken, _, caught in rows)


def test_the_divisor_of_correct_code_is_constant():
    step = audit.correct(audit.CHUNK)
    ratio, caught = audit.audit_divisor(step, PLAN, np.random.default_rng(0))
    assert ratio == pytest.approx(1, rel=1e-6) and not caught


# ---- C -----------------------------------------------------------------------------------------

def everyone(plan: object, rng: np.random.Generator) -> torch.Tensor:
    return torch.arange(audit.END_TO_END_PLAN.num_examples)


def test_the_neighbouring_run_never_draws_the_canary():
    world, seen = audit.tiny_world(np.random.default_rng(0)), []

    def record(model: object, parameters: dict, batch: tuple, C: float) -> dict:
        seen.append(batch[3][:, 0].tolist())   # one label per example, of its first draw
        return {name: torch.zeros_like(p) for name, p in parameters.items()}

    step = audit.Mechanism(record, add_noise=lambda total, plan, rng: total, sample=everyone)
    for canary_in in (False, True):   # nothing moves but by rounding, of the change of units
        assert abs(audit.end_to_end_score(step, world, canary_in)) < 1e-4
    assert seen == [[0] * 7] * 4 + [[0] * 7 + [1]] * 4   # label 1 is the canary's


def test_the_canary_moves_the_weights_without_noise():
    world = audit.tiny_world(np.random.default_rng(0))
    silent = audit.with_another_plan(lambda plan, B, chunk: replace(plan, noise_multiplier=0.0))
    step = replace(silent(audit.CHUNK), sample=everyone)
    without, with_canary = (audit.end_to_end_score(step, world, canary_in)
                            for canary_in in (False, True))
    assert abs(without) < 1e-4 < abs(with_canary)


@pytest.mark.parametrize("distance, caught", [(9.0, True), (0.0, False)])
def test_the_bound_from_known_scores(distance, caught):
    scores = np.random.default_rng(0).normal([0.0, distance], size=(200, 2))
    assert (audit.bound_of(scores) > audit.END_TO_END_PLAN.epsilon) == caught


# ---- D -----------------------------------------------------------------------------------------

ONE_RUN_PLAN = audit.PrivacyPlan(60, 60, 3, 1.0, 0.1, 1e-5)


@pytest.fixture(scope="module")
def crowd() -> audit.World:
    """A world of 60 canaries."""
    return audit.one_run_world(60)


def test_a_canary_that_is_out_is_never_drawn(crowd):
    """And its coin changes neither N nor q, which sampler and noise are told."""
    correct, plans, labels = audit.correct_ghost(7), [], []

    def tell(function: Callable) -> Callable:
        return lambda *arguments: (plans.extend(a for a in arguments if a is ONE_RUN_PLAN),
                                   function(*arguments))[1]

    def clipped_sum(model: object, parameters: dict, batch: tuple, C: float) -> dict:
        labels.append(batch[3][:, 0].tolist())
        return correct.clipped_sum(model, parameters, batch, C)

    step = audit.Mechanism(clipped_sum, tell(correct.add_noise), tell(correct.sample))
    included = torch.arange(60) % 3 == 0
    audit.one_run_scores(step, crowd, ONE_RUN_PLAN, included)
    assert labels == [[*range(0, 60, 3)]] * 3 and len(plans) == 6


def test_each_canary_spends_its_norm_on_its_own_row(crowd):
    sums, correct = [], audit.correct_ghost(7)

    def add_noise(total: dict, plan: object, rng: object) -> dict:
        sums.append(total[audit.TABLE] @ crowd.direction.to(total[audit.TABLE].dtype))
        return correct.add_noise(total, plan, rng)

    included = torch.arange(60) % 3 == 0
    audit.one_run_scores(replace(correct, add_noise=add_noise), crowd, ONE_RUN_PLAN, included)
    for along in sums:   # in the last step too: the noise has changed the weights by then
        assert (along[:60][included] > 0.95 * ONE_RUN_PLAN.max_grad_norm).all()
        assert (along[:60][~included] == 0).all()


@pytest.mark.parametrize("attacker", ["weights", "steps"])
def test_without_noise_each_attacker_sees_every_canary(crowd, attacker):
    included = torch.arange(60) % 3 == 0
    scores = audit.one_run_scores(audit.noise_times(0.0)(7), crowd, ONE_RUN_PLAN, included)
    assert scores[attacker][included].min() > scores[attacker][~included].max()


def test_the_attacker_guesses_at_both_ends_only():
    scores = torch.tensor([5.0, -3.0, 4.0, 0.0, 1.0, -2.0])
    included = torch.tensor([True, True, False, True, True, False])
    assert audit.right_guesses(scores, included, 4) == 2   # in: 5 and 4; out: -3 and -2
    assert audit.right_guesses(scores, included, 2) == 1


@pytest.fixture(scope="module")
def large_crowd() -> audit.World:
    return audit.one_run_world(1000)


@pytest.mark.parametrize("name", [
    "no clipping", "clipping after averaging examples", "no noise", "no noise in the last step"])
def test_one_run_catches_grave_mistakes(large_crowd, name):
    (claim, q, mechanism), = [row[1:4] for row in audit.ONE_RUNS if row[0] == name]
    _, caught = audit.audit_one_run(mechanism(1000), large_crowd, claim, q)
    assert "steps" in caught


def test_the_plan_of_one_run_spends_the_claim():
    """By the tighter accountant, and at the rate claimed."""
    plan = audit.one_run_plan(1.0, 1000, 0.25)
    assert (plan.num_examples, plan.expected_batch, plan.steps) == (1000, 250, audit.RUN_STEPS)
    assert 0.99 < pld.total_epsilon([(0.25, plan.noise_multiplier, plan.steps)], 1e-5) <= 1


# ---- the command line --------------------------------------------------------------------------

def test_the_table_has_a_right_verdict_in_every_row(capsys):
    audit.main(["--canaries", "10000"])   # a wrong verdict would exit with 1
    printed = capsys.readouterr().out
    assert "claim: gap 1, sd 2" in printed and "epsilon 4.38 at delta 1e-05" in printed
    for name in (*BROKEN, *SURROUNDINGS):
        assert re.search(rf"^{re.escape(name)} .* CAUGHT by \w", printed, re.M), name
    assert len(re.findall("not caught", printed)) == 5   # correct code


def test_too_few_runs_catch_nothing_and_exit_with_1(capsys):
    with pytest.raises(SystemExit, match="few canaries or runs"):
        audit.main(["--end-to-end", "--runs", "8"])
    printed = capsys.readouterr().out
    assert "claim: epsilon 1.16 at delta 1e-05" in printed and "8 runs of 4 steps" in printed
    for name in ("correct code", "no clipping", "no noise"):
        assert re.search(rf"^{name} +epsilon_lower 0 +not caught$", printed, re.M), name


def test_one_run_prints_a_row_for_each_run(capsys, monkeypatch):
    rows = [row for row in audit.ONE_RUNS if row[0] in ("no noise", "divisor = actual batch size")]
    monkeypatch.setattr(audit, "ONE_RUNS", [audit.ONE_RUNS[0], *rows])
    audit.main(["--one-run", "--canaries", "1000"])   # a wrong verdict would exit with 1
    printed = capsys.readouterr().out
    assert "1,000 canaries, 20 guesses" in printed
    assert re.search(r"^correct code +1 +1( +\d+ +[\d.]+){2} not caught$", printed, re.M)
    assert re.search(r"^no noise +1 +1( +\d+ +[\d.]+){2} CAUGHT by weights, steps$", printed, re.M)
    assert re.search(r"^divisor = actual batch size .* not caught$", printed, re.M)


@pytest.mark.parametrize("rows, right", [
    ([(False, []), (True, ["A"])], True), ([(False, ["A"]), (True, ["A"])], False),
    ([(False, []), (True, [])], False)])
def test_a_wrong_verdict_is_told(rows, right):
    assert audit.print_rows([("name", broken, "", caught) for broken, caught in rows]) == right


@pytest.mark.parametrize("argv, word", [
    (["--canaries", "1500"], "--canaries must be a positive multiple of 1000, not 1500"),
    (["--canaries", "0"], "--canaries must be a positive multiple of 1000, not 0"),
    (["--runs", "9"], "--runs must be a multiple of 4"), (["--runs", "4"], "from 8 on, not 4"),
    (["--one-run", "--canaries", "999"], "--canaries must be a positive multiple of 1000, not 999"),
    (["--one-run", "--end-to-end"], "not allowed with"), (["--runs", "many"], "--runs"),
    (["--nonsense"], "--nonsense")])
def test_bad_input_is_refused(capsys, argv, word):
    assert word in refuse(capsys, audit.main, argv)


# ---- each fault fails the unit test that docs/threat-model.md cites for it ---------------------

RUNNER = """
import json, sys, pytest

class Failures:
    def __init__(self):
        self.found = []

    def pytest_exception_interact(self, call):
        self.found.append([call.when, call.excinfo.typename])

results = {}
for variant, tests in json.loads(sys.argv[2]):
    failures = Failures()
    options = ["-q", "-x", "-p", "no:cacheprovider", "--mechanism", variant]
    code = pytest.main([*options, *tests], plugins=[failures])
    results[variant] = [int(code), failures.found]
with open(sys.argv[1], "w") as file:
    json.dump(results, file)
"""


def cited_tests() -> dict[str, str]:
    """{variant: its unit test} of the table of faults."""
    rows = [line.strip().strip("|").split("|")
            for line in (ROOT / "docs/threat-model.md").read_text().splitlines()]
    cited = {row[0].strip(): re.search(r"`(tests/core/test_dp_sgd\.py::test_\w+)`", row[-1])
             for row in rows}
    return {variant: match.group(1) for variant, match in cited.items() if match}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """{variant: [pytest's exit code, [[phase, exception], ...]]} of the tests cited for it.

    Correct code runs all of them. `pytest --mechanism VARIANT TEST` is one of these runs.
    """
    cited, path = cited_tests(), tmp_path_factory.mktemp("outcomes") / "outcomes.json"
    plan = [*((variant, [test]) for variant, test in cited.items()),
            *((name, [*cited.values()]) for name in CORRECT)]
    ran = subprocess.run([sys.executable, "-c", RUNNER, path, json.dumps(plan)], cwd=ROOT,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(path.read_text())


def test_the_table_of_faults_names_every_variant():
    assert [*cited_tests()] == [*BROKEN, *SURROUNDINGS]


@pytest.mark.parametrize("name", CORRECT)
def test_the_cited_tests_pass_on_correct_code(name, outcomes):
    assert outcomes[name] == [0, []]


@pytest.mark.parametrize("variant", [*BROKEN, *SURROUNDINGS])
def test_the_cited_test_fails_on_the_fault(variant, outcomes):
    assert outcomes[variant] == [1, [["call", "AssertionError"]]]
