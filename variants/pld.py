"""Privacy loss distributions (PLD): a lower and an upper bound on epsilon, about 1% apart or less.

A drop-in for accountant.py: total_epsilon, epsilon and calibrate_noise have the same signatures.
Its epsilon is smaller and takes longer. epsilon_bounds shows how far the truth can be below it.

The privacy loss of a step is log P/Q at an output drawn from P. P and Q are the output's densities
with and without the example (removed), or without and with it (added); both directions count. The
loss of many steps is a sum of independent losses, so its distribution is a convolution: a power in
the Fourier domain. Then (Koskela et al. 2020)
    delta(epsilon) = E_P[(1 - exp(epsilon - loss))+] = E_Q[(exp(loss) - exp(epsilon))+].
Each step's loss is rounded to a grid, which can only raise delta: this gives an upper bound. How
much rounding raises delta has a bound too (see lower_index), and this gives a lower one. The
computer leaves out tails, lets sums wrap around in the FFT, and rounds floating-point numbers. A
bound on all of that is added to delta (upper) or taken from it (lower).

Sources: Koskela, Jalko, Honkela 2020, arXiv 1906.03049: PLD by FFT.
  Gopi, Lee, Wutschitz 2021, arXiv 2106.02848: PLD by FFT, with bounds on its errors.
  Doroshenko et al. 2022, arXiv 2207.04380: connecting the dots.
  Zhu, Dong, Wang 2022, arXiv 2106.08567: the pairs P, Q dominate every step of the Poisson-sampled
  Gaussian, each direction by itself. A step may depend on earlier outputs, but its q and sigma and
  the number of steps may not.
"""

if __name__ == "__main__":   # Ctrl-C and `| head -1` leave no traceback
    from signal import SIG_DFL, SIG_IGN, SIGINT, SIGPIPE, getsignal, signal
    signal(SIGPIPE, SIG_DFL)
    signal(SIGINT, SIG_DFL if getsignal(SIGINT) != SIG_IGN else SIG_IGN)

import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR
from typing import NamedTuple

import numpy as np
from scipy.fft import irfft, rfft
from scipy.special import gammaln, logsumexp, ndtr, ndtri

import accountant
from accountant import Segments, in_words

# What floats and grids are good for; beyond it we refuse. Bounds hold within it, but may be wide.
LIMITS = {"sample_rate": (1e-8, 1.0), "noise_multiplier": (0.1, 1e4), "steps": (1, 10**7),
          "delta": (1e-15, 0.5)}
ROUND_OFF = 1e-13  # a generous relative error of any one number that is computed below
# The error of a Fourier coefficient, of size 1 at most: 4 log2(points) times 1.1e-16, and more.
FFT_ROUND_OFF = 2e-14


def epsilon_bounds(segments: Segments, delta: float) -> tuple[float, float]:
    """(lower, upper) in nats: epsilon of segments [(sample_rate, noise_multiplier, steps), ...].

    The smallest epsilon at which these mechanisms are (epsilon, delta)-DP lies between the two. The
    upper one is a guarantee as RDP's epsilon is, and never above it. They differ by 1% at most, or
    by 0.01 where epsilon < 1, for sample rates from 1e-5, noise multipliers from 0.3 to 100, up to
    10^6 steps and delta from 1e-8 to 1e-5, tested on a grid of these. Elsewhere they hold, but may
    be wider. Raises ValueError for bad arguments, and beyond LIMITS unless RDP finds epsilon 0.
    """
    segments = accountant.released(segments)
    rdp_epsilon, order = accountant.epsilon_and_order(segments, delta)
    if rdp_epsilon == 0:
        return 0.0, 0.0
    delta, steps = float(delta), sum(t for *_, t in segments)
    check_limits(segments, delta)
    grid = choose_grid(segments, delta, rdp_epsilon, order)
    lower = upper = 0.0
    # Removal gave the larger epsilon wherever we looked. We know a proof for one step only, and the
    # worst case of one step need not be that of many (Lebeda et al. 2024, arXiv 2405.20769).
    for removed in (True, False):
        below, above, epsilon_shift = delta_curve(segments, grid, removed)
        top = next(iter(np.flatnonzero(above <= delta)), grid.points)
        highest = grid.step * (grid.first + top) + epsilon_shift
        upper = max(upper, highest if top < grid.points else rdp_epsilon)
        point = lower_index(below, above, epsilon_shift, delta, grid.step, steps, top)
        lower = max(lower, grid.step * (grid.first + point) - epsilon_shift if point else 0.0)
    return float(lower), float(min(upper, rdp_epsilon))


