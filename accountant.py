"""Privacy accountant: how much privacy does a run of DP-SGD spend?

One step of DP-SGD draws each of the N training examples with probability q (Poisson sampling), sums
their clipped gradients and adds Gaussian noise of standard deviation sigma times the clipping norm.
Two data sets are neighbours when one is the other with one example added or removed; N is public.

The privacy loss is the log ratio of the output densities under two neighbours. A Renyi-DP (RDP)
accountant bounds it by its moments: RDP(alpha) = log E[exp((alpha - 1) loss)] / (alpha - 1). Moments
of independent steps multiply, so RDP simply adds up over steps, also over steps with different q or
sigma. At the end every order alpha > 1 turns the total into a valid (epsilon, delta) statement, and we
keep the order with the smallest epsilon. The claim is for the whole run and all its intermediate
weights, and it holds only if the batches really are Poisson samples.

A privacy-loss-distribution (PLD) accountant follows the whole distribution of the loss instead of its moments:
pld.py. Its epsilon is smaller, and it takes longer. It gives two bounds, between which the true epsilon lies.

All logarithms are natural, so RDP and epsilon are in nats. Sources:
  Mironov 2017, arXiv 1702.07476: Renyi differential privacy and its composition (Proposition 1).
  Mironov, Talwar, Zhang 2019, arXiv 1908.10530: RDP of the sampled Gaussian, section 3.
  Balle et al. 2020, arXiv 1905.09982, Theorem 21; Canonne, Kamath, Steinke 2020, arXiv 2004.00010,
  Proposition 12: from RDP to (epsilon, delta).
  Trefethen, Weideman 2014, SIAM Review 56(3): why the trapezoidal rule is so accurate here.
"""

import argparse
import functools
import math
import numbers

import numpy as np
from scipy.optimize import brentq, minimize_scalar

import pld

ACCOUNTANTS = ("rdp", "pld")
# alpha - 1 is searched in this range. Any order gives a valid bound, so the limits cost tightness only (and
# only where epsilon is around 1e-6 or smaller, or in the millions).
MIN_ORDER_GAP, MAX_ORDER_GAP = 1e-10, 1e7
# The quadrature grid must resolve sigma; with less noise than this nothing is private anyway.
MIN_SIGMA, MAX_SIGMA = 1e-2, 1e12

_RULES = {
    "sample_rate": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
    "noise_multiplier": (lambda v: v > 0, "a finite number > 0"),
    "alpha": (lambda v: 1 < v <= 1 + MAX_ORDER_GAP, f"a number in (1, 1 + {MAX_ORDER_GAP:g}]"),
    "steps": (lambda v: 0 <= v < 2**63, "an integer >= 0 (below 2**63)"),
    "delta": (lambda v: 0 < v < 1, "a number in (0, 1), both ends excluded"),
    "target_epsilon": (lambda v: v > 0, "a finite number > 0"),
}


def _check(**arguments):
    """Raise ValueError for the first argument out of its domain: the one place where inputs are checked."""
    for name, value in arguments.items():
        if name == "accountant":
            if value not in ACCOUNTANTS:
                raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {value!r}")
            continue
        inside, allowed = _RULES[name]
        kind = numbers.Integral if name == "steps" else numbers.Real
        # bool is an int to Python; True as a rate or a step count is a mistake in the caller's arguments.
        valid = isinstance(value, kind) and not isinstance(value, bool)
        try:
            # As a float, since that is what we compute with: a fraction may round to 0 or 1 there.
            valid = valid and math.isfinite(value) and inside(value if name == "steps" else float(value))
        except OverflowError:  # an int beyond the range of a float
            valid = False
        if not valid:
            raise ValueError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")


