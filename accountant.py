"""Privacy accountant: how much privacy does a run of DP-SGD spend?

A step draws each of the N training examples with probability q (Poisson sampling), sums their
clipped gradients and adds Gaussian noise of standard deviation sigma times the clipping norm.
Neighbouring data sets differ by one example, added or removed; N is public. With P and Q the laws
of the output on two neighbours, (epsilon, delta)-DP is P(S) <= exp(epsilon) Q(S) + delta for any S.

The privacy loss is log P/Q at an output drawn from P. Renyi-DP (RDP) bounds it by its moments:
RDP(alpha) = log E[exp((alpha - 1) loss)] / (alpha - 1). Moments of steps multiply, so RDP adds up
over steps, whatever their q and sigma. Every order alpha > 1 turns the total into a valid epsilon
at a given delta; we keep the smallest. It covers the whole run and all its intermediate weights,
and holds only if batches really are Poisson samples. variants/pld.py is tighter, and slower.

All logarithms are natural, so RDP and epsilon are in nats. Sources:
  Mironov 2017, arXiv 1702.07476, Proposition 1: RDP adds up over steps.
  Mironov, Talwar, Zhang 2019, arXiv 1908.10530, section 3: RDP of the sampled Gaussian.
  Balle et al. 2020, arXiv 1905.09982, Theorem 21: from RDP to (epsilon, delta). Also in Canonne,
  Kamath, Steinke 2020, arXiv 2004.00010, Proposition 12.
"""

if __name__ == "__main__":   # Ctrl-C and `| head -1` leave no traceback
    from signal import SIG_DFL, SIG_IGN, SIGINT, SIGPIPE, getsignal, signal
    signal(SIGPIPE, SIG_DFL)
    signal(SIGINT, SIG_DFL if getsignal(SIGINT) != SIG_IGN else SIG_IGN)

import argparse
import decimal
import functools
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.optimize import brentq, minimize_scalar

Segments = Iterable[tuple[float, float, int]]  # (sample_rate, noise_multiplier, steps), ...
MIN_ORDER_GAP, MAX_ORDER_GAP = 1e-10, 1e7  # alpha - 1 is searched here: any order gives a bound
MIN_SIGMA, MAX_SIGMA = 1e-2, 1e12  # a grid must resolve sigma; less noise is not private anyway


def rdp_sampled_gaussian(sample_rate: float, noise_multiplier: float, alpha: float) -> float:
    """RDP in nats of one step at one real order alpha > 1. ValueError for bad arguments.

    sample_rate is q; noise_multiplier is sigma, in units of the sensitivity. Without the example
    the output is z ~ N(0, sigma^2); with it, N(1, sigma^2) with probability q. The density ratio is
    1 + w = 1 - q + q exp((2z - 1)/(2 sigma^2)), and RDP is log E[(1 + w)^alpha] / (alpha - 1). The
    other direction, without against with, is never larger (Mironov, Talwar, Zhang 2019, section 3).
    """
    _check(sample_rate=sample_rate, noise_multiplier=noise_multiplier, alpha=alpha)
    q, sigma, alpha = float(sample_rate), float(noise_multiplier), float(alpha)
    if q == 0:
        return 0.0
    if q == 1 or sigma < MIN_SIGMA:  # no sampling: exact for q = 1, an upper bound for any other q
        return alpha / 2 / sigma / sigma
    return _rdp_by_quadrature(q, sigma, alpha)


def compose_rdp(segments: Segments, alpha: float) -> float:
    """RDP in nats of all segments at order alpha: the sum over steps (Mironov 2017)."""
    _check(alpha=alpha)
    return float(sum(steps * rdp_sampled_gaussian(q, sigma, alpha)
                     for q, sigma, steps in released(segments)))


def epsilon_and_order(segments: Segments, delta: float) -> tuple[float, float]:
    """(epsilon in nats, its order alpha) of all segments: the minimum over alpha > 1 of
        RDP(alpha) + log((alpha - 1)/alpha) - (log delta + log alpha)/(alpha - 1),
    not below 0 (Canonne, Kamath, Steinke 2020, Proposition 12; Balle et al. 2020, Theorem 21). It
    is always this bound at the order returned, never interpolated, so stopping short of the minimum
    is safe. When nothing is released it is (0.0, inf). ValueError for bad arguments.
    """
    _check(delta=delta)
    segments = released(segments)
    if not segments:
        return 0.0, math.inf

    def bound(log_gap: float) -> float:
        alpha = 1 + math.exp(log_gap)
        conversion = math.log1p(-1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)
        return compose_rdp(segments, alpha) + conversion

    # (alpha - 1) bound is convex in alpha, so the bound has a single valley: walk downhill in steps
    # of log(alpha - 1), then refine. Start: the best order for a Gaussian of this RDP at alpha = 2.
    lowest, highest = math.log(MIN_ORDER_GAP), math.log(MAX_ORDER_GAP)
    slope = max(compose_rdp(segments, 2.0) / 2, 1e-300)
    if slope == math.inf:
        return math.inf, 2.0
    center = min(max(0.5 * (math.log(-math.log(delta)) - math.log(slope)), lowest), highest)
    value = bound(center)
    for way in (-1, 1):
        while lowest <= center + way <= highest and (beside := bound(center + way)) < value:
            center, value = center + way, beside
    limits = (max(center - 1, lowest), min(center + 1, highest))
    best = minimize_scalar(bound, bounds=limits, method="bounded", options={"xatol": 1e-7})
    if best.fun < value:
        center, value = best.x, best.fun
    return max(0.0, float(value)), 1 + math.exp(center)


