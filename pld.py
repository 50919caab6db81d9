"""Privacy loss distributions (PLD): a lower and an upper bound on epsilon, about 1% or less apart.

The privacy loss of a step is log P/Q at an output drawn from P, where P and Q are the output's densities with
and without the example (removed), or without and with it (added): both directions count. The loss of many steps
is a sum of independent losses, so its distribution is a convolution: a power in the Fourier domain. Then
    delta(epsilon) = E[(1 - exp(epsilon - loss))+]
(Koskela et al. 2020). Each step's loss is put on a grid twice: into more loss than there is, for an
upper bound, and into less, for a lower one. What the computer leaves out or rounds is added to delta (upper) or
taken from it (lower): tails, sums that wrap around in the circular FFT, and floating-point errors.

Sources: Koskela, Jalko, Honkela 2020, arXiv 1906.03049, and Gopi, Lee, Wutschitz 2021, arXiv 2106.02848: PLD by FFT.
  Doroshenko et al. 2022, arXiv 2207.04380: connecting the dots.
  Zhu, Dong, Wang 2022, arXiv 2106.08567: the pairs P, Q dominate every step of the Poisson-sampled Gaussian,
  each direction by itself, also where a step depends on earlier outputs (but not its q or sigma, nor their number).
accountant.py calls this file, with checked arguments: segments [(sample_rate, noise_multiplier, steps), ...].
"""

import math
from collections import namedtuple

import numpy as np
from scipy.fft import irfft, rfft
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri, xlogy

# What floats and grids are good for; beyond it we refuse. Within it bounds hold, if not always 1% apart.
LIMITS = {"sample_rate": (1e-8, 1.0), "noise_multiplier": (0.1, 1e4), "steps": (1, 10**7), "delta": (1e-15, 0.5)}
ROUND_OFF = 1e-13  # a generous relative error of any one number that is computed below
FFT_ROUND_OFF = 2e-14  # of a Fourier coefficient, whose sizes are 1 at most: 4 log2(points) times 1.1e-16, and more
CELL = 4  # bins that the lower bound merges; with fewer, there is too little to pay with (see round_down)
MIN_POINTS, MAX_POINTS = 2**14, 2**18

Grid = namedtuple("Grid", "step points low tilt beyond tail")  # see choose_grid


@np.errstate(divide="ignore", over="ignore")  # the branch not taken may do anything
def survival(losses, q, sigma, removed):
    """(P[loss > l], Q[loss > l]) of one step at all l of `losses`.

    The loss is log P/Q at an output drawn from P. If the example is removed, P = (1 - q) N(0, sigma^2) +
    q N(1, sigma^2) and Q = N(0, sigma^2); if it is added, they swap and the loss changes sign.
    """
    l = losses if removed else -losses
    # Where is log(1 - q + q exp(r)) = l? Two forms, so that neither small q nor q = 1 loses digits.
    r = np.where(l < -1, l - math.log(q) + np.log1p(np.maximum((q - 1) * np.exp(-np.maximum(l, -700)), -1)),
                 np.log1p(np.maximum(np.expm1(l) / q, -1)))
    x = sigma * r + 0.5 / sigma  # the output, in units of sigma
    sign = -1 if removed else 1
    without, mixture = ndtr(sign * x), (1 - q) * ndtr(sign * x) + q * ndtr(sign * (x - 1 / sigma))
    above_p, above_q = (mixture, without) if removed else (without, mixture)
    return np.minimum.accumulate(above_p), np.minimum.accumulate(above_q)  # rounding may not make mass negative


def loss_range(q, sigma, removed, tail):
    """Losses (low, high) between which all but `tail` of one step's P lies, on either side."""
    x = np.array([ndtri(tail), 1 / sigma - ndtri(tail)])
    low, high = np.logaddexp(np.log1p(-q) if q < 1 else -np.inf, math.log(q) + x / sigma - 0.5 / sigma / sigma)
    return (low, high) if removed else (-high, -low)


