"""The RDP accountant against known values, direct quadrature, and its own promises.

The tables' numbers come from high-precision arithmetic and not from the code under test. RDP at
integer orders is the binomial sum at 60 digits, at fractional orders quadrature at 40 digits.
Epsilon and noise come from minimising over real orders.
"""

import math
from collections.abc import Callable
from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad

import accountant as acc

RDP_ROWS = [  # id, sample_rate, noise_multiplier, alpha, RDP. A491 and later are stress rows.
    ("A000", 0.001, 0.3, 1.25, 0.001274823062867107),
    ("A013", 0.001, 0.5, 2.5, 8.365779777209387e-05),
    ("A016", 0.001, 0.5, 16.5, 25.64658309011579),
    ("A019", 0.001, 0.5, 256, 505.0651554846297),
    ("A036", 0.001, 1.0, 16.5, 0.8967809334540799),
    ("A056", 0.001, 2.0, 16.5, 2.3538279025698838e-06),
    ("A071", 0.001, 20.0, 1.5, 1.877343352779702e-09),
    ("A081", 0.001, 100.0, 1.5, 7.500374637450384e-11),
    ("A091", 0.01, 0.3, 1.5, 0.10945248171067595),
    ("A104", 0.01, 0.5, 4, 1.8618755130319664),
    ("A110", 0.01, 0.7, 1.25, 0.0003795557916201885),
    ("A133", 0.01, 1.1, 2.5, 0.00016207740937000372),
    ("A159", 0.01, 5.0, 256, 0.5005308973523948),
    ("A178", 0.01, 100.0, 64, 3.2003564473638416e-07),
    ("A192", 0.032768, 0.5, 2, 0.055955456212771794),
    ("A239", 0.032768, 2.0, 256, 28.568292041220925),
    ("A269", 0.032768, 100.0, 256, 1.3755659363039503e-05),
    ("A302", 0.03333333333333333, 1.0, 2, 0.0019073818218196658),
    ("A349", 0.03333333333333333, 20.0, 256, 0.0003635030051275274),
    ("A393", 0.25, 1.0, 2.5, 0.14945084884393242),
    ("A455", 1.0, 0.3, 256, 1422.2222222222224),
    ("A486", 0.0, 0.3, 1.25, 0.0),
    ("A491", 1e-07, 0.1, 1.01, 4.003412322526395e-06),
    ("A494", 1e-06, 1.0, 27, 3.372888963403269e-11),
    ("A496", 0.99, 0.1, 256, 12799.989910251063),
    ("A498", 0.1, 1.0, 1.1, 0.008098568468073839),
    ("A499", 0.1, 1.0, 1.001, 0.007266016454122998),
    ("A500", 0.4, 12.0, 58.5, 0.03603111431281531),
    ("A501", 0.4, 12.0, 59.25, 0.03654470740350874),
    ("A503", 0.5, 2.0, 3.7, 0.1424856767767552),
    ("A504", 0.5, 0.5, 2.0, 2.667196088586043),
    ("A505", 0.75, 1.5, 5.5, 0.9277146508466797),
    ("A507", 0.01, 1.0, 10.9, 0.3876114113003889),
    ("A508", 0.04, 1.5, 1.1, 0.0004816567400342993),
    ("A509", 0.03333333333333333, 2.3, 512, 44.98534136176728),
    ("A513", 0.05, 0.2, 128, 1596.980679283347),
    ("A516", 0.05032868464704798, 12.0, 40.0, 0.0003575766888123725),
    ("A517", 0.002, 50.0, 700.5, 5.608250188961618e-07),
]
EPSILON_ROWS = [  # id, segments (sample_rate, noise_multiplier, steps), delta, epsilon, its order
    ("B01", [(0.004266666666666667, 1.3, 3516)], 1e-05, 0.9544868275779, 16.92),
    ("B02", [(0.004266666666666667, 0.7, 10547)], 1e-05, 6.317231450474, 3.76561),
    ("B03", [(0.004266666666666667, 1.1, 235)], 1e-05, 0.7313082352929, 12.7912),
    ("B06", [(1.024e-05, 0.1, 976563)], 1e-07, 1295.101479396, 1.02881),
    ("B07", [(0.01, 4.0, 10000)], 1e-05, 1.035384001944, 17.2199),
    ("B09", [(0.04, 1.5, 2250)], 1e-05, 7.32834991474, 3.941),
    ("B11", [(0.0010660980810234541, 1.0, 9380)], 1e-05, 0.8023812324287, 12.9271),
    ("B15", [(0.03333333333333333, 5.0, 1500)], 1e-05, 1.071578094325, 16.6581),
    ("B16", [(0.04, 0.9, 750)], 1e-05, 9.92717313713, 2.98241),
    ("B17", [(0.04, 4.555, 750)], 1e-05, 0.9999890850485, 17.5352),
    ("B19", [(0.05032868464704798, 1.3025, 1391)], 1e-06, 9.999977524009, 3.61859),
    ("B21", [(0.010666666666666666, 0.65, 938)], 1e-05, 6.981516525662, 3.10886),
    ("B22", [(0.032768, 1.1, 3052)], 1e-05, 11.48434154051, 2.99017),
    ("B23", [(0.01, 1.0, 1)], 1e-05, 0.9552687444275, 9.93551),
    ("B25", [(0.25, 2.0, 1)], 1e-06, 1.188083759871, 13.1316),
    ("B26", [(0.001, 5.0, 1)], 1e-05, 0.01356996674702, 345.463),
    ("B27", [(1.0, 1.0, 1)], 1e-05, 4.728386984943, 5.43185),
    ("B28", [(1.0, 10.0, 100)], 1e-05, 4.728386984943, 5.43185),
    ("B29", [(1.0, 50.0, 1000)], 1e-06, 3.131055680764, 8.63533),
    ("B31", [(1.0, 0.5, 1)], 1e-05, 10.72482411294, 3.27238),
    ("B32", [(1.0, 100.0, 1)], 1e-05, 0.03082093483056, 338.312),
    ("B35", [(0.0001, 0.7, 1000000)], 1e-07, 2.128007775114, 8.21672),
    ("B37", [(0.01, 0.3, 1000)], 1e-05, 78.37474401291, 1.27292),
    ("B39", [(0.001, 0.2, 10)], 1e-05, 26.70478651981, 1.46281),
    ("B40", [(0.01, 100.0, 1000)], 1e-05, 0.008607135088818, 963.617),
    ("B41", [(0.03333333333333333, 46.27, 6000)], 1e-05, 0.2000051916035, 69.2769),
    ("B42", [(0.1, 1000.0, 10)], 1e-05, 0.000586800045885, 7242.29),
    ("B44", [(0.01, 1.1, 1000)], 0.01, 0.7857593662378, 6.73654),
    ("B46", [(0.01, 1.1, 1000)], 1e-14, 3.995448646117, 10.3191),
    ("B48", [(0.25, 1.0, 10)], 1e-05, 6.813937534539, 3.29408),
    ("B49", [(0.9, 8.0, 100)], 1e-06, 5.989803727971, 5.35044),
    ("B51", [(0.04, 2.0, 500), (0.04, 3.0, 500)], 1e-05, 2.580806348894, 8.10674),
    ("G03", [(0.001, 20.0, 1000)], 1e-06, 0.005096814147267, 2199.98),
    ("G04", [(0.03333333333333333, 0.3, 6000)], 1e-05, 719.2873865936, 1.07583),
    ("G06", [(0.03333333333333333, 0.5, 6000)], 1e-05, 133.6117453222, 1.27526),
    ("G07", [(0.01, 0.4, 10000)], 1e-05, 108.1748064867, 1.28235),
    ("G08", [(0.004266666666666667, 1.1, 235)], 1e-05, 0.7313082352929, 12.7912),
    ("G09", [(0.01, 1.0, 1)], 1e-05, 0.9552687444275, 9.93551),
    ("G10", [(0.03333333333333333, 1.5445, 6000)], 1e-05, 9.99979565857, 3.32875),
    ("G12", [(0.03333333333333333, 30.0, 6000)], 1e-05, 0.3195005986924, 46.4348),
]
CALIBRATION_ROWS = [  # id, sample_rate, steps, delta, target epsilon, noise multiplier
    ("D01", 0.03333333333333333, 6000, 1e-05, 1, 10.49270064226),
    ("D02", 0.03333333333333333, 6000, 1e-05, 5, 2.577901769036),
    ("D03", 0.03333333333333333, 6000, 1e-05, 8, 1.802929351663),
    ("D06", 0.04, 750, 1e-05, 5, 1.299424420519),
    ("D07", 0.04, 750, 1e-05, 10, 0.8969427107059),
    ("D10", 0.05032868464704798, 1391, 1e-06, 8, 1.505379993516),
    ("D11", 0.05032868464704798, 1391, 1e-06, 10, 1.302498180031),
    ("D12", 0.004266666666666667, 14063, 1e-05, 1, 2.178080240761),
    ("D13", 0.004266666666666667, 14063, 1e-05, 8, 0.6780112929419),
    ("D14", 1.0, 100, 1e-05, 1, 40.45130358292),
    ("D16", 1.0, 1, 1e-06, 0.2, 20.55532764796),
    ("D18", 0.04, 2250, 1e-05, 8, 1.415748685813),
    ("D21", 0.5, 500, 1e-05, 5, 10.70576063734),
]


