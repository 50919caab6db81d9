"""The PLD accountant's bounds against known values, closed forms, direct integration, and their own promises.

The table's epsilons come from another method and not from the code under test: one step's loss on a grid,
exponentially tilted, raised to a power by FFT and recentred, at step sizes halved three times; the last column is
their uncertainty. Where the file with all of them is present (../shared/known_values.json) it is tested whole.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

import accountant as acc
import pld

ROOT = Path(__file__).resolve().parents[1]
KNOWN_VALUES = ROOT.parent / "shared" / "known_values.json"
TIGHT_ROWS = [  # id, segments (sample_rate, noise_multiplier, steps), delta, epsilon, its uncertainty
    ("C01", [(0.004266666666666667, 1.3, 3516)], 1e-05, 0.8645401911935796, 2.3e-7),
    ("C06", [(1.024e-05, 0.1, 976563)], 1e-07, 1198.9344914150136, 4.6e-4),
    ("C07", [(0.01, 4.0, 10000)], 1e-05, 0.9468668007769322, 1.6e-7),
    ("C11", [(0.0010660980810234541, 1.0, 9380)], 1e-05, 0.49333432764014884, 4.6e-6),
    ("C15", [(0.03333333333333333, 5.0, 1500)], 1e-05, 0.9794250221643911, 2.5e-8),
    ("C16", [(0.04, 0.9, 750)], 1e-05, 9.005616724289812, 9.1e-8),
    ("C21", [(0.010666666666666666, 0.65, 938)], 1e-05, 5.980849096213409, 7.1e-8),
    ("C23", [(0.01, 1.0, 1)], 1e-05, 0.1994504478543326, 2e-9),
    ("C25", [(0.25, 2.0, 1)], 1e-06, 1.0268874071913572, 1.1e-8),
    ("C26", [(0.001, 5.0, 1)], 1e-05, 0.0003010821880536546, 6.3e-9),
    ("C29", [(1.0, 50.0, 1000)], 1e-06, 2.9216005904270457, 1e-9),
    ("C35", [(0.0001, 0.7, 1000000)], 1e-07, 1.2614731666514336, 1.2e-5),
    ("C37", [(0.01, 0.3, 1000)], 1e-05, 69.81571398680501, 2.7e-5),
    ("C39", [(0.001, 0.2, 10)], 1e-05, 20.797118338976073, 2.9e-5),
    ("C40", [(0.01, 100.0, 1000)], 1e-05, 0.007437695718871385, 1e-9),
    ("C42", [(0.1, 1000.0, 10)], 1e-05, 0.0004638888242171201, 1e-9),
    ("C44", [(0.01, 1.1, 1000)], 0.01, 0.6097133745568128, 3.6e-8),
    ("C46", [(0.01, 1.1, 1000)], 1e-14, 3.5973333353452173, 3.6e-8),
    ("C48", [(0.25, 1.0, 10)], 1e-05, 5.973729239616379, 6e-8),
    ("C49", [(0.9, 8.0, 100)], 1e-06, 5.608210373236547, 5.7e-8),
    ("C51", [(0.04, 2.0, 500), (0.04, 3.0, 500)], 1e-05, 2.3645756958119564, 3.6e-8),
]
CALIBRATION_ROWS = [  # id, sample_rate, steps, delta, target epsilon, tight noise multiplier
    ("D01", 0.03333333333333333, 6000, 1e-05, 1, 9.6790483384749),
    ("D07", 0.04, 750, 1e-05, 10, 0.857430927261058),
    ("D13", 0.004266666666666667, 14063, 1e-05, 8, 0.6557157119855078),
    ("D14", 1.0, 100, 1e-05, 1, 37.30631634815942),
    ("D16", 1.0, 1, 1e-06, 0.2, 18.988799853945533),
    ("D21", 0.5, 500, 1e-05, 5, 10.020905479733813),
]
STEPS = [(0.01, 1.0), (0.3, 0.5), (0.3, 3.0), (0.97, 2.0), (1.0, 1.0), (1e-4, 0.4), (1e-3, 5.0)]


def by_id(rows):
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


def wide(lower, upper):
    """Is the gap larger than promised?"""
    return upper - lower > max(0.01 * lower, 0.01 * (upper < 1))


def gaussian_delta(eps, sigma):
    """delta of the Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, arXiv 1805.06530, Theorem 8)."""
    return ndtr(0.5 / sigma - eps * sigma) - math.exp(eps + log_ndtr(-0.5 / sigma - eps * sigma))


def one_step_delta(eps, q, sigma, removed):
    """delta of one step in one direction: P minus e^eps Q, over the half line where it is positive."""
    def mixture(cut, side):
        return (1 - q) * ndtr(side * cut / sigma) + q * ndtr(side * (cut - 1) / sigma)

    ratio = math.exp(eps if removed else -eps)  # where the mixture's density over N(0, sigma^2)'s has this value
    if ratio <= 1 - q:  # it is larger everywhere
        return 1 - math.exp(eps) if removed else 0.0
    cut = sigma**2 * math.log((ratio - 1 + q) / q) + 0.5
    if removed:
        return mixture(cut, -1) - math.exp(eps) * ndtr(-cut / sigma)
    return ndtr(cut / sigma) - math.exp(eps) * mixture(cut, 1)


def two_step_delta(eps, q, sigma, removed):
    """delta of two steps in one direction: the mean of one step's delta at what the other one has left over."""
    def integrand(z):
        loss = np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + (z - 0.5) / sigma**2)
        density = math.exp(-z * z / 2 / sigma**2) / math.sqrt(2 * math.pi) / sigma
        density *= math.exp(loss) if removed else 1
        return density * one_step_delta(eps - (loss if removed else -loss), q, sigma, removed)

    cuts = np.linspace(-9 * sigma, 1 + 9 * sigma, 25)
    return sum(quad(integrand, a, b, epsabs=1e-15, epsrel=1e-9)[0] for a, b in zip(cuts, cuts[1:]))