def round_down(losses, above_p, above_q):
    """A law on the grid `losses` [n cells of CELL bins, and 1] with less loss than there is: its masses.

    Merging outputs is post-processing, after which their loss is log P/Q of the merged set; and counting less
    loss than there is lowers delta. A cell's mass is merged into the two grid points g, g + 1 around the
    cell's own loss, in the proportion that keeps P and Q. Only as much may rise from bin g to g + 1 as the
    bins above pay for: the part merged in g + 1 must have a loss of g + 1 or more. What cannot rise stays at g.
    """
    p, q = -np.diff(above_p).reshape(-1, CELL), -np.diff(above_q).reshape(-1, CELL)
    rows, doubt, width = np.arange(len(p)), ROUND_OFF * above_p[:-1:CELL], losses[1] - losses[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        position = (np.log(p.sum(1) / q.sum(1)) - losses[:-1:CELL]) / width
    g = np.clip(np.nan_to_num(position), 0, CELL - 1).astype(int)
    at = CELL * rows + g
    above = np.arange(CELL) > g[:, None]
    rising = (p.sum(1) - np.exp(losses[at]) * q.sum(1) - doubt) / -math.expm1(-width)
    paid = np.maximum((p * above).sum(1) - np.exp(losses[at + 1]) * (q * above).sum(1) - doubt, 0)
    price = np.maximum(np.exp(losses[at + 1]) * q[rows, g] - p[rows, g], 0) + doubt + 1e-300
    rising = np.clip(rising, 0, np.minimum(p.sum(1), (p * above).sum(1) + paid / price * p[rows, g]))
    masses = np.zeros(len(losses))
    masses[at] = p.sum(1) - rising
    masses[at + 1] += rising
    masses[-1] += above_p[-1]
    return masses


def align(q, sigma, removed, step):
    """A grid point for round_down to lose little at: with small q, most mass sits by the loss's limit log(1 - q).

    A cell around the point should have its mean there. We move towards that and keep the point that loses least.
    """
    point, best = (0.0 if q == 1 else math.log1p(-q) * (1 if removed else -1)), (math.inf, 0.0)
    for _ in range(12):
        losses = point + step * np.arange(-32.5 * CELL, 32.5 * CELL + 1)
        above = survival(losses, q, sigma, removed)
        p, q_mass = -np.diff(above)
        kept = round_down(losses, *above) @ losses - above[0][-1] * losses[-1]
        best = min(best, (xlogy(p, p / np.maximum(q_mass, 1e-300)).sum() - kept, point))
        cell = slice(32 * CELL, 33 * CELL)
        if min(p[cell].sum(), q_mass[cell].sum()) < 1e-9:
            break
        point = math.log(p[cell].sum() / q_mass[cell].sum()) - 2 * ROUND_OFF / p[cell].sum()
    return best[1]


def log_sum_exp(exponents, masses):
    """log of the sum of masses * exp(exponents), without overflow."""
    peak = exponents.max()
    return float(peak + math.log(masses @ np.exp(exponents - peak)))


def discretise(q, sigma, removed, grid, pessimistic):
    """(losses, masses, mass of infinite loss): one step's law on a grid, with more or with less loss.

    More: a bin's mass is split between its two ends so that P and Q both stay ("connect the dots", Doroshenko
    et al. 2022): merging the ends gives the bin back, so nothing is less private. The low tail is
    rounded up, the high one becomes infinite loss. Less: see round_down; the low tail is dropped. Every
    decision has the benefit of rounding errors on its safe side.
    """
    low, high = loss_range(q, sigma, removed, grid.tail)
    point = 0.0 if pessimistic else align(q, sigma, removed, grid.step)
    first, last = (round((end - point) / grid.step / CELL) for end in (low, high))
    losses = point + grid.step * np.arange(CELL * (first - 0.5), CELL * (last + 0.5) + 1)
    above_p, above_q = survival(losses, q, sigma, removed)
    if not pessimistic:
        return losses, round_down(losses, above_p, above_q), 0.0
    p = -np.diff(above_p)
    rising = p + np.exp(losses[:-1]) * np.diff(above_q) + ROUND_OFF * above_p[:-1]
    at_least = above_p[1:] + np.clip(rising / -math.expm1(-grid.step), 0, p)
    return losses, -np.diff(np.concatenate([[1.0], at_least, above_p[-1:]])), above_p[-1]


def choose_grid(segments, delta, cap, order, most_points):
    """The Grid to find an epsilon <= cap on: its choices decide how tight the bounds are, not whether they hold.

    Sums are tilted: weighted by exp(tilt loss), which moves their mean to epsilon, so that errors of the FFT
    are small beside delta however small that is. A tilt is an RDP order less 1, and the RDP bound is the
    error that a tilted mass of 1 can make. Loss sums fall in a window of points * step from `low` on; above it
    is a Chernoff bound (with tilt + beyond) of e^-18 delta. A step's tail is cut off at a mass of `tail`.
    """
    steps = sum(t for *_, t in segments)
    tail = 1e-4 * delta / steps
    spans = [float(np.ptp(loss_range(q, sigma, True, tail))) for q, sigma, _ in segments]
    coarse = [(t, *discretise(q, sigma, True, Grid(span / 2000, 0, 0, 0, 0, tail), True))
              for (q, sigma, t), span in zip(segments, spans)]

    def log_moment(power):  # of the law without its cut tails, which dominate high moments
        return sum(t * log_sum_exp(power * losses, masses) for t, losses, masses, _ in coarse)

    def log_excess(tilt):  # of the RDP bound on delta at epsilon 0, over delta
        return log_moment(tilt) - tilt * math.log1p(1 / tilt) - math.log1p(tilt) - math.log(delta)

    start = math.log(order - 1)
    best = minimize_scalar(lambda s: log_excess(math.exp(s)) / math.exp(s), bounds=(start - 3, start + 3),
                           method="bounded", options={"xatol": 1e-3})
    cap = min(cap, max(best.fun, 1e-12))
    low = max(0.0, cap - 15 / math.exp(best.x))

    def width(tilt):
        need = 18 + log_excess(tilt) - tilt * cap - log_moment(tilt)
        high, beyond = min(((log_moment(tilt + u) + need) / u, u) for u in tilt * 2.0 ** np.arange(-4, 4))
        return max(high - low, (10 - math.log(delta)) / tilt, *spans), tilt, beyond

    window, tilt, beyond = min(width(math.exp(best.x) * part) for part in (1, 0.9, 0.8, 0.7, 0.6))
    # A step's excess loss is below step^2; so that it moves epsilon by about 1/1000:
    points = window / math.sqrt(6e-4 * cap / steps / (1 + tilt))
    points = 2 ** math.ceil(math.log2(min(max(points, MIN_POINTS), most_points)))
    return Grid(window / (points - 4 * CELL), points, low, tilt, beyond, tail)


def delta_curve(segments, grid, removed, pessimistic):
    """A function of epsilon >= grid.low: a bound on delta in one direction, from above or from below."""
    step, points, low, tilt, beyond, _ = grid
    spectrum, log_size, log_moment, log_beyond, bottom, infinite, drift = 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for q, sigma, t in segments:
        losses, masses, infinite_mass = discretise(q, sigma, removed, grid, pessimistic)
        if len(losses) > points:
            raise ValueError(f"one step's losses take {len(losses)} points, the grid has {points}")
        log_m = log_sum_exp(tilt * losses, masses)
        tilted = masses * np.exp(tilt * losses - log_m)
        transform = rfft(tilted, points)
        spectrum = spectrum * transform**t
        log_size = log_size + (t - 1) * np.log(np.abs(transform) + FFT_ROUND_OFF)
        log_moment += t * log_m
        log_beyond += t * log_sum_exp(beyond * losses, tilted)
        bottom += t * losses[0]
        infinite += t * infinite_mass
        drift += t * ROUND_OFF * np.abs(losses).max()
    # The FFT is circular: of the sums that it takes for one another, we name the one in the window.
    first = math.floor((low - bottom) / step) - 2
    sums = bottom + step * np.arange(first, first + points)
    weights = np.roll(irfft(spectrum, points), -(first % points)) * np.exp(tilt * (low - sums))
    # Tilted mass that may be missing or in excess: sums above the window; and round-off, by Parseval's
    # theorem at most the error's norm in the Fourier domain, where steps multiply it.
    steps = sum(t for *_, t in segments)
    error = math.exp(min(0, log_beyond - beyond * sums[-1]))
    error += (steps + 1) * FFT_ROUND_OFF * math.sqrt(2 * np.exp(2 * log_size).sum())
    log_error = math.log(error) + log_moment - tilt * math.log1p(1 / tilt) - math.log1p(tilt)
    sign = 1 if pessimistic else -1

    def delta(eps):
        eps = eps - sign * drift  # the grid's losses are rounded as well
        start = np.searchsorted(sums, eps, side="right")
        value = math.exp(log_moment - tilt * low) * (weights[start:] @ -np.expm1(eps - sums[start:]))
        # Sums from below the window come back above it, with a weight of exp(-tilt window) at most.
        value += sign * (math.exp(log_error - tilt * eps) + 2 * math.exp(-tilt * step * points))
        return value * math.exp(sign * steps * ROUND_OFF) + infinite

    return delta


def crossing(curve, delta, low, high):
    """(below, above): two epsilons within [low, high], close together, between which the curve passes delta."""
    if curve(low) <= delta:
        return low, low
    if curve(high) > delta:
        return high, high
    for _ in range(18):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curve(middle) > delta else (low, middle)
    return low, high


def bounds(segments, delta, cap, order, need_lower=True):
    """(lower, upper) on epsilon in nats, upper <= cap; lower is 0 if it is not needed.

    cap is the RDP bound and order the order it is found at. Raises ValueError beyond LIMITS.
    """
    q, sigma, steps = zip(*segments)
    values = {"sample_rate": q, "noise_multiplier": sigma, "steps": [sum(steps)], "delta": [delta]}
    for name, (least, most) in LIMITS.items():
        for value in values[name]:
            if not least <= value <= most:
                raise ValueError(f"the pld accountant needs a {name} from {least:g} to {most:g}, got {value:g}")
    upper = cap
    for most_points in (MIN_POINTS, MAX_POINTS):  # a first look: a grid made for a smaller cap is better
        if upper == 0:
            return 0.0, 0.0
        cap, grid = upper, choose_grid(segments, delta, upper, order, most_points)
        curves = [delta_curve(segments, grid, removed, True) for removed in (True, False)]
        upper = min(grid.low, cap)
        for curve in curves:
            upper = crossing(curve, delta, upper, cap)[1]
    lower = grid.low
    for removed, curve in zip((True, False), curves):
        if need_lower and curve(lower) > delta:  # this direction may raise the lower bound
            lower = crossing(delta_curve(segments, grid, removed, False), delta, lower, upper)[0]
    return float(lower) if lower > grid.low else 0.0, float(upper)
