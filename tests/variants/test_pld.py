"""The PLD accountant's bounds: known values, closed forms, direct integration, their own promises.

The table's epsilons come from another method and not from the code under test: one step's loss on
a grid, exponentially tilted, raised to a power by FFT and recentred, at step sizes halved three
times. The last column is their uncertainty.
"""

import math
import re
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from scipy.fft import irfft, rfft
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

import accountant
import dp_sgd
from variants import pld

TIGHT_ROWS = [  # id, segments (sample_rate, noise_multiplier, steps), delta, epsilon, uncertainty
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
SHORT_PLANS = [[(*one, times)] for one in STEPS for times in (1, 2)]
SHORT_PLANS += [[(0.3, 0.5, 1), (0.01, 1.0, 1)], [(0.3, 3.0, 1), (1.0, 1.0, 1)]]


def by_id(rows: list[tuple]) -> list:
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


def wide(lower: float, upper: float) -> bool:
    """Is the gap larger than promised?"""
    return upper - lower > max(0.01 * lower, 0.01 * (upper < 1))


def grid_for(segments: list[tuple], delta: float) -> pld.Grid:
    return pld.choose_grid(segments, delta, *accountant.epsilon_and_order(segments, delta))


def gaussian_delta(eps: float, sigma: float) -> float:
    """delta of the Gaussian mechanism, sensitivity 1 (Balle, Wang 2018, 1805.06530, Theorem 8)."""
    lower = math.exp(eps + log_ndtr(-0.5 / sigma - eps * sigma))
    return ndtr(0.5 / sigma - eps * sigma) - lower


def one_step_delta(eps: float, q: float, sigma: float, removed: bool) -> float:
    """delta of one step in one direction: P minus e^eps Q, over the half line where it is > 0."""
    def mixture(cut: float, side: int) -> float:
        return (1 - q) * ndtr(side * cut / sigma) + q * ndtr(side * (cut - 1) / sigma)

    ratio = math.exp(eps if removed else -eps)  # of the mixture's density over N(0, sigma^2)'s
    if ratio <= 1 - q:  # it is larger everywhere
        return 1 - math.exp(eps) if removed else 0.0
    cut = sigma**2 * math.log((ratio - 1 + q) / q) + 0.5
    if removed:
        return mixture(cut, -1) - math.exp(eps) * ndtr(-cut / sigma)
    return ndtr(cut / sigma) - math.exp(eps) * mixture(cut, 1)


def two_step_delta(eps: float, one: tuple, other: tuple, removed: bool) -> float:
    """delta of two steps (q, sigma) in one direction: the mean of one at what the other leaves."""
    q, sigma = other

    def integrand(z: float) -> float:
        log_rest = math.log1p(-q) if q < 1 else -np.inf
        loss = np.logaddexp(log_rest, math.log(q) + (z - 0.5) / sigma**2)
        density = math.exp(-z * z / 2 / sigma**2) / math.sqrt(2 * math.pi) / sigma
        density *= math.exp(loss) if removed else 1
        return density * one_step_delta(eps - (loss if removed else -loss), *one, removed)

    cuts = np.linspace(-9 * sigma, 1 + 9 * sigma, 25)
    return sum(quad(integrand, a, b, epsabs=1e-15, epsrel=1e-9)[0] for a, b in pairwise(cuts))


def direct_delta(eps: float, segments: list[tuple], removed: bool) -> float:
    """delta of one or two steps in one direction, by integration."""
    one, *others = [(q, sigma) for q, sigma, steps in segments for _ in range(steps)]
    if not others:
        return one_step_delta(eps, *one, removed)
    return two_step_delta(eps, one, *others, removed)


def law_delta(eps: float, step: float, first: int, masses: np.ndarray) -> float:
    losses = step * (first + np.arange(len(masses)))
    return masses @ np.maximum(-np.expm1(np.minimum(eps - losses, 0)), 0)


# ---- both bounds -------------------------------------------------------------------------------

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("segments, delta, eps, uncertainty", by_id(TIGHT_ROWS))
def test_known_values_lie_between_the_bounds(segments, delta, eps, uncertainty):
    lower, upper = pld.epsilon_bounds(segments, delta)
    assert lower - uncertainty <= eps <= upper + uncertainty
    assert not wide(lower, upper) and upper < 1.005 * eps


@pytest.mark.parametrize("sigma, steps", [(0.5, 1), (1.0, 1), (10.0, 100), (100.0, 1),
                                          (0.3, 10**6), (80.0, 10**6)])
@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_without_sampling_it_is_the_analytic_gaussian(sigma, steps, delta):
    one = sigma / math.sqrt(steps)  # so many Gaussians are one with less noise
    high = 0.5 / one**2 + 40 / one
    exact = brentq(lambda eps: gaussian_delta(eps, one) - delta, 0, high, xtol=1e-12)
    lower, upper = pld.epsilon_bounds([(1.0, sigma, steps)], delta)
    assert lower <= exact <= upper
    assert upper - lower < 2e-3 * exact


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("q", [1e-5, 1e-3, 0.05, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.8, 5.0, 100.0])
@pytest.mark.parametrize("steps", [1, 1000, 10**6])
def test_bounds_are_ordered_close_and_below_rdp(q, sigma, steps):
    lower, upper = pld.epsilon_bounds([(q, sigma, steps)], 1e-6)
    assert 0 <= lower <= upper <= accountant.epsilon(q, sigma, steps, 1e-6)
    assert not wide(lower, upper)


def test_where_rdp_proves_more_its_epsilon_counts():
    plan = (1e-8, 0.1, 10**7, 1e-15)  # a corner of LIMITS: round-off is large beside delta
    assert pld.epsilon(*plan) <= accountant.epsilon(*plan)


@pytest.mark.parametrize("plan", [
    lambda x: (0.02, 1.1, int(300 * x), 1e-5), lambda x: (0.02 * x, 1.1, 300, 1e-5),
    lambda x: (0.02, 1.1 / x, 300, 1e-5), lambda x: (0.02, 1.1, 300, 1e-5 / x)])
def test_bounds_rise_with_every_argument(plan):
    bounds = [pld.epsilon_bounds([plan(x)[:3]], plan(x)[3]) for x in (1, 1.3, 2, 4)]
    assert all(a[1] < b[0] for a, b in pairwise(bounds))


def test_segments_add_up():
    whole = pld.epsilon_bounds([(0.04, 2.0, 500)], 1e-5)
    halves = pld.epsilon_bounds(((0.04, 2.0, 250) for _ in range(2)), 1e-5)
    assert halves[0] <= whole[1] and whole[0] <= halves[1] and not wide(*halves)
    nothing = [(0.04, 2.0, 500), (0.3, 1.0, 0), (0.0, 1.0, 1000)]
    assert pld.epsilon_bounds(nothing, 1e-5) == whole
    mixed = pld.epsilon_bounds([(0.04, 2.0, 500), (1.0, 20.0, 3), (1e-4, 0.5, 100)], 1e-5)
    assert whole[1] < mixed[0] <= mixed[1] and not wide(*mixed)


def test_the_worse_direction_counts_whichever_it_is(monkeypatch):
    plan = [(0.02, 0.8, 300)], 1e-5  # removal is much the worse
    bounds, curve = pld.epsilon_bounds(*plan), pld.delta_curve
    monkeypatch.setattr(pld, "delta_curve", lambda *args: curve(*args[:-1], not args[-1]))
    assert pld.epsilon_bounds(*plan) == bounds


def test_epsilon_is_the_upper_bound():
    segments = [(0.01, 1.1, 1000)]
    upper = pld.epsilon_bounds(segments, 1e-5)[1]
    assert pld.epsilon(*segments[0], 1e-5) == pld.total_epsilon(segments, 1e-5) == upper


def test_what_releases_nothing_costs_nothing():
    assert pld.epsilon(0.01, 1.0, 0, 1e-5) == 0
    assert pld.epsilon_bounds([], 1e-5) == pld.epsilon_bounds([(0.01, 1e9, 100)], 1e-5) == (0, 0)
    assert pld.epsilon_bounds([(1e-5, 1.0, 1)], 1e-5) == pytest.approx((0, 0), abs=1e-9)


# ---- rounding to the grid, and what the computer leaves out ------------------------------------

@pytest.mark.parametrize("q, sigma", STEPS)
@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("step", [0.003, 0.1])
def test_rounding_raises_delta_within_its_bound(q, sigma, removed, step):
    tail = 1e-4  # cuts off so much that it shows
    first, masses, relative_error = pld.discretise(q, sigma, removed, step, tail)
    assert masses.min() >= 0 and masses.sum() == pytest.approx(1 - 2 * tail, abs=2 * tail)
    assert 0 < relative_error < 1e-9
    up = 1 / (1 + math.exp(-step / 2))  # lower_index: two factors of e^(step/2) or e^(-step/2)
    for eps in step * np.arange(first - 2, first + len(masses) + 1):
        exact = {i: one_step_delta(eps + i * step, q, sigma, removed) for i in (-1, 0, 1)}
        noisy = up**2 * exact[-1] + 2 * up * (1 - up) * exact[0] + (1 - up)**2 * exact[1]
        rounded = law_delta(eps, step, first, masses)
        assert exact[0] - 2 * tail <= rounded <= noisy + 1e-12
        between = law_delta(eps + step / 3, step, first, masses)
        assert one_step_delta(eps + step / 3, q, sigma, removed) - 2 * tail <= between


@pytest.mark.parametrize("segments", SHORT_PLANS)
@pytest.mark.parametrize("removed", [True, False])
def test_few_steps_agree_with_direct_integration(segments, removed):
    steps = sum(t for *_, t in segments)
    rdp_epsilon = accountant.total_epsilon(segments, 1e-6)
    grid = grid_for(segments, 1e-6)
    below, above, epsilon_shift = pld.delta_curve(segments, grid, removed)
    assert 0 < epsilon_shift < 1e-9
    points = np.linspace(max(0, -grid.first), rdp_epsilon / grid.step - grid.first, 6).astype(int)
    for point in points:
        eps = grid.step * (grid.first + point)
        exact = direct_delta(eps, segments, removed)
        assert exact * (1 - 1e-9) <= above[point] <= 1.005 * exact + 1e-8
        assert 0.995 * exact - 1e-8 <= below[point]
        target = 0.5 * below[point]
        if target < 1e-7:
            continue
        top = int(np.argmax(above <= target))
        found = pld.lower_index(below, above, epsilon_shift, target, grid.step, steps, top)
        eps = grid.step * (grid.first + found)
        assert target < direct_delta(eps, segments, removed)
        eps += 4 * grid.step  # not far away
        assert direct_delta(eps, segments, removed) <= target + 1e-8


@pytest.mark.parametrize("part", [2, 4, 8])
@pytest.mark.parametrize("removed", [True, False])
def test_what_wraps_around_is_accounted_for(part, removed):
    segments = [(0.1, 2.0, 5000)]
    grid = grid_for(segments, 1e-6)
    below, above, _ = pld.delta_curve(segments, grid, removed)
    small = grid._replace(points=grid.points // part)  # a window much too small for the sums
    below_small, above_small, _ = pld.delta_curve(segments, small, removed)
    assert (above_small >= below[:small.points]).all()
    assert (below_small <= above[:small.points]).all()


@pytest.mark.parametrize("segments, grid", [
    pytest.param([(0.9, 30.0, 400), (1.0, 30.0, 600)], pld.Grid(0.0075, -1700, 4096, 2.0, 1e-20),
                 id="steps multiply the errors"),
    pytest.param([(1.0, 1.0, 1)], pld.Grid(2.0, -400, 4096, 0.0025, 1e-20),
                 id="errors on the way back are large")])
@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_worst_fft_errors_stay_within_the_bounds(segments, grid, removed, sign, monkeypatch):
    products, size = [], 1e-6
    monkeypatch.setattr(pld, "irfft", lambda x, n: products.append(x) or irfft(x, n))
    below, above, _ = pld.delta_curve(segments, grid, removed)  # the truth is between
    # Every number errs as much as it may, so that all errors add up where the curve is largest.
    place = np.arange(grid.points // 2 + 1) / grid.points * np.argmax(irfft(products[0]))
    angle = np.angle(products[0]) + 2 * np.pi * place

    def worst_rfft(x: np.ndarray, n: int | None = None) -> np.ndarray:
        exact = rfft(x, n)
        turned = np.angle(exact) + (angle if n is None else -angle)  # gain's will be conjugated
        return exact + sign * size * x.sum() * np.exp(1j * turned)

    def worst_irfft(x: np.ndarray, n: int) -> np.ndarray:
        return irfft(x, n) + sign * size * (2 * np.abs(x).sum() - abs(x[0]) - abs(x[-1])) / n

    monkeypatch.setattr(pld, "FFT_ROUND_OFF", size)
    monkeypatch.setattr(pld, "rfft", worst_rfft)
    monkeypatch.setattr(pld, "irfft", worst_irfft)
    too_low, too_high, _ = pld.delta_curve(segments, grid, removed)
    assert (too_high >= below).all() and (too_low <= above).all()


@pytest.mark.parametrize("sigma, steps, delta, size", [
    (320.0, 1000, 1e-5, 1e-7),  # a shift of epsilon outweighs these errors
    (1.0, 2000, 0.3, 7e-6)])  # and this needs a factor on delta
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_worst_errors_of_one_step_stay_within_the_bounds(
        sigma, steps, delta, size, sign, monkeypatch):
    exact = brentq(lambda eps: gaussian_delta(eps, sigma / math.sqrt(steps)) - delta, 0, 2000)
    survival = pld.survival

    def worst_survival(*args: object) -> tuple[np.ndarray, np.ndarray]:
        above_p, above_q = survival(*args)  # above_q is multiplied by e^loss, which errs as well
        return above_p * (1 + sign * size), above_q * (1 - 2 * sign * size)

    monkeypatch.setattr(pld, "ROUND_OFF", size)
    monkeypatch.setattr(pld, "survival", worst_survival)
    lower, upper = pld.epsilon_bounds([(1.0, sigma, steps)], delta)
    assert lower <= exact <= upper


@pytest.mark.parametrize("sigma, steps, delta, coarsest", [
    (0.3, 1000, 1e-6, 64), (5.0, 1, 1e-3, 1024), (5.0, 7, 1e-8, 1024)])
def test_the_lower_bound_holds_on_a_coarse_grid(sigma, steps, delta, coarsest):
    segments = [(1.0, sigma, steps)]
    grid = grid_for(segments, delta)
    one = sigma / math.sqrt(steps)
    for coarser in (coarsest // 16, coarsest // 4, coarsest):
        coarse = grid._replace(step=grid.step * coarser, first=grid.first // coarser,
                               points=grid.points // coarser)
        below, above, epsilon_shift = pld.delta_curve(segments, coarse, True)
        top = int(np.argmax(above <= delta))
        found = pld.lower_index(below, above, epsilon_shift, delta, coarse.step, steps, top)
        lower, upper = (gaussian_delta(coarse.step * (coarse.first + i), one) for i in (found, top))
        assert 0 < found and upper <= delta < lower
    assert lower > 1.1 * delta  # what rounding does shows here


@pytest.mark.parametrize("delta", [1e-2, 1e-4])
def test_the_lower_bound_holds_where_rounding_is_worst(delta):
    steps, step, first = 100, 0.05, -600
    points = range(first - steps, first + 1200 + steps)
    exact = np.array([gaussian_delta(step * point, 1.0) for point in points])
    up = 1 / (1 + math.exp(-step / 2))
    noise = [math.comb(2 * steps, b) * up**b * (1 - up)**(2 * steps - b)
             for b in range(2 * steps + 1)]
    rounded = np.convolve(exact, noise, mode="valid")
    exact = exact[steps:-steps]
    top = int(np.argmax(rounded <= delta))
    found = pld.lower_index(rounded, rounded, 0.0, delta, step, steps, top)
    assert exact[found] > delta >= exact[found + 30]


def test_a_step_larger_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="one step's losses take"):
        pld.delta_curve([(0.1, 1.0, 5)], pld.Grid(1e-3, 0, 64, 1.0, 1e-9), True)


def test_a_loss_that_fills_the_grid_fits_into_it():
    # Rounded outwards, this plan's loss takes three points more than its span over the step.
    assert dp_sgd.make_plan(1330, 1330, 1, 0.1, 4, 1e-6, pld).noise_multiplier > 1


# ---- calibration -------------------------------------------------------------------------------

@pytest.mark.parametrize("q, steps, delta, target, sigma", by_id(CALIBRATION_ROWS))
def test_calibrated_noise_is_enough_and_hardly_more(q, steps, delta, target, sigma):
    got = pld.calibrate_noise(target, delta, q, steps)
    assert pld.epsilon(q, got, steps, delta) <= target
    by_rdp = accountant.calibrate_noise(target, delta, q, steps)
    assert sigma * (1 - 1e-4) <= got <= min(sigma * 1.002, by_rdp)


def test_noise_is_calibrated_to_what_earlier_steps_have_left():
    spent = [(0.01, 1.5, 200), (0.1, 8.0, 50)]
    sigma = pld.calibrate_noise(2.0, 1e-5, 0.02, 300, iter(spent))  # a generator is read once
    assert pld.total_epsilon([*spent, (0.02, sigma, 300)], 1e-5) <= 2.0
    assert pld.total_epsilon([*spent, (0.02, 0.999 * sigma, 300)], 1e-5) > 2.0
    assert sigma > pld.calibrate_noise(2.0, 1e-5, 0.02, 300)


def test_noise_below_the_limits_is_not_considered():
    least = pld.LIMITS["noise_multiplier"][0]
    assert pld.calibrate_noise(1e4, 1e-5, 0.01, 1) == pytest.approx(least)


# ---- bad arguments, and the command line -------------------------------------------------------

@pytest.mark.parametrize("q, sigma, steps, delta, name", [
    (1e-9, 0.3, 10**7, 1e-9, "sample_rate"), (0.1, 0.09, 10, 1e-5, "noise_multiplier"),
    (0.1, 1e5, 10**6, 1e-9, "noise_multiplier"), (0.1, 1.0, 10**7 + 1, 1e-5, "steps"),
    (0.1, 1.0, 10, 1e-16, "delta"), (0.1, 0.3, 10, 0.6, "delta")])
def test_beyond_its_limits_it_refuses(q, sigma, steps, delta, name):
    segments = [(0.1, 1.0, 5), (q, sigma, steps)]
    for function in (partial(pld.epsilon_bounds, segments, delta),
                     partial(pld.epsilon, q, sigma, steps, delta)):
        with pytest.raises(ValueError, match=f"the pld accountant needs a {name} from"):
            function()


def test_the_steps_of_all_segments_are_limited_together():
    segment = (0.1, 1.0, 6 * 10**6)
    with pytest.raises(ValueError, match="needs a steps from 1 to 1e[+]07, got 1.2e[+]07"):
        pld.epsilon_bounds([segment, segment], 1e-5)


@pytest.mark.parametrize("segments, delta", [
    ([(0.1, 0, 3)], 1e-5), ([(2, 1.0, 3)], 1e-5), ([(0.1, 1.0, -1)], 1e-5), ([], 0), ([], True)])
def test_bad_arguments_are_refused(segments, delta):
    with pytest.raises(ValueError, match="must be"):
        pld.epsilon_bounds(segments, delta)


COMMON = "--sample-rate 0.01 --steps 1000 --delta 1e-5 "


def test_the_command_line_prints_both_bounds(capsys):
    pld.main((COMMON + "--noise-multiplier 1.1").split())
    lower, upper = pld.epsilon_bounds([(0.01, 1.1, 1000)], 1e-5)
    printed = re.fullmatch(r"PLD: noise multiplier 1.1, epsilon from ([\d.]+) to ([\d.]+)\n",
                           capsys.readouterr().out)
    assert lower - 1e-5 <= float(printed[1]) <= lower < upper <= float(printed[2]) <= upper + 1e-5


def test_the_command_line_prints_the_noise_for_epsilon(capsys):
    pld.main((COMMON + "--eps 2").split())
    sigma = pld.calibrate_noise(2.0, 1e-5, 0.01, 1000)
    assert capsys.readouterr().out.startswith(f"PLD: noise multiplier {sigma:.9g}, epsilon from")


def test_the_command_line_refuses_beyond_the_limits(capsys):
    with pytest.raises(SystemExit) as stop:
        pld.main((COMMON + "--noise-multiplier 0.05").split())
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: the pld accountant needs a noise_multiplier from")
    assert printed.err.count("\n") == 1
