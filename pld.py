"""Privacy loss distributions (PLD): a lower and an upper bound on epsilon, about 1% or less apart.

The privacy loss of a step is log P/Q at an output drawn from P, where P and Q are the output's densities with
and without the example (removed), or without and with it (added): both directions count. The loss of many steps
is a sum of independent losses, so its distribution is a convolution: a power in the Fourier domain. Then
    delta(epsilon) = E_P[(1 - exp(epsilon - loss))+] = E_Q[(exp(loss) - exp(epsilon))+]
(Koskela et al. 2020). Each step's loss is rounded to a grid, which can only raise delta: an upper bound. How much
it raises delta has a bound too (see lower_index), which gives a lower one. What the computer leaves out or rounds is
added to delta (upper) or taken from it (lower): tails, sums that wrap around in the FFT, floating-point errors.

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
from scipy.special import gammaln, logsumexp, ndtr, ndtri

# What floats and grids are good for; beyond it we refuse. Within it bounds hold, if not always 1% apart.
LIMITS = {"sample_rate": (1e-8, 1.0), "noise_multiplier": (0.1, 1e4), "steps": (1, 10**7), "delta": (1e-15, 0.5)}
ROUND_OFF = 1e-13  # a generous relative error of any one number that is computed below
FFT_ROUND_OFF = 2e-14  # of a Fourier coefficient, whose sizes are 1 at most: 4 log2(points) times 1.1e-16, and more

Grid = namedtuple("Grid", "step first points tilt tail")  # see choose_grid


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


def choose_grid(segments, delta, cap, order):
    """The Grid to find an epsilon <= cap on: its choices decide how tight the bounds are, not whether they hold.

    cap is the RDP bound and order the order it is found at. Sums of losses are counted in a window of `points`
    multiples of `step`, from `first` on. They are tilted: weighted by exp(tilt loss), which moves their mean towards
    epsilon, so that errors of the FFT are small beside delta however small that is. With a tilt of order - 1 the
    Chernoff bound on delta(cap) is about delta. We take half of that; the other half bounds what is above the window.
    A step's tails are cut off at a mass of `tail`.
    """
    steps, tilt = sum(t for *_, t in segments), (order - 1) / 2
    tail = 1e-5 * delta / steps
    spans = [float(np.ptp(loss_range(q, sigma, True, tail))) for q, sigma, _ in segments]
    points = 2**18 if steps <= 10**5 else 2**20  # rounding raises epsilon in proportion to steps * step^2
    step = max((11 - math.log(delta)) / tilt, *spans) / (points - 3)   # rounding outwards adds up to 3
    return Grid(step, math.floor(cap / step) - points // 2, points, tilt, tail)


def discretise(q, sigma, removed, step, tail):
    """(first, masses, doubt): P's masses of one step's rounded loss at first * step, (first + 1) * step, ...

    A loss l between the grid points a and b becomes b with probability (e^l - e^a) / (e^b - e^a), or else a. This
    keeps P and Q of every bin ("connecting the dots"). The tails are left out. Floating-point errors change the
    step's delta by at most doubt times (the law's mass above epsilon, and tail). As delta is convex in exp(epsilon)
    with this mass under Q as its slope, a factor 1 + doubt and a shift of epsilon by 2 doubt outweigh this.
    """
    low, high = loss_range(q, sigma, removed, tail)
    first = math.floor(low / step)
    losses = step * np.arange(first, math.ceil(high / step) + 1)
    above_p, above_q = survival(losses, q, sigma, removed)
    p = -np.diff(above_p)
    wanted = (p + np.exp(losses[:-1]) * np.diff(above_q)) / -math.expm1(-step)
    rising = np.clip(wanted, 0, p)  # a bin's mass at its upper end; rounding may not make the rest negative
    moved = np.cumsum(np.abs(wanted - rising)[::-1])[::-1] * -math.expm1(-step)
    doubt = ((6 * ROUND_OFF * above_p[:-1] + moved) / (above_p[1:] + rising)).max()
    return first, np.append(p - rising, 0) + np.append(0, rising), float(doubt)


def delta_curve(segments, grid, removed):
    """(below, above, drift): the rounded losses' delta in one direction, at epsilon = all points of the grid.

    Bounds from both sides: D(epsilon - drift) >= below and D(epsilon + drift) <= above. The cut tails count in full
    for above, and not at all for below.
    """
    step, first, points, tilt, tail = grid
    steps = sum(t for *_, t in segments)
    spectrum, log_size, log_moment, log_beyond, bottom, doubt = 1.0, 0.0, 0.0, 0.0, 0, 0.0
    for q, sigma, t in segments:
        lowest, masses, doubt_one = discretise(q, sigma, removed, step, tail)
        if len(masses) > points:
            raise ValueError(f"one step's losses take {len(masses)} points, the grid has {points}")
        losses = step * (lowest + np.arange(len(masses)))
        log_m = float(logsumexp(tilt * losses, b=masses))
        tilted = masses * np.exp(tilt * losses - log_m)
        transform = rfft(tilted, points)
        log_abs = np.log(np.abs(transform) + FFT_ROUND_OFF)
        large = t * log_abs > -80  # powers are slow; what is smaller is nothing beside FFT_ROUND_OFF
        spectrum = spectrum * np.power(transform, t, out=np.zeros_like(transform), where=large)
        log_size = log_size + (t - 1) * log_abs
        log_moment += t * log_m
        log_beyond += t * float(logsumexp(tilt * losses, b=tilted))
        bottom += t * lowest
        doubt += t * doubt_one
    # delta(epsilon) exp(tilt epsilon) is the convolution of the tilted law with `gain` of loss - epsilon. The FFT is
    # circular: of the epsilons that it takes for one another, we name the one in the window.
    sums, above = step * (first + np.arange(points)), step * np.arange(points)
    decay, gain = np.exp(log_moment - tilt * sums), np.exp(-tilt * above) * -np.expm1(-above)
    curve = decay * np.roll(irfft(spectrum * rfft(gain).conj(), points), (bottom - first) % points)
    # Tilted mass that may be missing or in excess: sums above the window (Chernoff); and round-off, by Parseval's
    # theorem at most the error's norm in the Fourier domain, where steps multiply it. It counts at most by the
    # maximum of gain, at log(1 + 1/tilt). Then the round-off of gain's transform and of the way back.
    error = math.exp(min(0, log_beyond - tilt * sums[-1]))
    error += steps * FFT_ROUND_OFF * math.sqrt(2 * np.exp(2 * log_size).sum())
    error *= math.exp(-tilt * math.log1p(1 / tilt)) / (1 + tilt)
    error += 2 * FFT_ROUND_OFF * (gain.sum() * np.abs(spectrum).sum() / points + np.linalg.norm(gain))
    # Sums below epsilon come back above the window, with a weight of exp(-tilt window) at most.
    error = decay * error + 2 * math.exp(-tilt * step * points) + (2 * steps + doubt) * tail
    factor = math.exp(doubt + steps * ROUND_OFF)
    return (curve - error) / factor, (curve + error) * factor, 2 * doubt


def lower_index(below, above, drift, delta, step, steps, top):
    """The highest grid point found below top (or 0) at which delta(epsilon - drift) is proven to exceed delta.

    How much does rounding raise delta? It multiplies exp(loss) by an M of mean 1 under Q that takes the values y
    and y e^h, h = step, for a y between e^-h and 1. No convex function of M loses in the mean if we spread M < 1 to
    e^-h and 1, and M > 1 to 1 and e^h, keeping M's mean. Now e^h has the probability E(M - 1)+ / (e^h - 1), at most
    1/(1 + e^(h/2))^2 (at y = e^(-h/2)); spread on until it has that. This is the law of a product of two independent
    factors, e^(h/2) or e^(-h/2), of mean 1. delta is the mean of a convex function of each step's exp(loss), so with
    rounding it becomes a D with, for n steps,
        delta(epsilon) <= D(epsilon) <= E[delta(epsilon - h (B - n))], B binomial (2n, 1/(1 + e^(-h/2)))
    (these are the factors' probabilities after weighting by their product). Suppose that delta(epsilon0) <= delta.
    As delta(.) is convex in exp(epsilon), it lies below a tent: near epsilon0 below the chords from there to bounds
    on either side, else below `above`. Where the tent's mean is less than `below`, this is a contradiction.
    """
    mean = round(steps * math.tanh(step / 4))  # of B - n: what is compared is D(epsilon0 + h mean)
    reach = 8 * math.ceil(math.sqrt(steps))  # 11 standard deviations; B is further away with probability 1e-27
    b = np.arange(max(0, steps + mean - reach), min(2 * steps, steps + mean + reach) + 1)
    offset = steps + mean - b
    noise = np.exp(gammaln(2 * steps + 1) - gammaln(b + 1) - gammaln(2 * steps - b + 1)
                   - 2 * steps * math.log1p(math.exp(-step / 2)) - (2 * steps - b) * step / 2)
    below = np.pad(below, (reach, reach + mean))
    above = np.pad(above, (reach + math.ceil(2 * drift / step), reach), constant_values=(1, above[-1]))

    def proven(point):
        point += reach
        tent = above[point + offset]
        for part in (1, 2, 4, 8):
            half = min(reach // part, int(700 / step))  # exp(700) is still finite
            ends, heights = np.array([-half, 0, half]), [above[point - half], delta, above[point + half]]
            x, ends = np.expm1(step * np.minimum(offset, half)), np.expm1(step * ends)
            tent = np.minimum(tent, np.interp(x, ends, heights, left=np.inf))
        return (noise @ tent) * (1 + 1e-6) + 1e-25 < below[point + mean]  # 1e-6 for the errors of gammaln

    gap = 1
    while gap < top and not proven(top - gap):
        gap *= 2
    low, high = top - gap, top - gap // 2
    while high - low > 1 and low > 0:
        middle = (low + high) // 2
        low, high = (middle, high) if proven(middle) else (low, middle)
    return max(low, 0)


def bounds(segments, delta, cap, order):
    """(lower, upper) on epsilon in nats, upper <= cap.

    cap is the RDP bound and order the order it is found at. Raises ValueError beyond LIMITS.
    """
    q, sigma, steps = zip(*segments)
    values = {"sample_rate": q, "noise_multiplier": sigma, "steps": [sum(steps)], "delta": [delta]}
    for name, (least, most) in LIMITS.items():
        for value in values[name]:
            if not least <= value <= most:
                raise ValueError(f"the pld accountant needs a {name} from {least:g} to {most:g}, got {value:g}")
    grid = choose_grid(segments, delta, cap, order)
    lower = upper = 0.0
    for removed in (True, False):
        below, above, drift = delta_curve(segments, grid, removed)
        top = next(iter(np.flatnonzero(above <= delta)), grid.points)
        upper = max(upper, grid.step * (grid.first + top) + drift if top < grid.points else cap)
        point = lower_index(below, above, drift, delta, grid.step, sum(steps), top)
        lower = max(lower, grid.step * (grid.first + point) - drift if point else 0.0)
    return float(lower), float(min(upper, cap))
