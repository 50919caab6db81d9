"""The audit passes the code as it is and catches every broken copy; its bounds hold where the truth is known.

All statistical verdicts on correct code fail with probability 1e-6 or less.
"""

import ast
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_dp_sgd as unit
import torch
from scipy import integrate, stats

import accountant
import audit
import dp_sgd
import train
from config import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
MU = math.sqrt(audit.CANARY_PLAN.steps) / audit.CANARY_PLAN.noise_multiplier
CORRECT = ["correct code", "correct code, ghost engine"]
BROKEN = [name for name in audit.MECHANISMS if name not in CORRECT]
SURROUNDINGS = ["shuffling accounted as Poisson", "accountant fed the physical batch size", "a published seed"]


# ---- A and B -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=CORRECT)
def correct(request):
    """(included, scores [T, n]) of the real noisy_gradient, with either engine."""
    return audit.canary_scores(audit.MECHANISMS[request.param], audit.CANARY_PLAN, 20, np.random.default_rng())


def test_correct_code_passes_a(correct):
    included, scores = correct
    for one_step in scores:
        gap, std, caught = audit.audit_scores(included, one_step, audit.CANARY_PLAN.noise_multiplier)
        assert not caught and gap == pytest.approx(1, abs=0.2) and std == pytest.approx(2, rel=0.05)


def test_the_bound_of_correct_code_lies_between_70_percent_of_the_claim_and_the_claim(correct):
    mu, caught = audit.audit_guesses(*correct, audit.CANARY_PLAN.noise_multiplier)
    assert not caught and 0.7 * MU <= mu <= MU


def test_the_audit_calls_the_function_that_training_calls():
    assert audit.MECHANISMS["correct code"] is dp_sgd.noisy_gradient is train.noisy_gradient


def test_the_scores_of_correct_code_are_normal_and_independent_of_each_other(correct):
    included, scores = correct
    noise = (scores - included) / audit.CANARY_PLAN.noise_multiplier
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-7
    for a, b in ((noise[0], noise[1]), (noise[:, 1:].flatten(), noise[:, :-1].flatten())):
        assert abs((a * b).sum()) < 6 * len(a) ** 0.5


@pytest.mark.parametrize("name, audits", [
    ("no clipping", {"A", "B"}), ("noise halved", {"A", "B"}), ("noise once per chunk", {"A"}),
    ("clipping after averaging examples", {"A", "B", "divisor"}), ("embedder outside the joint norm", {"A", "B"}),
    ("divisor = actual batch size", {"divisor"})])
def test_every_broken_step_is_caught(name, audits):
    _, caught = audit.audit_mechanism(audit.MECHANISMS[name], 10, np.random.default_rng())
    assert audits <= {verdict.split()[0] for verdict in caught}


def test_every_fault_around_the_step_is_caught_and_correct_code_is_not():
    rows = audit.audit_surroundings(np.random.default_rng())
    assert [name for name, broken, *_ in rows if broken] == SURROUNDINGS and len(rows) == 6
    assert all(bool(caught) == broken for _, broken, _, caught in rows)


def test_the_divisor_of_correct_code_is_constant():
    ratio, caught = audit.audit_divisor(dp_sgd.noisy_gradient, audit.CANARY_PLAN, np.random.default_rng(0))
    assert ratio == pytest.approx(1, rel=1e-6) and not caught


def test_a_wrong_verdict_is_told():
    assert audit.print_rows([("fine", False, "", []), ("broken", True, "", ["A"])])
    assert not audit.print_rows([("fine", False, "", ["A"]), ("broken", True, "", ["A"])])
    assert not audit.print_rows([("fine", False, "", []), ("broken", True, "", [])])


# ---- the bounds --------------------------------------------------------------------------------------

@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_the_gdp_bound_against_simulations_of_known_mu(mu):
    """At 5% the bound may be too high in 5% of simulations, and may not be far below on average."""
    rng, n, simulations = np.random.default_rng(0), 2000, 2000
    rate = stats.norm.sf(mu / 2)   # both error rates at the best threshold
    errors = rng.binomial(n, rate, (simulations, 2))
    bounds = np.array([audit.gdp_lower_bound(fp, n, fn, n, error=0.05) for fp, fn in errors.tolist()])
    assert (bounds > mu).mean() <= 0.05 and bounds.mean() > mu - 0.25