def total_epsilon(segments: Segments, delta: float) -> float:
    """Smallest epsilon in nats that RDP proves at this delta for all segments together."""
    return epsilon_and_order(segments, delta)[0]


def epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """total_epsilon of so many equal steps."""
    return total_epsilon([(sample_rate, noise_multiplier, steps)], delta)


def calibrate_noise(target_epsilon: float, delta: float, sample_rate: float, steps: int,
                    spent: Segments = ()) -> float:
    """Smallest noise multiplier, to 1e-7, that keeps `spent` and these steps within target_epsilon.

    It is MIN_SIGMA or more, and total_epsilon with it never exceeds the target. Raises ValueError
    for bad arguments, where nothing is released, and where MAX_SIGMA is not enough.
    """
    _check(target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, steps=steps)
    if steps == 0 or sample_rate == 0:
        raise ValueError(f"zero steps need no noise, nor rate 0: got {steps=}, {sample_rate=}")
    spent = released(spent)
    return smallest_noise(
        lambda sigma: total_epsilon([*spent, (sample_rate, sigma, steps)], delta),
        target_epsilon, (MIN_SIGMA, MAX_SIGMA), (math.log(0.5), math.log(2.0)), 1e-8)


def smallest_noise(epsilon_of: Callable[[float], float], target_epsilon: float, limits: tuple,
                   log_bracket: tuple, log_precision: float) -> float:
    """Smallest sigma in limits (least, most) for which the falling epsilon_of is <= target_epsilon.

    The bracket guesses log sigma, which is found to log_precision. ValueError if most is too small.
    """
    (low, high), (least, most) = log_bracket, map(math.log, limits)
    @functools.cache  # the search asks for its ends several times
    def total(log_sigma: float) -> float:
        return epsilon_of(math.exp(log_sigma))

    def excess(log_sigma: float) -> float:  # log-log is nearly straight: few steps for brentq
        return math.log(max(total(log_sigma), 1e-300) / target_epsilon)

    while low > least and excess(low) <= 0:
        low, high = max(low - 1, least), low
    while high < most and excess(high) > 0:
        low, high = high, min(high + 1, most)
    if excess(high) > 0:
        raise ValueError(f"no noise multiplier up to {limits[1]:g} reaches {target_epsilon=}")
    log_sigma = low if excess(low) <= 0 else brentq(excess, low, high, xtol=log_precision)
    stride = 5 * log_precision
    while total(log_sigma) > target_epsilon:  # the root may lie on the unsafe side: step over
        log_sigma, stride = log_sigma + stride, 2 * stride
    return math.exp(log_sigma)


def _rdp_by_quadrature(q: float, sigma: float, alpha: float) -> float:
    """RDP from E[(1 + w)^alpha - 1 - alpha w]. As E[w] = 0, values near 0 keep their digits."""
    if (alpha - 1) / sigma / sigma > 100 - 2 * math.log(q):  # next to (w + q)^alpha all is e^-30
        return alpha / (alpha - 1) * math.log(q) + alpha / 2 / sigma / sigma
    # The integrand is analytic for |Im x| < pi sigma (there 1 + w = 0) and has a Gaussian's tails:
    # the trapezoidal rule errs by exp(-2 pi^2 sigma / step) < 1e-16 (Trefethen, Weideman 2014).
    step = min(0.4, sigma / 2)
    # The log has slope <= max(alpha, 2)/sigma - x: outside this range are Gaussian tails of 10 sd.
    # Of its two peaks, near 0 and near alpha/sigma, either may win: the range must hold both.
    values = _log_integrand(np.arange(-10.0, max(alpha, 2) / sigma + 10, step), q, sigma, alpha)
    if (peak := values.max()) == -np.inf:  # w underflows to 0 everywhere
        return 0.0
    log_excess = peak + math.log(np.exp(values - peak).sum() * step * (alpha - 1))
    log_moment = math.log1p(math.exp(log_excess)) if log_excess < 30 else log_excess
    return float(log_moment / (alpha - 1))