def total_epsilon(segments: Segments, delta: float) -> float:
    """Smallest epsilon in nats that PLD proves: the upper one of epsilon_bounds."""
    return epsilon_bounds(segments, delta)[1]


def epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """total_epsilon of so many equal steps."""
    return total_epsilon([(sample_rate, noise_multiplier, steps)], delta)


def calibrate_noise(target_epsilon: float, delta: float, sample_rate: float, steps: int,
                    spent: Segments = ()) -> float:
    """Smallest noise multiplier, to 1e-5, that keeps `spent` and these steps within target_epsilon.

    It lies within LIMITS, and total_epsilon with it never exceeds the target. Raises ValueError as
    accountant.calibrate_noise does, and beyond LIMITS.
    """
    spent = accountant.released(spent)
    enough = accountant.calibrate_noise(target_epsilon, delta, sample_rate, steps, spent)
    least, most = LIMITS["noise_multiplier"]
    high = math.log(min(max(enough, least), most))  # RDP's noise, hardly ever twice what is needed
    return accountant.smallest_noise(
        lambda sigma: total_epsilon([*spent, (sample_rate, sigma, steps)], delta),
        target_epsilon, (least, most), (max(high - 0.1, math.log(least)), high), 1e-6)


def check_limits(segments: Segments, delta: float) -> None:
    """Raise ValueError beyond LIMITS. The segments' steps count together."""
    q, sigma, steps = zip(*segments, strict=True)
    values = {"sample_rate": q, "noise_multiplier": sigma, "steps": [sum(steps)], "delta": [delta]}
    for name, (least, most) in LIMITS.items():
        for value in values[name]:
            if not least <= value <= most:
                raise ValueError(f"the pld accountant needs a {name} from {least:g} to {most:g}, "
                                 f"got {value:g}")


# ---- one step ------------------------------------------------------------------------------------

