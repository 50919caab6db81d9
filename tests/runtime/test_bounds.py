"""The bounds of runtime/bounds.py hold where the truth is known, and are not far below it."""

import math

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.optimize import linprog

import accountant
from runtime import bounds

# ---- many runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_the_gdp_bound_holds_in_simulations(mu):
    """At 5% it may be too high in 5% of them, and may not be far below on average."""
    rng, n, simulations = np.random.default_rng(0), 2000, 2000
    rate = stats.norm.sf(mu / 2)   # both error rates at the best threshold
    errors = rng.binomial(n, rate, (simulations, 2)).tolist()
    found = np.array([bounds.gdp_lower_bound(fp, n, fn, n, error=0.05) for fp, fn in errors])
    assert (found > mu).mean() <= 0.05 and found.mean() > mu - 0.25


def test_the_gdp_bound_at_the_ends():
    assert bounds.gdp_lower_bound(50, 100, 50, 100, 1e-6) == 0
    assert bounds.gdp_lower_bound(100, 100, 0, 100, 1e-6) == 0
    # Perfect guesses are no infinite bound.
    assert 1 < bounds.gdp_lower_bound(0, 100, 0, 100, 1e-6) < 3


def test_error_bounds_are_clopper_pearsons():
    for false, trials, error in ((0, 10, 0.05), (3, 10, 1e-3), (9, 10, 0.1)):
        upper = bounds.error_upper(false, trials, error)
        assert stats.binom.cdf(false, trials, upper) == pytest.approx(error, rel=1e-9)
    assert bounds.error_upper(10, 10, 0.05) == 1


@pytest.mark.parametrize("mu, epsilon", [(0.5, 0.3), (1.0, 1.0), (3.0, 8.0)])
def test_the_gaussian_curve_is_the_integral_defining_delta(mu, epsilon):
    def excess(x: float) -> float:
        return max(0.0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))

    start = epsilon / mu + mu / 2   # where the densities' ratio is e^epsilon
    expected = integrate.quad(excess, start, start + 12, epsabs=1e-13)[0]
    assert bounds.gaussian_delta(mu, epsilon) == pytest.approx(expected, rel=1e-6)


def test_epsilon_from_mu():
    assert bounds.gdp_epsilon(0.0, 1e-5) == bounds.gdp_epsilon(1e-6, 1e-5) == 0
    for mu in (0.1, 1.0, 5.0, 40.0):
        epsilon = bounds.gdp_epsilon(mu, 1e-5)
        assert bounds.gaussian_delta(mu, epsilon) == pytest.approx(1e-5, rel=1e-6)
        assert epsilon <= accountant.epsilon(1.0, 1 / mu, 1, 1e-5)


def test_the_bound_without_assumptions_holds_for_randomised_response():
    """Truth with probability e^epsilon / (1 + e^epsilon): exactly epsilon-DP."""
    rng, epsilon, n = np.random.default_rng(0), 1.0, 1000
    errors = rng.binomial(n, 1 / (1 + math.exp(epsilon)), (1000, 2)).tolist()
    found = np.array([bounds.dp_epsilon_lower(fp, n, fn, n, 0.0, error=0.05) for fp, fn in errors])
    assert (found > epsilon).mean() <= 0.1 and found.mean() > 0.7


# ---- one run -----------------------------------------------------------------------------------

@pytest.mark.parametrize("canaries, guesses, right, delta, expected", [
    (100, 100, 75, 0.0, 0.702), (100, 100, 75, 1e-4, 0.699), (1000, 100, 75, 1e-4, 0.673),
    (100_000, 1510, 1439, 1e-5, 2.675)])
def test_the_one_run_bound_gives_the_papers_numbers(canaries, guesses, right, delta, expected):
    """Steinke et al. 2023, section 7 and appendix D."""
    found = bounds.one_run_lower_bound(canaries, guesses, right, delta, 0.05)
    assert found == pytest.approx(expected, abs=1e-3)


