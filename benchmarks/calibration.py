"""How long it takes to find the noise for an epsilon, and how much noise is found.

    python benchmarks/calibration.py

The setting is the mnist preset's at epsilon = 1. We compare our two accountants with Opacus and
dp_accounting; their rows need `pip install opacus dp-accounting`. Less noise is better as long as
it is enough. The last column is the epsilon that variants/pld.py proves for the noise.
"""

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import accountant  # noqa: E402
from variants import pld  # noqa: E402

Q, STEPS, EPS, DELTA = 2_048 / 60_000, 176, 1.0, 1e-5


def ways() -> dict[str, Callable[[], float]]:
    """{name: function -> noise multiplier}."""
    found = {f"{name}.py": lambda module=module: module.calibrate_noise(EPS, DELTA, Q, STEPS)
             for name, module in (("accountant", accountant), ("variants/pld", pld))}
    if importlib.util.find_spec("opacus"):
        from opacus.accountants.utils import get_noise_multiplier

        for rule in ("rdp", "prv"):
            found[f"Opacus, {rule}"] = lambda rule=rule: get_noise_multiplier(
                target_epsilon=EPS, target_delta=DELTA, sample_rate=Q, steps=STEPS,
                accountant=rule)
    if importlib.util.find_spec("dp_accounting"):
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp

        def event(sigma: float) -> object:
            one = dp_accounting.PoissonSampledDpEvent(Q, dp_accounting.GaussianDpEvent(sigma))
            return dp_accounting.SelfComposedDpEvent(one, STEPS)

        for rule, make in (("rdp", dp_accounting.rdp.RdpAccountant),
                           ("pld", dp_accounting.pld.PLDAccountant)):
            found[f"dp_accounting, {rule}"] = lambda make=make: (
                dp_accounting.calibrate_dp_mechanism(make, event, EPS, DELTA))
    return found


def main() -> None:
    warnings.simplefilter("ignore")   # Opacus warns of the order it finds
    print("| calibration | seconds | noise multiplier | epsilon of it |\n|---|---|---|---|")
    for name, calibrate in ways().items():
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            sigma = calibrate()
            times.append(time.perf_counter() - begin)
        proven = pld.epsilon(Q, sigma, STEPS, DELTA)
        print(f"| {name} | {min(times):.3f} | {sigma:.5f} | {proven:.4f} |", flush=True)


if __name__ == "__main__":
    main()