@np.errstate(divide="ignore", over="ignore", under="ignore")  # the branch not taken may do anything
def _log_integrand(x, q, sigma, alpha):
    """log of phi(x) ((1 + w)^alpha - 1 - alpha w) / (alpha - 1), phi the standard normal density.

    w = q (exp(L) - 1), L = x/sigma - 1/(2 sigma^2): 1 + w is the density ratio at the output z = sigma x.
    """
    gap = alpha - 1
    log_ratio = x / sigma - 0.5 / sigma / sigma
    w = q * np.expm1(np.minimum(log_ratio, 700))
    u = np.where(  # u = log(1 + w): log1p is exact for small w, the other form cannot overflow
        log_ratio < 700, np.log1p(w), np.logaddexp(math.log1p(-q), math.log(q) + log_ratio)
    )
    # Small w: the two subtracted terms cancel almost everything, so sum the binomial series from k = 2.
    # With alpha |w| < 0.01, five terms leave a relative error below 1e-11.
    small = alpha * np.abs(w) < 0.01
    ws = np.where(small, w, 0)
    series = 1 + (alpha - 4) / 5 * ws * (1 + (alpha - 5) / 6 * ws)
    series = 1 + (alpha - 2) / 3 * ws * (1 + (alpha - 3) / 4 * ws * series)
    # Other w: e^u (e^(gap u) - 1)/gap - w = e^u (e^(gap u) - 1)/gap * (1 - r). Its factors have one sign
    # for w > 0 and the other for w < 0; gap divides exactly, so orders next to 1 lose no digits.
    us = np.where(small, 1, u)
    log_small = math.log(alpha / 2) + 2 * np.log(np.abs(ws)) + np.log(series)
    r = -gap * np.expm1(-us) / np.expm1(gap * us)
    log_large = us + np.maximum(gap * us, 0) + np.log(-np.expm1(-np.abs(gap * us)) / gap)
    log_large += np.log(np.abs(1 - r))
    return np.where(small, log_small, log_large) - 0.5 * x * x - 0.5 * math.log(2 * math.pi)


def _rdp_step(q, sigma, alpha):
    """RDP of one step at one order, for checked arguments. See rdp_sampled_gaussian."""
    if q == 0:
        return 0.0
    if q == 1 or sigma < MIN_SIGMA:  # no sampling: exact for q = 1, an upper bound for any other q
        return alpha / 2 / sigma / sigma
    if (alpha - 1) / sigma / sigma > 100 - 2 * math.log(q):
        # (q e^L)^alpha is all that counts in E[(1 + w)^alpha]; the rest is smaller by a factor e^-30 or less.
        return alpha / (alpha - 1) * math.log(q) + alpha / 2 / sigma / sigma
    # The integrand is analytic for |Im x| < pi sigma (there 1 + w = 0) and has a Gaussian's tails, so the
    # trapezoidal rule converges like exp(-2 pi^2 sigma / step): this step leaves below 1e-16.
    step = min(0.4, sigma / 2)
    # Its log has slope <= max(alpha, 2)/sigma - x, so outside this range are Gaussian tails of 10 sd. There
    # can be two peaks, near 0 and near alpha/sigma, and either may win: the range must hold both.
    low, high = -10.0, max(alpha, 2) / sigma + 10
    values = _log_integrand(np.arange(low, high, step), q, sigma, alpha)
    peak = values.max()
    if peak == -np.inf:  # w underflows to 0 everywhere
        return 0.0
    # E[w] = 0, so the integral is (A - 1)/(alpha - 1) with A = E[(1 + w)^alpha]. RDP is log A/(alpha - 1).
    log_excess = peak + math.log(np.exp(values - peak).sum() * step * (alpha - 1))
    log_moment = math.log1p(math.exp(log_excess)) if log_excess < 30 else log_excess
    return float(log_moment / (alpha - 1))


def _checked(segments):
    """The segments as a list (a generator could be read only once), every number in it checked."""
    segments = list(segments)
    for q, sigma, steps in segments:
        _check(sample_rate=q, noise_multiplier=sigma, steps=steps)
    return segments


def _total_rdp(segments, alpha):
    """RDP of all segments, for checked arguments. See compose_rdp."""
    return sum(steps * _rdp_step(float(q), float(sigma), alpha) for q, sigma, steps in segments)


def rdp_sampled_gaussian(sample_rate, noise_multiplier, alpha) -> float:
    """RDP in nats of one step of the Poisson-sampled Gaussian mechanism at one real order alpha > 1.

    sample_rate is q, a probability; noise_multiplier is sigma, the noise's standard deviation in units of
    the sensitivity (add or remove one example). With z ~ N(0, sigma^2) the value is
        log E[(1 - q + q exp((2z - 1)/(2 sigma^2)))^alpha] / (alpha - 1),
    the larger of the two directions: with the example against without it (Mironov, Talwar, Zhang 2019,
    section 3). Section 3.3 expands it in series, whose terms alternate in sign at fractional orders; we
    integrate it numerically instead, without its first two terms (1 and alpha w, whose mean is 0), so
    that values near 0 keep their digits and integer and fractional orders need one method only. Below
    sigma = 0.01 the value is the upper bound alpha/(2 sigma^2). Raises ValueError for bad arguments.
    """
    _check(sample_rate=sample_rate, noise_multiplier=noise_multiplier, alpha=alpha)
    return _rdp_step(float(sample_rate), float(noise_multiplier), float(alpha))


