"""How long finding the noise for an epsilon takes, and how much noise is found: here, by Opacus and by dp_accounting.

    python benchmarks/calibration.py

The setting is the mnist preset's at epsilon = 1. The peers' rows need `pip install opacus dp-accounting`. Less noise is
better as long as it is enough; the last column is the epsilon that our PLD accountant finds for it (its upper bound).
"""

import importlib.util
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accountant import calibrate_noise, epsilon  # noqa: E402

Q, STEPS, EPS, DELTA = 2_048 / 60_000, 352, 1.0, 1e-5


def ways() -> dict:
    """{name: function -> noise multiplier}."""
    found = {f"accountant.py, {rule}": lambda rule=rule: calibrate_noise(EPS, DELTA, Q, STEPS, rule)
             for rule in ("rdp", "pld")}
    if importlib.util.find_spec("opacus"):
        from opacus.accountants.utils import get_noise_multiplier

        for rule in ("rdp", "prv"):
            found[f"Opacus, {rule}"] = lambda rule=rule: get_noise_multiplier(
                target_epsilon=EPS, target_delta=DELTA, sample_rate=Q, steps=STEPS, accountant=rule)
    if importlib.util.find_spec("dp_accounting"):
        import dp_accounting
        from dp_accounting import pld, rdp

        def event(sigma):
            return dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(Q, dp_accounting.GaussianDpEvent(sigma)), STEPS)

        for rule, make in (("rdp", rdp.RdpAccountant), ("pld", pld.PLDAccountant)):
            found[f"dp_accounting, {rule}"] = lambda make=make: dp_accounting.calibrate_dp_mechanism(
                make, event, EPS, DELTA)
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
        print(f"| {name} | {min(times):.3f} | {sigma:.5f} | {epsilon(Q, sigma, STEPS, DELTA, 'pld'):.4f} |", flush=True)


if __name__ == "__main__":
    main()