def worst_case(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The largest P[W >= v] of r guesses on m canaries, over all (epsilon, delta)-DP mechanisms.

    Let the output be the guesses. Flipping coins and guesses together, and permuting canaries,
    turns a mechanism into another one with the same W: so all guesses with w right ones may be
    equally likely, and P_w, their sum, is all that matters. (j + 1) P_{j+1} / m and (r - j) P_j / m
    are the chances that coin 1 is guessed right with j others right, or wrong. (epsilon, delta)-DP
    of that coin is a linear condition on them, and P[W >= v] has its maximum by linear programming.
    """
    e, conditions = math.exp(epsilon), []
    for j in range(r):   # excess_k >= P(one coin) - e^epsilon P(the other), k = 2j or 2j + 1
        for k, (right, wrong) in enumerate(((1, -e), (-e, 1))):
            row = np.zeros(3 * r + 1)
            row[j + 1], row[j] = right * (j + 1) / m, wrong * (r - j) / m
            row[r + 1 + 2 * j + k] = -1
            conditions.append(row)
    total = np.repeat([0.0, 1.0], [r + 1, 2 * r])   # all excess together is delta at most
    wanted = (1 - total) * (np.arange(3 * r + 1) >= v)
    found = linprog(-wanted, A_ub=[*conditions, total],
                    b_ub=[0.0] * (2 * r) + [delta], A_eq=[1 - total], b_eq=[1.0])
    assert found.success
    return -found.fun


@pytest.mark.parametrize("m, r", [(1, 1), (3, 2), (6, 6), (30, 6), (200, 20)])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
def test_no_mechanism_beats_the_one_run_p_value(m, r, epsilon):
    for v in range(1, r + 1):
        exact = worst_case(m, r, v, epsilon, 0.0)
        assert bounds.one_run_p_value(m, r, v, epsilon, 0.0) == pytest.approx(exact, rel=1e-6)
        for delta in (1e-4, 1e-3, 1e-2):
            p_value = bounds.one_run_p_value(m, r, v, epsilon, delta)
            if p_value < 0.5:   # larger ones refute nothing
                assert worst_case(m, r, v, epsilon, delta) <= p_value * (1 + 1e-6)


def test_the_one_run_bound_holds_for_randomised_response():
    """Exactly (1, 1e-3)-DP: the truth with probability delta, else randomised response."""
    rng, m, epsilon, delta = np.random.default_rng(0), 300, 1.0, 1e-3
    rate = delta + (1 - delta) / (1 + math.exp(-epsilon))
    rights, counts = np.unique(rng.binomial(m, rate, 2000), return_counts=True)
    found = np.array([bounds.one_run_lower_bound(m, m, right, delta, 0.05)
                      for right in rights.tolist()])
    assert counts[found > epsilon].sum() <= 0.05 * 2000 and found @ counts > 0.6 * 2000


@pytest.mark.parametrize("mu, least", [(1.0, 1.4), (2.0, 3.0)])
def test_the_one_run_bound_holds_for_gaussian_noise(mu, least):
    rng, m, k = np.random.default_rng(0), 2000, 50
    epsilon, found = bounds.gdp_epsilon(mu, 1e-5), []
    for _ in range(100):
        included = rng.random(m) < 0.5
        order = np.argsort(rng.normal(mu * included))
        right = int(included[order[-k:]].sum() + (~included[order[:k]]).sum())
        found.append(bounds.one_run_lower_bound(m, 2 * k, right, 1e-5, 0.05))
    assert max(found) < epsilon and np.mean(found) > least


def test_the_one_run_bound_at_the_ends():
    assert bounds.one_run_lower_bound(100, 100, 50, 1e-5, 0.05) == 0
    assert bounds.one_run_lower_bound(100, 100, 0, 1e-5, 0.05) == 0
    perfect = bounds.one_run_lower_bound(100, 100, 100, 1e-5, 0.05)
    assert perfect == pytest.approx(math.log(100 / 3), abs=0.1)