def compose_rdp(segments, alpha) -> float:
    """RDP in nats at order alpha of all segments [(sample_rate, noise_multiplier, steps), ...] together.

    RDP at one order adds up over steps (Mironov 2017, Proposition 1). Raises ValueError as above.
    """
    segments = _checked(segments)
    _check(alpha=alpha)
    return _total_rdp(segments, float(alpha))


def epsilon_and_order(segments, delta) -> tuple[float, float]:
    """(epsilon in nats, order alpha that gives it) of segments [(sample_rate, noise_multiplier, steps), ...].

    epsilon is the minimum over real alpha > 1 of
        RDP(alpha) + log((alpha - 1)/alpha) - (log delta + log alpha)/(alpha - 1),
    not below 0 (Canonne, Kamath, Steinke 2020, Proposition 12; Balle et al. 2020, Theorem 21). It is always
    this bound at the order returned, never interpolated, so stopping short of the minimum is safe. When
    nothing is released it is (0.0, inf). Raises ValueError for bad arguments.
    """
    _check(delta=delta)
    released = [(q, sigma, steps) for q, sigma, steps in _checked(segments) if q > 0 and steps > 0]
    if not released:
        return 0.0, math.inf

    def bound(log_gap):
        alpha = 1 + math.exp(log_gap)
        conversion = math.log1p(-1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)
        return _total_rdp(released, alpha) + conversion

    # (alpha - 1) times the bound is convex in alpha, so the bound has a single valley: walk downhill in
    # steps of log(alpha - 1) until it rises on both sides, then refine. The start is the best order for a
    # Gaussian with the same RDP at alpha = 2.
    lowest, highest = math.log(MIN_ORDER_GAP), math.log(MAX_ORDER_GAP)
    slope = max(_total_rdp(released, 2.0) / 2, 1e-300)
    if slope == math.inf:
        return math.inf, 2.0
    start = 0.5 * (math.log(-math.log(delta)) - math.log(slope))
    center = min(max(start, lowest), highest)
    value = bound(center)
    for direction in (-1, 1):
        while lowest <= center + direction <= highest and (beside := bound(center + direction)) < value:
            center, value = center + direction, beside
    limits = (max(center - 1, lowest), min(center + 1, highest))
    best = minimize_scalar(bound, bounds=limits, method="bounded", options={"xatol": 1e-7})
    if best.fun < value:
        center, value = best.x, best.fun
    return max(0.0, float(value)), 1 + math.exp(center)


def _pld_bounds(segments, delta):
    """See epsilon_bounds."""
    segments = [(float(q), float(sigma), int(steps)) for q, sigma, steps in _checked(segments) if q > 0 and steps > 0]
    rdp, order = epsilon_and_order(segments, delta)
    return (0.0, 0.0) if rdp == 0 else pld.bounds(segments, float(delta), rdp, order)


def epsilon_bounds(segments, delta) -> tuple[float, float]:
    """(lower, upper) in nats: the epsilon of segments [(sample_rate, noise_multiplier, steps), ...] by PLD.

    The smallest epsilon at which these mechanisms are (epsilon, delta)-DP lies between the two; upper is a
    guarantee as RDP's is, and never above it. They differ by 1% at most (0.01 where epsilon < 1) for sample
    rates from 1e-5, noise multipliers from 0.3 to 100, up to 10^6 steps and delta from 1e-8 to 1e-5, tested on
    a grid of these; elsewhere they hold, but may be wider. Raises ValueError for bad arguments and beyond
    pld.LIMITS, unless RDP finds epsilon 0 already.
    """
    return _pld_bounds(segments, delta)


def total_epsilon(segments, delta, accountant="rdp") -> float:
    """Smallest provable epsilon in nats at this delta of segments [(sample_rate, noise_multiplier, steps), ...].

    By RDP (see epsilon_and_order) or by PLD (the upper one of epsilon_bounds: smaller, and slower to compute).
    Raises ValueError as these do, and for an accountant not in ACCOUNTANTS.
    """
    _check(accountant=accountant)
    return epsilon_and_order(segments, delta)[0] if accountant == "rdp" else _pld_bounds(segments, delta)[1]