def test_the_gdp_bound_at_the_ends():
    assert audit.gdp_lower_bound(50, 100, 50, 100) == 0
    assert audit.gdp_lower_bound(100, 100, 0, 100) == 0
    assert 1 < audit.gdp_lower_bound(0, 100, 0, 100) < 3   # never infinite, however well the guesses went


def test_error_bounds_are_clopper_pearsons():
    for false, trials, error in ((0, 10, 0.05), (3, 10, 1e-3), (9, 10, 0.1)):
        upper = audit.error_upper(false, trials, error)
        assert stats.binom.cdf(false, trials, upper) == pytest.approx(error, rel=1e-9)
    assert audit.error_upper(10, 10, 0.05) == 1


@pytest.mark.parametrize("mu, epsilon", [(0.5, 0.3), (1.0, 1.0), (3.0, 8.0)])
def test_the_gaussian_curve_is_the_integral_that_defines_delta(mu, epsilon):
    def excess(x):
        return max(0.0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))

    start = epsilon / mu + mu / 2   # where the densities' ratio is e^epsilon
    expected = integrate.quad(excess, start, start + 12, epsabs=1e-13)[0]
    assert audit.gaussian_delta(mu, epsilon) == pytest.approx(expected, rel=1e-6)


def test_epsilon_from_mu():
    assert audit.gdp_epsilon(1.0, 1e-5) == pytest.approx(4.377, abs=2e-3)   # the claim of the README
    assert audit.gdp_epsilon(0.0, 1e-5) == audit.gdp_epsilon(1e-6, 1e-5) == 0
    for mu in (0.1, 1.0, 5.0, 40.0):
        assert audit.gaussian_delta(mu, audit.gdp_epsilon(mu, 1e-5)) == pytest.approx(1e-5, rel=1e-6)
        assert audit.gdp_epsilon(mu, 1e-5) <= accountant.epsilon(1.0, 1 / mu, 1, 1e-5)


def test_the_bound_without_assumptions_holds_for_randomised_response():
    """Truth with probability e^eps / (1 + e^eps): exactly eps-DP."""
    rng, epsilon, n = np.random.default_rng(0), 1.0, 1000
    errors = rng.binomial(n, 1 / (1 + math.exp(epsilon)), (1000, 2))
    bounds = np.array([audit.dp_epsilon_lower(fp, n, fn, n, 0.0, error=0.05) for fp, fn in errors.tolist()])
    assert (bounds > epsilon).mean() <= 0.1 and bounds.mean() > 0.7


# ---- C -----------------------------------------------------------------------------------------------

def test_the_neighbouring_run_never_draws_the_canary_and_training_is_put_back(monkeypatch):
    world, seen = audit.tiny_world(np.random.default_rng(0)), []
    everyone = torch.arange(audit.END_TO_END_PLAN.num_examples)
    monkeypatch.setattr(audit, "poisson_sample", lambda plan, rng: everyone)

    def record(loss_fn, parameters, batch, plan, chunk, rng):
        seen.append(batch[3][:, 0].tolist())   # one label per example, of its first draw
        return {name: torch.zeros_like(p) for name, p in parameters.items()}

    before = train.noisy_gradient, train.poisson_sample
    for canary_in in (False, True):   # no gradient: all that moves is rounding, of the change of units
        assert abs(audit.end_to_end_score(record, world, canary_in)) < 1e-4
    assert seen == [[0] * 7] * 4 + [[0] * 7 + [1]] * 4   # labels: 1 is the canary's
    assert (train.noisy_gradient, train.poisson_sample) == before


