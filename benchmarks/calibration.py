"""How long it takes to find an epsilon, and the noise for an epsilon.

    python benchmarks/calibration.py

We compare our two accountants with Opacus, dp_accounting and prv_accountant, whose rows need `pip
install opacus dp-accounting prv-accountant`. Less noise is better as long as it is enough. The last
column is the epsilon that variants/pld.py proves for the noise. prv_accountant finds no noise.
"""

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import accountant  # noqa: E402
from variants import pld  # noqa: E402


class Setting(NamedTuple):
    """What is accounted for."""
    name: str
    q: float
    steps: int
    epsilon: float
    delta: float


SETTINGS = [Setting("the preset `mnist`", 2_048 / 60_000, 176, 1.0, 1e-5),
            Setting("many small steps", 256 / 1_281_167, 50_000, 8.0, 1e-7)]
Query, Calibration = Callable[[float], float], Callable[[], float]


def ours(setting: Setting) -> dict[str, tuple[Query, Calibration]]:
    """{name: (function of sigma -> epsilon, function -> sigma)}."""
    _, q, steps, epsilon, delta = setting
    return {name: (lambda sigma, module=module: module.epsilon(q, sigma, steps, delta),
                   lambda module=module: module.calibrate_noise(epsilon, delta, q, steps))
            for name, module in (("accountant.py", accountant), ("variants/pld.py", pld))}


def of_opacus(setting: Setting) -> dict[str, tuple[Query, Calibration]]:
    from opacus.accountants import create_accountant
    from opacus.accountants.utils import get_noise_multiplier

    def query(rule: str, sigma: float) -> float:
        kept = create_accountant(rule)
        kept.history = [(sigma, setting.q, setting.steps)]
        return kept.get_epsilon(setting.delta)

    return {f"Opacus, {rule}": (
        lambda sigma, rule=rule: query(rule, sigma),
        lambda rule=rule: get_noise_multiplier(
            target_epsilon=setting.epsilon, target_delta=setting.delta, sample_rate=setting.q,
            steps=setting.steps, accountant=rule)) for rule in ("rdp", "prv")}


def of_dp_accounting(setting: Setting) -> dict[str, tuple[Query, Calibration]]:
    import dp_accounting
    import dp_accounting.pld
    import dp_accounting.rdp

    def event(sigma: float) -> object:
        one = dp_accounting.PoissonSampledDpEvent(setting.q, dp_accounting.GaussianDpEvent(sigma))
        return dp_accounting.SelfComposedDpEvent(one, setting.steps)

    return {f"dp_accounting, {rule}": (
        lambda sigma, make=make: make().compose(event(sigma)).get_epsilon(setting.delta),
        lambda make=make: dp_accounting.calibrate_dp_mechanism(
            make, event, setting.epsilon, setting.delta))
        for rule, make in (("rdp", dp_accounting.rdp.RdpAccountant),
                           ("pld", dp_accounting.pld.PLDAccountant))}


def of_prv_accountant(setting: Setting) -> dict[str, tuple[Query, None]]:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    def query(sigma: float) -> float:
        mechanism = PoissonSubsampledGaussianMechanism(
            noise_multiplier=sigma, sampling_probability=setting.q)
        kept = PRVAccountant(prvs=mechanism, max_self_compositions=setting.steps, eps_error=0.01,
                             delta_error=setting.delta / 1_000)
        return kept.compute_epsilon(setting.delta, [setting.steps])[2]   # its upper bound

    return {"prv_accountant": (query, None)}


def ways(setting: Setting) -> dict[str, tuple[Query, Calibration | None]]:
    """All that are installed."""
    found = ours(setting)
    for package, make in (("opacus", of_opacus), ("dp_accounting", of_dp_accounting),
                          ("prv_accountant", of_prv_accountant)):
        if importlib.util.find_spec(package):
            found |= make(setting)
    return found


def timed(function: Callable, *arguments: float) -> tuple[float, float]:
    """(the least milliseconds of three calls, what it returns); slow ones are called once."""
    times = []
    while len(times) < 3 and sum(times) < 1_000:
        begin = time.perf_counter()
        found = function(*arguments)
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times), found


def main() -> None:
    warnings.simplefilter("ignore")   # Opacus warns of the order it finds
    for setting in SETTINGS:
        name, q, steps, epsilon, delta = setting
        noise = pld.calibrate_noise(epsilon, delta, q, steps)
        print(f"{name}: q = {q:.3g}, {steps:,} steps, delta = {delta:g}. An epsilon is of noise "
              f"{noise:.4f}, the noise is for epsilon = {epsilon:g}.\n\n"
              "| accountant | ms | epsilon | ms | noise | epsilon of it |\n"
              "|---|---|---|---|---|---|")
        for way, (query, calibrate) in ways(setting).items():
            took, found = timed(query, noise)
            row = f"| {way} | {took:,.1f} | {found:.4f} |"
            if calibrate:
                took, sigma = timed(calibrate)
                row += f" {took:,.0f} | {sigma:.5f} | {pld.epsilon(q, sigma, steps, delta):.4f} |"
            print(row if calibrate else f"{row} | | |", flush=True)
        print()


if __name__ == "__main__":
    main()