def by_id(rows: list[tuple]) -> list:
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


def binomial_rdp(q: float, sigma: float, alpha: int) -> float:
    """RDP at an integer order by its finite sum, 60 digits (Mironov, Talwar, Zhang 2019, 3.3)."""
    with localcontext() as context:
        context.prec = 60
        q, sigma = Decimal(q), Decimal(sigma)
        terms = (
            math.comb(alpha, k) * (1 - q) ** (alpha - k) * q**k
            * ((k * k - k) / (2 * sigma**2)).exp()
            for k in range(alpha + 1)
        )
        return float(sum(terms).ln() / (alpha - 1))


def renyi_divergences(q: float, sigma: float, alpha: float) -> tuple[float, float]:
    """(with against without the example, without against with) by quadrature of the densities."""

    def divergence(power: float) -> float:
        def integrand(z: float) -> float:
            log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
            density = math.exp(power * log_ratio - z * z / (2 * sigma**2))
            return density / (sigma * math.sqrt(2 * math.pi))

        cuts = np.linspace(-9 * sigma, alpha + 9 * sigma, 12)
        total = sum(quad(integrand, a, b, epsabs=0, epsrel=1e-11)[0] for a, b in pairwise(cuts))
        return math.log(total) / (alpha - 1)

    return divergence(alpha), divergence(1 - alpha)


