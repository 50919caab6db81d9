"""From an attacker's guesses to a lower bound on epsilon: the statistics of audit.py.

Sources: Nasr et al. 2023, arXiv 2302.07956: auditing by Gaussian DP. Dong, Roth, Su 2022, arXiv
1905.02383: Gaussian DP. Balle, Wang 2018, arXiv 1805.06530: the exact Gaussian curve. Jagielski et
al. 2020, arXiv 2006.07709. Steinke, Nasr, Jagielski 2023, arXiv 2305.08846: one run. `error` is the
probability that a bound may be too high.
"""

import math

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, log_ndtr, logit


def error_upper(false: int, trials: int, error: float) -> float:
    """Upper Clopper-Pearson bound on the rate of wrong guesses; wrong with probability `error`."""
    return 1.0 if false >= trials else float(stats.beta.ppf(1 - error, false + 1, trials - false))


def gdp_lower_bound(false_positives: int, outs: int, false_negatives: int, ins: int,
                    error: float) -> float:
    """mu_lower = Phi^-1(1 - FPR_upper) - Phi^-1(FNR_upper), at least 0 (Nasr et al. 2023).

    A mu-Gaussian-DP mechanism lets no test have Phi^-1(1 - FPR) - Phi^-1(FNR) above mu. One number
    stands for the whole trade-off curve, so common errors are enough to bound a large epsilon: no
    need to wait for rare ones.
    """
    fpr = error_upper(false_positives, outs, error / 2)
    fnr = error_upper(false_negatives, ins, error / 2)
    return max(0.0, float(stats.norm.isf(fpr) - stats.norm.ppf(fnr)))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta of a mu-Gaussian-DP mechanism at epsilon, exact (Balle and Wang 2018, Theorem 8)."""
    first, second = log_ndtr(mu / 2 - epsilon / mu), log_ndtr(-mu / 2 - epsilon / mu)
    return float(np.exp(first) - np.exp(epsilon + second))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The epsilon in nats at which gaussian_delta is delta, at least 0."""
    if mu <= 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    # There the first term alone is below delta.
    highest = mu * mu / 2 + mu * stats.norm.isf(delta) + 1
    return float(brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, highest))


def dp_epsilon_lower(false_positives: int, outs: int, false_negatives: int, ins: int, delta: float,
                     error: float) -> float:
    """epsilon_lower = log((TPR_lower - delta) / FPR_upper), in and out swapped if that is more.

    Needs no assumption on the mechanism, unlike gdp_lower_bound, and pays for it: epsilon_lower
    cannot be above about log(trials) (Jagielski et al. 2020). Too high with probability 2 * error
    at most.
    """
    fpr, fnr = error_upper(false_positives, outs, error), error_upper(false_negatives, ins, error)
    return max(0.0, *(math.log(max(1 - a - delta, 1e-300) / b)
                      for a, b in ((fnr, fpr), (fpr, fnr))))


# ---- one run (Steinke et al. 2023) --------------------------------------------------------------

def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """P(so many right guesses, or more) under (epsilon, delta)-DP at most (Corollary 5.4).

    m canaries are in or out by fair coins. The attacker sees the output, makes so many guesses,
    and abstains from the other canaries. Let W ~ Binomial(guesses, e^epsilon / (1 + e^epsilon)) and
    f(v) = P[W >= v]. The bound is
        f(v) + 2 m delta max_i (f(v - i) - f(v)) / i,        i from 1 to v = right.

    delta = 0: before the output, a canary's coin is fair, whatever the other coins show. After it
    the odds are e^epsilon at most. So reveal one coin after the other: each guess is right with
    probability e^epsilon / (1 + e^epsilon) at most, and W is above the number of right guesses.
    delta > 0: this fails at a coin for outputs of probability delta, with the canary and without
    it. The number F of such coins has a mean of 2 m delta at most, and W + F is above the number of
    right guesses. P[W + F >= v] = f(v) + sum_i P[F = i] (f(v - i) - f(v)), and the largest (f(v -
    i) - f(v)) / i times sum_i i P[F = i] is above that sum.

    The last step takes F for independent of W. tests/runtime/test_bounds.py compares with the exact
    maximum over all mechanisms: the bound is above it, except for p-values near 1.
    """
    p, i = float(expit(epsilon)), np.arange(1, right + 1)
    beta = stats.binom.sf(right - 1, guesses, p)
    alpha = np.max((stats.binom.sf(right - i - 1, guesses, p) - beta) / i, initial=0.0)
    return min(1.0, float(beta + 2 * canaries * delta * alpha))


def one_run_lower_bound(canaries: int, guesses: int, right: int, delta: float,
                        error: float) -> float:
    """The epsilon in nats below which one_run_p_value is below `error`, at least 0.

    The number of guesses must not depend on which were right. epsilon_lower cannot be above about
    log(guesses / 3), at error 0.05 and small delta.
    """
    def excess(epsilon: float) -> float:
        return one_run_p_value(canaries, guesses, right, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    # There the p-value is `error` without delta (Clopper-Pearson), and not smaller with it.
    highest = float(logit(1 - error_upper(guesses - right, guesses, error)))
    return float(brentq(excess, 0.0, highest + 1e-9))