def epsilon(sample_rate, noise_multiplier, steps, delta, accountant="rdp") -> float:
    """Smallest provable epsilon in nats at this delta after so many equal steps: see total_epsilon.

    sample_rate and delta are probabilities, noise_multiplier is in units of the sensitivity. Zero
    steps or sample_rate 0 release nothing: 0.0. Raises ValueError for bad arguments, which includes an
    accountant not in ACCOUNTANTS.
    """
    return total_epsilon([(sample_rate, noise_multiplier, steps)], delta, accountant)


def calibrate_noise(target_epsilon, delta, sample_rate, steps, accountant="rdp", spent=()) -> float:
    """Smallest noise multiplier (to about 1e-7 relative; 1e-5 by PLD) for which epsilon() is within the target.

    target_epsilon is in nats. epsilon() at the returned value never exceeds it. Values below 0.01 (0.1 by PLD)
    are not considered. Raises ValueError for bad arguments, when nothing is released (zero steps or
    sample_rate 0: then any noise will do), and when even noise 1e12 (1e4 by PLD) does not reach the target.
    `spent` holds segments [(sample_rate, noise_multiplier, steps), ...] that count towards the target as well.
    """
    _check(target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, steps=steps)
    _check(accountant=accountant)
    if steps == 0 or sample_rate == 0:
        raise ValueError(f"zero steps need no noise, nor does sample_rate 0: got {steps=}, {sample_rate=}")
    least, most, precision, low, high = MIN_SIGMA, MAX_SIGMA, 1e-8, math.log(0.5), math.log(2.0)
    if accountant == "pld":  # RDP's noise is enough, and hardly ever twice what is needed
        least, most, precision = *pld.LIMITS["noise_multiplier"], 1e-6
        enough = calibrate_noise(target_epsilon, delta, sample_rate, steps, spent=spent)
        high = math.log(min(max(enough, least), most))
        low = max(high - 0.1, math.log(least))

    @functools.cache  # the search asks for its ends several times
    def total(log_sigma):
        return total_epsilon([*spent, (sample_rate, math.exp(log_sigma), steps)], delta, accountant)

    def excess(log_sigma):  # log-log is close to a straight line, which brentq follows in few steps
        return math.log(max(total(log_sigma), 1e-300) / target_epsilon)

    while low > math.log(least) and excess(low) <= 0:
        low, high = max(low - 1, math.log(least)), low
    while high < math.log(most) and excess(high) > 0:
        low, high = high, min(high + 1, math.log(most))
    if excess(high) > 0:
        raise ValueError(f"no noise multiplier up to {most:g} reaches {target_epsilon=} at {delta=}")
    log_sigma = low if excess(low) <= 0 else brentq(excess, low, high, xtol=precision)
    stride = 5 * precision
    while total(log_sigma) > target_epsilon:
        log_sigma, stride = log_sigma + stride, 2 * stride  # the root may lie on the unsafe side: step over
    return math.exp(log_sigma)


def main(argv=None):
    """The command line. Bad input ends with one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description="Epsilon of DP-SGD, or the noise for an epsilon, by RDP and by PLD.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # without the usage: one line
    parser.add_argument("--sample-rate", type=float, required=True, help="probability of an example to be drawn")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--delta", type=float, required=True)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--noise-multiplier", type=float, help="the noise's standard deviation / the clipping norm")
    given.add_argument("--eps", type=float, help="calibrate the noise multiplier to this epsilon")
    args = parser.parse_args(argv)
    for name in ACCOUNTANTS:
        sigma = args.noise_multiplier
        try:
            if sigma is None:
                sigma = calibrate_noise(args.eps, args.delta, args.sample_rate, args.steps, name)
            segments = [(args.sample_rate, sigma, args.steps)]
            text = "epsilon {:.6g}, best order {:.6g}".format(*epsilon_and_order(segments, args.delta))
            if name == "pld":
                text = "epsilon from {:.6g} to {:.6g}".format(*epsilon_bounds(segments, args.delta))
            print(f"{name.upper()}: noise multiplier {sigma:.9g}, {text}")
        except ValueError as error:
            if name == "rdp":
                parser.error(str(error))
            print(f"{name.upper()}: {error}")   # RDP, which reaches further, has answered


if __name__ == "__main__":
    main()