# ---- one step ----------------------------------------------------------------------------------

@pytest.mark.parametrize("q, sigma, alpha, rdp", by_id(RDP_ROWS))
def test_rdp_known_values(q, sigma, alpha, rdp):
    assert acc.rdp_sampled_gaussian(q, sigma, alpha) == pytest.approx(rdp, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("q", [0.003, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [1.05, 1.7, 2.0, 4.5, 13.25])
def test_rdp_is_the_renyi_divergence_of_the_worse_direction(q, sigma, alpha):
    with_against_without, without_against_with = renyi_divergences(q, sigma, alpha)
    got = acc.rdp_sampled_gaussian(q, sigma, alpha)
    assert got == pytest.approx(with_against_without, rel=1e-6, abs=1e-12)
    assert with_against_without >= without_against_with - 1e-12


# Orders around 2 sigma^2 log(1/q), where the integrand has two peaks that both count.
@pytest.mark.parametrize("q, sigma", [(1e-3, 5.0), (1e-2, 2.0), (1e-4, 1.0), (0.05, 8.0),
                                      (1e-6, 3.0)])
@pytest.mark.parametrize("factor", [0.7, 0.97, 1.0, 1.03, 1.3])
def test_rdp_where_both_peaks_count(q, sigma, factor):
    alpha = max(2, round(factor * 2 * sigma**2 * math.log(1 / q)))
    expected = binomial_rdp(q, sigma, alpha)
    assert acc.rdp_sampled_gaussian(q, sigma, alpha) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("q, sigma", [(0.01, 1.0), (0.2, 0.3), (1e-5, 4.0)])
def test_rdp_is_smooth_and_rises_in_the_order(q, sigma):
    # Integer and fractional orders must lie on one curve, down to the KL divergence at alpha -> 1.
    orders = np.concatenate([1 + np.logspace(-9, -1, 20), np.arange(1.2, 40, 0.1)])
    rdp = np.array([acc.rdp_sampled_gaussian(q, sigma, a) for a in orders])
    assert np.all(np.diff(rdp) > 0)
    assert rdp[0] == pytest.approx(rdp[1], rel=1e-7)
    moments = rdp[20:] * (orders[20:] - 1)  # a cumulant generating function: convex in the order
    assert np.all(np.diff(moments, 2) > -1e-12 * moments[2:])


@pytest.mark.parametrize("q, sigma", [(0.01, 0.3), (0.5, 2.0), (0.999, 1.0), (1e-7, 30.0)])
@pytest.mark.parametrize("alpha", [1.001, 3.3, 64, 5000.5])
def test_rdp_is_below_the_unsampled_gaussian(q, sigma, alpha):
    assert 0 < acc.rdp_sampled_gaussian(q, sigma, alpha) < alpha / (2 * sigma**2)


def test_rdp_without_sampling_and_without_release():
    assert acc.rdp_sampled_gaussian(1, 2.0, 7.5) == pytest.approx(7.5 / 8, rel=1e-15)
    assert acc.rdp_sampled_gaussian(1 - 1e-12, 2.0, 7.5) == pytest.approx(7.5 / 8, rel=1e-9)
    assert acc.rdp_sampled_gaussian(0, 2.0, 7.5) == 0.0


def test_less_noise_than_the_grid_resolves_is_bounded():
    # By the unsampled Gaussian, which is never too small.
    assert acc.rdp_sampled_gaussian(0.1, 1e-3, 2) == pytest.approx(1e6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("q", [1e-300, 1e-9, 0.5, 1 - 1e-16])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 50.0, 1e9])
@pytest.mark.parametrize("alpha", [1 + 1e-10, 1.5, 2000.5, 1e7])
def test_rdp_at_extremes_is_finite(q, sigma, alpha):
    bound = alpha / (2 * sigma**2) * (1 + 1e-12)
    assert 0 <= acc.rdp_sampled_gaussian(q, sigma, alpha) <= bound


# ---- many steps --------------------------------------------------------------------------------

@pytest.mark.parametrize("segments, delta, eps, order", by_id(EPSILON_ROWS))
def test_epsilon_known_values(segments, delta, eps, order):
    got, at = acc.epsilon_and_order(segments, delta)
    assert got == pytest.approx(eps, rel=1e-8)
    assert at == pytest.approx(order, rel=1e-3)
    # The number returned is the conversion bound at the order returned, not something near it.
    bound = acc.compose_rdp(segments, at) + math.log1p(-1 / at) - math.log(delta * at) / (at - 1)
    assert got == pytest.approx(bound, rel=1e-12)


def test_epsilon_is_monotone():
    in_sigma = [acc.epsilon(0.02, s, 500, 1e-5) for s in np.geomspace(0.005, 500, 40)]
    counts = (0, 1, 2, 5, 10, 100, 1000, 10**6, 10**9)
    in_steps = [acc.epsilon(0.02, 1.1, steps, 1e-5) for steps in counts]
    rates = (0, 1e-9, 1e-6, 1e-3, 0.01, 0.1, 0.5, 0.99, 1)
    in_q = [acc.epsilon(q, 1.1, 100, 1e-5) for q in rates]
    in_delta = [acc.epsilon(0.02, 1.1, 500, d) for d in (1e-300, 1e-14, 1e-5, 1e-2, 0.5)]
    assert np.all(np.diff(in_sigma) < 0)
    assert np.all(np.diff(in_steps) > 0)
    assert np.all(np.diff(in_q) > 0)
    assert np.all(np.diff(in_delta) < 0)


def test_segments_add_up():
    parts = [(0.04, 2.0, 200), (0.04, 2.0, 300), (0.3, 1.0, 0), (0.0, 1.0, 1000)]
    expected = acc.epsilon(0.04, 2.0, 500, 1e-5)
    assert acc.total_epsilon(parts, 1e-5) == pytest.approx(expected, rel=1e-9)
    assert acc.compose_rdp(parts, 3.5) == pytest.approx(
        500 * acc.rdp_sampled_gaussian(0.04, 2.0, 3.5), rel=1e-12)
    assert acc.compose_rdp([], 3.5) == 0


def test_segments_from_a_generator_are_read_once():
    # Read as empty the second time, they would claim epsilon 0, or nothing spent.
    one = [(0.04, 2.0, 500)]
    assert acc.epsilon_and_order(iter(one), 1e-5) == acc.epsilon_and_order(one, 1e-5)
    assert acc.compose_rdp(iter(one), 3.5) == acc.compose_rdp(one, 3.5)
    spent = [acc.calibrate_noise(2.5, 1e-5, 0.02, 300, kind(one)) for kind in (list, iter)]
    assert spent[0] == spent[1] > acc.calibrate_noise(2.5, 1e-5, 0.02, 300)


def test_what_releases_nothing_costs_nothing():
    assert acc.epsilon(0.01, 1.0, 0, 1e-5) == 0.0
    assert acc.epsilon(0.0, 1.0, 100, 1e-5) == 0.0
    assert acc.epsilon_and_order([], 1e-5) == (0.0, math.inf)


def test_epsilon_is_never_negative_and_may_be_infinite():
    assert acc.epsilon(0.01, 1e9, 100, 1e-5) == 0.0  # the bound is negative at a high order
    assert acc.epsilon(0.01, 1.0, 1, 0.999) == 0.0
    assert acc.epsilon(0.01, 1e-200, 1, 1e-5) == math.inf


def test_numpy_scalars_are_numbers():
    scalars = np.float64(0.04), np.float32(1.5), np.int64(9), np.float64(1e-5)
    assert acc.epsilon(*scalars) == acc.epsilon(0.04, 1.5, 9, 1e-5)


# ---- calibration -------------------------------------------------------------------------------

@pytest.mark.parametrize("q, steps, delta, target, sigma", by_id(CALIBRATION_ROWS))
def test_calibration_known_values(q, steps, delta, target, sigma):
    assert acc.calibrate_noise(target, delta, q, steps) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("target", [1e-4, 1e-2, 0.3, 3, 50, 1000.0])
@pytest.mark.parametrize("q, steps, delta", [(0.01, 100, 1e-5), (1.0, 7, 1e-9),
                                             (1e-4, 10**6, 1e-7)])
def test_calibration_is_safe_and_tight(q, steps, delta, target):
    sigma = acc.calibrate_noise(target, delta, q, steps)
    assert acc.epsilon(q, sigma, steps, delta) <= target
    assert acc.epsilon(q, sigma * (1 - 1e-6), steps, delta) > target


def test_noise_is_calibrated_to_what_earlier_steps_have_left():
    spent = [(0.01, 1.5, 200), (0.1, 8.0, 50)]
    sigma = acc.calibrate_noise(2.0, 1e-5, 0.02, 300, spent)
    assert acc.total_epsilon([*spent, (0.02, sigma, 300)], 1e-5) <= 2.0
    assert acc.total_epsilon([*spent, (0.02, 0.999 * sigma, 300)], 1e-5) > 2.0
    assert sigma > acc.calibrate_noise(2.0, 1e-5, 0.02, 300)


def test_calibration_stays_within_its_limits():
    assert acc.calibrate_noise(1e9, 1e-5, 0.01, 100) == pytest.approx(acc.MIN_SIGMA)
    with pytest.raises(ValueError, match="no noise multiplier up to"):
        acc.calibrate_noise(1e-13, 1e-14, 0.01, 100)


@pytest.mark.parametrize("q, steps", [(0.01, 0), (0.0, 100)])
def test_calibrating_nothing_is_refused(q, steps):
    with pytest.raises(ValueError, match="zero steps need no noise"):
        acc.calibrate_noise(1.0, 1e-5, q, steps)


# ---- bad arguments -----------------------------------------------------------------------------

GOOD = {
    acc.rdp_sampled_gaussian: {"sample_rate": 0.1, "noise_multiplier": 1.0, "alpha": 2.5},
    acc.epsilon: {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 3, "delta": 1e-5},
    acc.calibrate_noise: {"target_epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.1, "steps": 3},
}
BAD = {
    "sample_rate": [-0.1, 1.5],
    "noise_multiplier": [0, -1.0, Fraction(1, 10**400)],
    "alpha": [1, 1.0, 0.5, -2, 1e8, Fraction(10**20 + 1, 10**20)],
    "steps": [-1, 2.5, 3.0, 2**63],
    "delta": [0, 0.0, 1, 2.0, -1e-5],
    "target_epsilon": [0, -1.0],
}
NEVER_ALLOWED = [math.nan, math.inf, -math.inf, True, False, "1", None, [1], 10**400, 1j,
                 np.ones(2)]


@pytest.mark.parametrize("function, name", [(f, n) for f in GOOD for n in GOOD[f]])
def test_bad_arguments_are_named(function: Callable, name: str):
    for value in BAD[name] + NEVER_ALLOWED:
        with pytest.raises(ValueError, match=f"^{name} must be (a|an) ") as error:
            function(**{**GOOD[function], name: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("segments, name", [
    ([(0.1, 1.0, 3), (0.1, 0.0, 3)], "noise_multiplier"),
    ([(0.0, math.nan, 0)], "noise_multiplier"),  # even if nothing is released
    ([(0.1, 1.0, -3)], "steps"), ([(2, 1.0, 3)], "sample_rate")])
def test_bad_segments_are_named(segments, name):
    for function in (acc.epsilon_and_order, acc.total_epsilon, acc.compose_rdp):
        with pytest.raises(ValueError, match=f"{name} must be"):
            function(segments, 2 if function is acc.compose_rdp else 1e-5)


# ---- command line ------------------------------------------------------------------------------

COMMON = "--sample-rate 0.01 --steps 1000 --delta 1e-5 "


def test_the_command_line_prints_epsilon(capsys):
    acc.main((COMMON + "--noise-multiplier 1.1").split())
    printed = capsys.readouterr().out
    assert printed == "RDP: noise multiplier 1.1, epsilon 1.71172, best order 9.56811\n"


def test_the_command_line_prints_the_noise_for_epsilon(capsys):
    acc.main((COMMON + "--eps 2").split())
    sigma = acc.calibrate_noise(2.0, 1e-5, 0.01, 1000)
    assert capsys.readouterr().out.startswith(f"RDP: noise multiplier {sigma:.9g}, epsilon 2,")


@pytest.mark.parametrize("arguments", [
    "--sample-rate 2 --steps 10 --delta 1e-5 --eps 1",
    "--sample-rate 0.1 --steps x --delta 1e-5 --eps 1",
    "--sample-rate 0.1 --steps 10 --delta 1e-5",
    "--sample-rate 0.1 --steps 10 --delta 1e-5 --eps 1 --noise-multiplier 1",
    "--sample-rate 0.1 --steps 10 --delta 1e-5 --eps nan",
    "--sample-rate 0.1 --steps 10 --delta 0 --eps 1", ""])
def test_the_command_line_refuses_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        acc.main(arguments.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


# ---- what is said ------------------------------------------------------------------------------

@pytest.mark.parametrize("epsilon, digits, above, below", [
    (1.004, 3, "1.01", "1"), (0.20049, 3, "0.201", "0.2"), (1.0, 3, "1", "1"),
    (2.99999999, 5, "3", "2.9999"), (83_644.4, 3, "83700", "83600"), (0.0, 5, "0", "0"),
    (3e-7, 1, "0.0000003", "0.0000002"), (math.inf, 5, "inf", "inf")])
def test_what_is_said_is_never_less_than_what_is_spent(epsilon, digits, above, below):
    assert acc.in_words(epsilon, digits) == above
    assert acc.in_words(epsilon, digits, ROUND_FLOOR) == below
    assert float(below) <= epsilon <= float(above)