def test_end_to_end_audit_on_known_scores(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(audit, "tiny_world", lambda rng: None)
    monkeypatch.setattr(audit, "end_to_end_score", lambda mechanism, world, canary_in: rng.normal(9.0 * canary_in))
    assert audit.audit_end_to_end(None, 400)[1]
    monkeypatch.setattr(audit, "end_to_end_score", lambda mechanism, world, canary_in: rng.normal())
    assert not audit.audit_end_to_end(None, 400)[1]


def test_the_canary_moves_the_weights_of_a_run_without_noise(monkeypatch):
    world, everyone = audit.tiny_world(np.random.default_rng(0)), torch.arange(audit.END_TO_END_PLAN.num_examples)
    monkeypatch.setattr(audit, "poisson_sample", lambda plan, rng: everyone)
    silent = audit.with_another_plan(lambda plan, B: replace(plan, noise_multiplier=0.0))
    assert abs(audit.end_to_end_score(silent, world, False)) < 1e-4 < abs(audit.end_to_end_score(silent, world, True))


# ---- the command line and the README -----------------------------------------------------------------

def test_the_table_has_every_row_and_exits_with_0(capsys):
    audit.main(["--canaries", "10000"])   # a wrong verdict would exit with 1
    printed = capsys.readouterr().out
    assert "claim: gap 1, sd 2" in printed and "epsilon 4.38 at delta 1e-05" in printed
    for name in (*BROKEN, *SURROUNDINGS):
        assert re.search(rf"^{re.escape(name)} .* CAUGHT by \w", printed, re.M), name
    assert len(re.findall("not caught", printed)) == 5   # correct code


@pytest.mark.parametrize("arguments, word", [
    (["--canaries", "1500"], "--canaries"), (["--canaries", "0"], "--canaries"), (["--runs", "9"], "--runs"),
    (["--runs", "many"], "--runs"), (["--nonsense"], "--nonsense")])
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, word):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        audit.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and word in message and message.count("\n") == 1


def cited_tests() -> dict[str, str]:
    """{variant: name of the unit test} of the README's table."""
    section = (ROOT / "README.md").read_text().split("\n## How privacy breaks\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    return {row[1].strip(): re.search(r"`(test_\w+)`", row[4]).group(1) for row in rows}


def test_the_readmes_table_names_every_variant_and_tests_that_exist():
    assert list(cited_tests()) == [*BROKEN, *SURROUNDINGS]
    tests = ast.parse((ROOT / "tests/test_dp_sgd.py").read_text()).body
    assert {*cited_tests().values()} <= {node.name for node in tests if isinstance(node, ast.FunctionDef)}


ARGUMENTS = {"noise halved": (1.0, 1.0), "noise once per chunk": (3,),
             "embedder outside the joint norm": ("embedder.embedding.weight",),
             "accountant fed the physical batch size": (1000, 900, 0.01, 5.0, 1)}
private_calls = unit.private_calls   # the fixture


def clipped_sum_of(mechanism):
    """clipped_gradient_sum as the mechanism has it: what it does before it adds noise."""
    def clipped_sum(loss_fn, parameters, batch, C, chunk):
        plan = dp_sgd.PrivacyPlan(1, 1, 1, 0.0, C, 1e-5)
        gradient = mechanism(loss_fn, parameters, batch, plan, chunk, np.random.default_rng())
        return {name: C * g for name, g in gradient.items()}
    return clipped_sum


CLIPPING = ["no clipping", "clipping after averaging examples", "embedder outside the joint norm"]


@pytest.mark.parametrize("variant", CLIPPING)
def test_those_unit_tests_pass_when_correct_code_is_put_in_the_same_way(variant, monkeypatch):
    monkeypatch.setattr(unit, "clipped_gradient_sum", clipped_sum_of(dp_sgd.noisy_gradient))
    getattr(unit, cited_tests()[variant])(*ARGUMENTS.get(variant, ()))


@pytest.mark.parametrize("variant", [*BROKEN, *SURROUNDINGS])
def test_the_unit_test_that_the_readme_cites_fails_on_that_fault(variant, monkeypatch, private_calls):
    test, fixtures = getattr(unit, cited_tests()[variant]), ()
    if variant in BROKEN:
        monkeypatch.setattr(unit, "noisy_gradient", audit.MECHANISMS[variant])
        if variant in CLIPPING:
            monkeypatch.setattr(unit, "clipped_gradient_sum", clipped_sum_of(audit.MECHANISMS[variant]))
    elif variant == "shuffling accounted as Poisson":
        fixtures, batches = (private_calls,), []

        def shuffled(plan, rng):
            batches.extend([] if batches else audit.shuffled_batches(plan, rng))
            return batches.pop(0)
        monkeypatch.setattr(train, "poisson_sample", shuffled)
    elif variant == "a published seed":
        monkeypatch.setattr(train, "secure_generator", lambda seed: np.random.default_rng(0))
    else:
        monkeypatch.setattr(dp_sgd.PrivacyPlan, "sample_rate", property(lambda plan: 10 / plan.num_examples))
    with pytest.raises(AssertionError):
        test(*ARGUMENTS.get(variant, ()), *fixtures)