def law_delta(eps, losses, masses, infinite):
    return masses @ np.maximum(-np.expm1(np.minimum(eps - losses, 0)), 0) + infinite


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("segments, delta, eps, uncertainty", by_id(TIGHT_ROWS))
def test_known_values(segments, delta, eps, uncertainty):
    lower, upper = acc.epsilon_bounds(segments, delta)
    assert lower - uncertainty <= eps <= upper + uncertainty
    assert not wide(lower, upper) and upper < 1.005 * eps
    assert upper <= acc.epsilon_and_order(segments, delta)[0]


def test_whole_reference_file():
    if not KNOWN_VALUES.exists():
        pytest.skip("the full reference table is not on this machine; its hard rows are tested above")
    for row in json.loads(KNOWN_VALUES.read_text())["epsilon_tight"]:
        lower, upper = acc.epsilon_bounds(row["segments_q_sigma_steps"], row["delta"])
        eps, uncertainty = row["eps_tight"], row["eps_tight_uncertainty"]
        assert lower - uncertainty <= eps <= upper + uncertainty and not wide(lower, upper), row["id"]


@pytest.mark.parametrize("sigma, steps", [(0.5, 1), (1.0, 1), (10.0, 100), (100.0, 1), (0.3, 10**6), (80.0, 10**6)])
@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_without_sampling_it_is_the_analytic_gaussian(sigma, steps, delta):
    one = sigma / math.sqrt(steps)  # so many Gaussians are one with less noise
    high = 0.5 / one**2 + 40 / one
    exact = brentq(lambda eps: gaussian_delta(eps, one) - delta, 0, high, xtol=1e-12)
    lower, upper = acc.epsilon_bounds([(1.0, sigma, steps)], delta)
    assert lower <= exact <= upper
    assert upper - lower < 2e-3 * exact


@pytest.mark.parametrize("q, sigma", STEPS)
@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("step", [0.003, 0.1])
def test_one_step_is_discretised_to_the_safe_side(q, sigma, removed, step):
    grid = pld.Grid(step, 0, 0, 0, 0, 1e-3)  # cuts off so much that it shows
    low, high = pld.loss_range(q, sigma, removed, 1e-3)
    for eps in np.linspace(low - 2 * step, high + 2 * step, 101):
        exact = one_step_delta(eps, q, sigma, removed)
        assert law_delta(eps, *pld.discretise(q, sigma, removed, grid, True)) >= exact - 1e-15
        assert law_delta(eps, *pld.discretise(q, sigma, removed, grid, False)) <= exact + 1e-15
    more, less = (pld.discretise(q, sigma, removed, grid, more) for more in (True, False))
    assert more[1].sum() + more[2] == pytest.approx(1, abs=1e-12) and less[1].sum() < 1 + 1e-12
    assert more[1].min() >= 0 and less[1].min() >= 0