@np.errstate(divide="ignore", over="ignore")  # the branch not taken may do anything
def survival(losses: np.ndarray, q: float, sigma: float,
             removed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(P[loss > l], Q[loss > l]) of one step at all l of `losses`.

    The loss is log P/Q at an output drawn from P. If the example is removed, P = (1 - q) N(0,
    sigma^2) + q N(1, sigma^2) and Q = N(0, sigma^2). If it is added, they swap and the loss changes
    its sign.
    """
    l = losses if removed else -losses
    # Where is log(1 - q + q exp(r)) = l? Two forms, so that neither small q nor q = 1 loses digits.
    very_low = np.log1p(np.maximum((q - 1) * np.exp(-np.maximum(l, -700)), -1))
    r = np.where(l < -1, l - math.log(q) + very_low, np.log1p(np.maximum(np.expm1(l) / q, -1)))
    x = sigma * r + 0.5 / sigma  # the output, in units of sigma
    sign = -1 if removed else 1
    without = ndtr(sign * x)
    mixture = (1 - q) * ndtr(sign * x) + q * ndtr(sign * (x - 1 / sigma))
    above_p, above_q = (mixture, without) if removed else (without, mixture)
    # Rounding may not make any mass negative.
    return np.minimum.accumulate(above_p), np.minimum.accumulate(above_q)


def loss_range(q: float, sigma: float, removed: bool, tail: float) -> tuple[float, float]:
    """Losses (low, high) between which all but `tail` of one step's P lies, on either side."""
    x = np.array([ndtri(tail), 1 / sigma - ndtri(tail)])
    log_rest = np.log1p(-q) if q < 1 else -np.inf
    low, high = np.logaddexp(log_rest, math.log(q) + x / sigma - 0.5 / sigma / sigma)
    return (low, high) if removed else (-high, -low)


def discretise(q: float, sigma: float, removed: bool, step: float,
               tail: float) -> tuple[int, np.ndarray, float]:
    """(first, masses, relative_error) of one step's rounded loss; its tails are left out.

    masses are P's at the losses first * step, (first + 1) * step, ... A loss l between the grid
    points a and b becomes b with probability (e^l - e^a) / (e^b - e^a), and a otherwise. This keeps
    P and Q of every bin ("connecting the dots").

    Floating-point errors change the step's delta(epsilon) by at most relative_error times the sum
    of `tail` and of the law's mass above epsilon. delta is convex in exp(epsilon), and its slope is
    this mass under Q. So two changes outweigh the errors: a factor 1 + relative_error on delta, and
    a shift of epsilon by 2 relative_error.
    """
    low, high = loss_range(q, sigma, removed, tail)
    first = math.floor(low / step)
    losses = step * np.arange(first, math.ceil(high / step) + 1)
    above_p, above_q = survival(losses, q, sigma, removed)
    p = -np.diff(above_p)
    wanted = (p + np.exp(losses[:-1]) * np.diff(above_q)) / -math.expm1(-step)
    rising = np.clip(wanted, 0, p)  # a bin's mass at its upper end: at most the bin's mass
    moved = np.cumsum(np.abs(wanted - rising)[::-1])[::-1] * -math.expm1(-step)
    relative_error = ((6 * ROUND_OFF * above_p[:-1] + moved) / (above_p[1:] + rising)).max()
    return first, np.append(p - rising, 0) + np.append(0, rising), float(relative_error)


# ---- all steps -----------------------------------------------------------------------------------

class Grid(NamedTuple):
    """Where sums of losses are counted, and how steps are prepared. See choose_grid."""
    step: float
    first: int
    points: int
    tilt: float
    tail: float


class Law(NamedTuple):
    """The tilted law of the sum of all steps' rounded losses. See compose."""
    spectrum: np.ndarray  # its Fourier coefficients
    log_growth: np.ndarray  # log of the factor by which the other steps multiply a step's round-off
    log_moment: float  # log E[exp(tilt loss)] before tilting
    log_beyond: float  # log E[exp(tilt loss)] after it
    bottom: int  # the lowest sum, in grid steps
    relative_error: float


def choose_grid(segments: Segments, delta: float, rdp_epsilon: float, order: float) -> Grid:
    """The Grid to look for an epsilon <= rdp_epsilon on, the RDP bound found at this order.

    Its choices decide how tight the bounds are, not whether they hold. Sums of losses are counted
    in a window of `points` multiples of `step`, from `first` on. They are tilted: weighted by
    exp(tilt loss), which moves their mean towards epsilon. So errors of the FFT are small beside
    delta, however small delta is. With a tilt of order - 1 the Chernoff bound on delta(rdp_epsilon)
    is about delta. We take half of that tilt; the other half bounds what is above the window. A
    step's tails are cut off at a mass of `tail`.
    """
    steps, tilt = sum(t for *_, t in segments), (order - 1) / 2
    tail = 1e-5 * delta / steps
    spans = [float(np.ptp(loss_range(q, sigma, True, tail))) for q, sigma, _ in segments]
    points = 2**18 if steps <= 10**5 else 2**20  # rounding raises epsilon like steps * step^2
    step = max((11 - math.log(delta)) / tilt, *spans) / (points - 3)  # rounding outwards adds <= 3
    return Grid(step, math.floor(rdp_epsilon / step) - points // 2, points, tilt, tail)


def compose(segments: Segments, grid: Grid, removed: bool) -> Law:
    """The Law of all losses in one direction. ValueError if one step's do not fit into the grid."""
    step, _, points, tilt, tail = grid
    law = Law(1.0, 0.0, 0.0, 0.0, 0, 0.0)
    for q, sigma, t in segments:
        lowest, masses, relative_error = discretise(q, sigma, removed, step, tail)
        if len(masses) > points:
            raise ValueError(f"one step's losses take {len(masses)} points, the grid has {points}")
        losses = step * (lowest + np.arange(len(masses)))
        log_moment = float(logsumexp(tilt * losses, b=masses))
        tilted = masses * np.exp(tilt * losses - log_moment)
        transform = rfft(tilted, points)
        log_abs = np.log(np.abs(transform) + FFT_ROUND_OFF)
        large = t * log_abs > -80  # powers are slow; smaller ones are nothing beside FFT_ROUND_OFF
        power = np.power(transform, t, out=np.zeros_like(transform), where=large)
        law = Law(law.spectrum * power, law.log_growth + (t - 1) * log_abs,
                  law.log_moment + t * log_moment,
                  law.log_beyond + t * float(logsumexp(tilt * losses, b=tilted)),
                  law.bottom + t * lowest, law.relative_error + t * relative_error)
    return law


def delta_curve(segments: Segments, grid: Grid,
                removed: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """(below, above, epsilon_shift): bounds on the rounded losses' delta D in one direction.

    At all points epsilon of the grid, D(epsilon - epsilon_shift) >= below and D(epsilon +
    epsilon_shift) <= above. The tails cut off count in full for above, and not at all for below.
    """
    step, first, points, tilt, tail = grid
    steps = sum(t for *_, t in segments)
    law = compose(segments, grid, removed)
    # delta(epsilon) exp(tilt epsilon) is the convolution of the tilted law with `gain`, which is a
    # function of loss - epsilon. The FFT is circular: it takes epsilons for one another that lie a
    # window apart. We mean the one in the window.
    sums, above = step * (first + np.arange(points)), step * np.arange(points)
    decay, gain = np.exp(law.log_moment - tilt * sums), np.exp(-tilt * above) * -np.expm1(-above)
    curve = irfft(law.spectrum * rfft(gain).conj(), points)
    curve = decay * np.roll(curve, (law.bottom - first) % points)
    # Tilted mass may be missing or in excess for two reasons. First, sums above the window
    # (Chernoff). Second, round-off: by Parseval's theorem at most the error's norm in the Fourier
    # domain, where steps multiply it.
    error = math.exp(min(0, law.log_beyond - tilt * sums[-1]))
    error += steps * FFT_ROUND_OFF * math.sqrt(2 * np.exp(2 * law.log_growth).sum())
    # This mass counts at most by the maximum of gain, at log(1 + 1/tilt).
    error *= math.exp(-tilt * math.log1p(1 / tilt)) / (1 + tilt)
    # Then comes the round-off of gain's transform and of the way back.
    way_back = gain.sum() * np.abs(law.spectrum).sum() / points + np.linalg.norm(gain)
    error += 2 * FFT_ROUND_OFF * way_back
    # Sums below epsilon come back above the window, with a weight of exp(-tilt window) at most.
    error = decay * error + 2 * math.exp(-tilt * step * points)
    error = error + (2 * steps + law.relative_error) * tail
    factor = math.exp(law.relative_error + steps * ROUND_OFF)
    return (curve - error) / factor, (curve + error) * factor, 2 * law.relative_error


# ---- the lower bound -----------------------------------------------------------------------------

def lower_index(below: np.ndarray, above: np.ndarray, epsilon_shift: float, delta: float,
                step: float, steps: int, top: int) -> int:
    """The highest grid point found below top where delta(epsilon - epsilon_shift) > delta, or 0.

    How much does rounding raise delta? It multiplies exp(loss) by a random M of mean 1 under Q. M
    takes the values y and y e^h, with h = step and a y between e^-h and 1. Spread M < 1 to the
    values e^-h and 1, and M > 1 to 1 and e^h, keeping M's mean. No convex function of M loses in
    the mean by this. Now e^h has the probability E(M - 1)+ / (e^h - 1), which is at most
    1/(1 + e^(h/2))^2 (at y = e^(-h/2)). Spread on until it has that. The result is the law of a
    product of two independent factors of mean 1, each e^(h/2) or e^(-h/2).

    delta is the mean of a convex function of each step's exp(loss). With rounding it becomes a D
    with, for n steps,
        delta(epsilon) <= D(epsilon) <= E[delta(epsilon - h (B - n))],
    where B is binomial (2n, 1/(1 + e^(-h/2))): the factors' probabilities, weighted by their
    product. Suppose that delta(epsilon0) <= delta. Then delta(.) lies below upper_envelope. Where
    the envelope's mean is less than `below`, this is a contradiction: delta(epsilon0) > delta.
    """
    mean, half_width, offset, noise = rounding_noise(step, steps)
    below = np.pad(below, (half_width, half_width + mean))
    above = np.pad(above, (half_width + math.ceil(2 * epsilon_shift / step), half_width),
                   constant_values=(1, above[-1]))

    def proven(point: int) -> bool:
        point += half_width
        highest = noise @ upper_envelope(above, point, offset, half_width, delta, step)
        return highest * (1 + 1e-6) + 1e-25 < below[point + mean]  # 1e-6: errors of gammaln

    gap = 1
    while gap < top and not proven(top - gap):
        gap *= 2
    low, high = top - gap, top - gap // 2
    while high - low > 1 and low > 0:
        middle = (low + high) // 2
        low, high = (middle, high) if proven(middle) else (low, middle)
    return max(low, 0)


def rounding_noise(step: float, steps: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """(mean, half_width, offset, weights) of B - n in lower_index, whose mean is rounded.

    weights are B's probabilities and offset is mean - (B - n), for B within half_width of its mean:
    D(epsilon0 + h mean) is compared with the mean of delta(epsilon0 + h offset).
    """
    mean = round(steps * math.tanh(step / 4))
    half_width = 8 * math.ceil(math.sqrt(steps))  # 11 sd: B is further away with probability 1e-27
    b = np.arange(max(0, steps + mean - half_width),
                  min(2 * steps, steps + mean + half_width) + 1)
    log_choices = gammaln(2 * steps + 1) - gammaln(b + 1) - gammaln(2 * steps - b + 1)
    log_weights = (log_choices - 2 * steps * math.log1p(math.exp(-step / 2))
                   - (2 * steps - b) * step / 2)
    return mean, half_width, steps + mean - b, np.exp(log_weights)


def upper_envelope(above: np.ndarray, point: int, offset: np.ndarray, half_width: int, delta: float,
                   step: float) -> np.ndarray:
    """Upper bounds on delta(.) at the points point + offset, if it is at most delta at `point`.

    delta(.) is convex in exp(epsilon). Near the point it therefore lies below the chords from there
    to bounds on either side. Elsewhere it lies below `above`.
    """
    envelope = above[point + offset]
    for part in (1, 2, 4, 8):
        half = min(half_width // part, int(700 / step))  # exp(700) is still finite
        ends = np.expm1(step * np.array([-half, 0, half]))
        heights = [above[point - half], delta, above[point + half]]
        x = np.expm1(step * np.minimum(offset, half))
        envelope = np.minimum(envelope, np.interp(x, ends, heights, left=np.inf))
    return envelope


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: see --help."""
    def describe(segments: Segments, delta: float) -> str:
        lower, upper = epsilon_bounds(segments, delta)
        return f"epsilon from {in_words(lower, 6, ROUND_FLOOR)} to {in_words(upper, 6)}"

    accountant.command_line(argv, "PLD", calibrate_noise, describe)


if __name__ == "__main__":
    main()