@np.errstate(divide="ignore", over="ignore", under="ignore")  # the branch not taken may do anything
def _log_integrand(x: np.ndarray, q: float, sigma: float, alpha: float) -> np.ndarray:
    """log of phi(x) ((1 + w)^alpha - 1 - alpha w)/(alpha - 1); x = z/sigma ~ N(0, 1) = phi."""
    gap, L = alpha - 1, x / sigma - 0.5 / sigma / sigma
    w = q * np.expm1(np.minimum(L, 700))
    # u = log(1 + w): log1p is exact for small w, the other form cannot overflow.
    u = np.where(L < 700, np.log1p(w), np.logaddexp(math.log1p(-q), math.log(q) + L))
    # Small w: nearly all cancels; five terms of the binomial series from k = 2 err by 1e-11.
    small = alpha * np.abs(w) < 0.01
    ws = np.where(small, w, 0)
    series = 1 + (alpha - 4) / 5 * ws * (1 + (alpha - 5) / 6 * ws)
    series = 1 + (alpha - 2) / 3 * ws * (1 + (alpha - 3) / 4 * ws * series)
    log_small = math.log(alpha / 2) + 2 * np.log(np.abs(ws)) + np.log(series)
    # Other w: e^u (e^(gap u) - 1)/gap - w = e^u (e^(gap u) - 1)/gap * (1 - r). Its factors have one
    # sign for w > 0 and the other for w < 0; gap divides exactly, so orders near 1 lose no digits.
    us = np.where(small, 1, u)
    r = -gap * np.expm1(-us) / np.expm1(gap * us)
    log_large = us + np.maximum(gap * us, 0) + np.log(-np.expm1(-np.abs(gap * us)) / gap)
    log_large += np.log(np.abs(1 - r))
    return np.where(small, log_small, log_large) - 0.5 * x * x - 0.5 * math.log(2 * math.pi)


_ALLOWED = {
    "sample_rate": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
    "noise_multiplier": (lambda v: 0 < v < 1e38, "a number in (0, 1e38)"),
    # exp(log(MAX_ORDER_GAP)) may round up.
    "alpha": (lambda v: 1 < v < 2 + MAX_ORDER_GAP, f"a number in (1, {MAX_ORDER_GAP:g}]"),
    "steps": (lambda v: 0 <= v < 2**63, "an integer >= 0 (below 2**63)"),
    "delta": (lambda v: 0 < v < 1, "a number in (0, 1), both ends excluded"),
    "target_epsilon": (lambda v: 0 < v < 1e38, "a number in (0, 1e38)"),
}


def _check(**arguments: object) -> None:
    for name, value in arguments.items():
        inside, allowed = _ALLOWED[name]
        kind = numbers.Integral if name == "steps" else numbers.Real
        if not (isinstance(value, kind) and not isinstance(value, bool) and inside(value)
                and inside(float(value))):  # a fraction may round to 0 or 1
            raise ValueError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")


def released(segments: Segments) -> list[tuple[float, float, int]]:
    """The segments, checked, that release something: a list, as a generator is read only once."""
    segments = list(segments)
    for q, sigma, steps in segments:
        _check(sample_rate=q, noise_multiplier=sigma, steps=steps)
    return [(float(q), float(sigma), int(t)) for q, sigma, t in segments if q > 0 and t > 0]


def in_words(epsilon: float, digits: int = 5, rounding: str = decimal.ROUND_CEILING) -> str:
    """epsilon in so many significant digits, rounded up: what is said is never less than is spent.

    Lower bounds and what remains of a budget are rounded down: decimal.ROUND_FLOOR.
    """
    if not math.isfinite(epsilon):
        return str(epsilon)
    text = f"{decimal.Context(digits, rounding).create_decimal_from_float(epsilon):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def command_line(argv: Sequence[str] | None, name: str, calibrate: Callable[..., float],
                 describe: Callable[[Segments, float], str]) -> None:
    """Print what one accountant finds. Bad input ends with one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=f"The epsilon of DP-SGD, or its noise, by {name}.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # without the usage
    for flag, kind in (("--sample-rate", float), ("--steps", int), ("--delta", float)):
        parser.add_argument(flag, type=kind, required=True)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--noise-multiplier", type=float, help="standard deviation / clipping norm")
    given.add_argument("--eps", type=float, help="calibrate the noise multiplier to this epsilon")
    args = parser.parse_args(argv)
    try:
        sigma = args.noise_multiplier if args.eps is None else calibrate(
            args.eps, args.delta, args.sample_rate, args.steps)
        found = describe([(args.sample_rate, sigma, args.steps)], args.delta)
        print(f"{name}: noise multiplier {sigma:.9g}, {found}", flush=True)
    except (ValueError, OSError) as error:
        sys.stdout = None   # what a full disk did not take would fail once more at the end
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: see --help."""
    def describe(segments: Segments, delta: float) -> str:
        epsilon, order = epsilon_and_order(segments, delta)
        return f"epsilon {in_words(epsilon, 6)}, best order {order:.6g}"

    command_line(argv, "RDP", calibrate_noise, describe)


if __name__ == "__main__":
    main()