@pytest.mark.parametrize("q, sigma", STEPS)
@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("steps, direct", [(1, one_step_delta), (2, two_step_delta)])
def test_few_steps_by_direct_integration(q, sigma, removed, steps, direct):
    segments = [(q, sigma, steps)]
    cap, order = acc.epsilon_and_order(segments, 1e-6)
    grid = pld.choose_grid(segments, 1e-6, cap, order, 2**16)
    upper, lower = (pld.delta_curve(segments, grid, removed, more) for more in (True, False))
    for eps in np.linspace(grid.low, cap, 6):
        exact = direct(eps, q, sigma, removed)
        assert lower(eps) <= exact * (1 + 1e-9) and exact * (1 - 1e-9) <= upper(eps)
    if grid.low == 0:  # and not far away
        assert upper(0.1 * cap) - lower(0.1 * cap) <= 0.02 * direct(0.1 * cap, q, sigma, removed) + 1e-8


@pytest.mark.parametrize("part", [2, 4, 8])
@pytest.mark.parametrize("removed", [True, False])
def test_what_wraps_around_is_accounted_for(part, removed):
    segments = [(0.1, 2.0, 5000)]
    grid = pld.choose_grid(segments, 1e-6, *acc.epsilon_and_order(segments, 1e-6), 2**16)
    upper, lower = (pld.delta_curve(segments, grid, removed, more) for more in (True, False))
    small = grid._replace(points=grid.points // part)  # a window that is much too small for the sums
    for eps in np.linspace(small.low, small.low + small.step * small.points, 9):
        assert pld.delta_curve(segments, small, removed, True)(eps) >= lower(eps)
        assert pld.delta_curve(segments, small, removed, False)(eps) <= upper(eps)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("q", [1e-5, 1e-3, 0.05, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.8, 5.0, 100.0])
@pytest.mark.parametrize("steps", [1, 1000, 10**6])
def test_bounds_are_ordered_and_close_and_not_above_rdp(q, sigma, steps):
    lower, upper = acc.epsilon_bounds([(q, sigma, steps)], 1e-6)
    assert 0 <= lower <= upper <= acc.epsilon(q, sigma, steps, 1e-6)
    assert not wide(lower, upper)


def test_monotone():
    for vary in [lambda x: (0.02, 1.1, int(300 * x), 1e-5), lambda x: (0.02 * x, 1.1, 300, 1e-5),
                 lambda x: (0.02, 1.1 / x, 300, 1e-5), lambda x: (0.02, 1.1, 300, 1e-5 / x)]:
        bounds = [acc.epsilon_bounds([vary(x)[:3]], vary(x)[3]) for x in (1, 1.3, 2, 4)]
        assert all(a[1] < b[0] for a, b in zip(bounds, bounds[1:]))


def test_composition():
    whole = acc.epsilon_bounds([(0.04, 2.0, 500)], 1e-5)
    halves = acc.epsilon_bounds(((0.04, 2.0, 250) for _ in range(2)), 1e-5)
    assert halves[0] <= whole[1] and whole[0] <= halves[1] and not wide(*halves)
    nothing = [(0.04, 2.0, 500), (0.3, 1.0, 0), (0.0, 1.0, 1000)]
    assert acc.epsilon_bounds(nothing, 1e-5) == whole
    mixed = acc.epsilon_bounds([(0.04, 2.0, 500), (1.0, 20.0, 3), (1e-4, 0.5, 100)], 1e-5)
    assert whole[1] < mixed[0] <= mixed[1] and not wide(*mixed)


@pytest.mark.parametrize("q, steps, delta, target, sigma", by_id(CALIBRATION_ROWS))
def test_calibration(q, steps, delta, target, sigma):
    got = acc.calibrate_noise(target, delta, q, steps, accountant="pld")
    assert acc.epsilon(q, got, steps, delta, accountant="pld") <= target
    assert sigma * (1 - 1e-4) <= got <= min(sigma * 1.002, acc.calibrate_noise(target, delta, q, steps))


def test_edges():
    assert acc.epsilon(0.01, 1.0, 0, 1e-5, accountant="pld") == 0
    assert acc.epsilon_bounds([], 1e-5) == acc.epsilon_bounds([(0.01, 1e9, 100)], 1e-5) == (0, 0)
    assert acc.epsilon(0.01, 1.1, 1000, 1e-5, accountant="pld") == acc.epsilon_bounds([(0.01, 1.1, 1000)], 1e-5)[1]
    assert acc.epsilon_bounds([(1e-5, 1.0, 1)], 1e-5) == (0, 0)  # an example is hardly ever drawn at all
    assert acc.calibrate_noise(1e4, 1e-5, 0.01, 1, accountant="pld") == pytest.approx(0.1)


@pytest.mark.parametrize("q, sigma, steps, delta, name", [
    (1e-9, 0.3, 10**7, 1e-9, "sample_rate"), (0.1, 0.09, 10, 1e-5, "noise_multiplier"),
    (0.1, 1e5, 10**6, 1e-9, "noise_multiplier"), (0.1, 1.0, 10**7 + 1, 1e-5, "steps"), (0.1, 1.0, 10, 1e-16, "delta"),
    (0.1, 0.3, 10, 0.6, "delta")])
def test_beyond_its_limits_it_refuses(q, sigma, steps, delta, name):
    for function in (lambda: acc.epsilon_bounds([(0.1, 1.0, 5), (q, sigma, steps)], delta),
                     lambda: acc.epsilon(q, sigma, steps, delta, accountant="pld")):
        with pytest.raises(ValueError, match=f"the pld accountant needs a {name} from"):
            function()


def test_a_step_must_fit_into_the_grid():
    with pytest.raises(ValueError, match="one step's losses take"):
        pld.delta_curve([(0.1, 1.0, 5)], pld.Grid(1e-3, 64, 0.0, 1.0, 1.0, 1e-9), True, True)


def test_bad_arguments():
    bad = [([(0.1, 0, 3)], 1e-5), ([(2, 1.0, 3)], 1e-5), ([(0.1, 1.0, -1)], 1e-5), ([], 0), ([], True)]
    for segments, delta in bad:
        with pytest.raises(ValueError, match="must be"):
            acc.epsilon_bounds(segments, delta)


def run(*arguments):
    return subprocess.run([sys.executable, ROOT / "accountant.py", *arguments], capture_output=True, text=True)


def test_command_line():
    common = ["--sample-rate", "0.01", "--steps", "1000", "--delta", "1e-5"]
    rdp, tight = run(*common, "--noise-multiplier", "1.1").stdout.splitlines()
    assert rdp == "RDP: noise multiplier 1.1, epsilon 1.71171, best order 9.56811"
    lower, upper = acc.epsilon_bounds([(0.01, 1.1, 1000)], 1e-5)
    assert tight == f"PLD: noise multiplier 1.1, epsilon from {lower:.6g} to {upper:.6g}"
    rdp, tight = run(*common, "--eps", "2").stdout.splitlines()
    assert f"noise multiplier {acc.calibrate_noise(2.0, 1e-5, 0.01, 1000):.9g}, epsilon 2" in rdp
    assert f"noise multiplier {acc.calibrate_noise(2.0, 1e-5, 0.01, 1000, 'pld'):.9g}, epsilon from" in tight


@pytest.mark.parametrize("arguments", [
    "--sample-rate 2 --steps 10 --delta 1e-5 --eps 1", "--sample-rate 0.1 --steps x --delta 1e-5 --eps 1",
    "--sample-rate 0.1 --steps 10 --delta 1e-5",
    "--sample-rate 0.1 --steps 10 --delta 1e-5 --eps 1 --noise-multiplier 1",
    "--sample-rate 0.1 --steps 10 --delta 1e-5 --eps nan", "--sample-rate 0.1 --steps 10 --delta 1e-20 --eps 1", ""])
def test_command_line_on_bad_input(arguments):
    result = run(*arguments.split())
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
