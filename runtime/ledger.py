"""The ledger: every private step that some weights depend on, as plain values in their checkpoint.

Epsilon is always computed from the ledger. A readable copy lies beside each private checkpoint.
"""

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from decimal import ROUND_FLOOR
from pathlib import Path

import numpy as np
import scipy
import torch

import accountant
from accountant import in_words
from dp_sgd import PrivacyPlan
from runtime.files import atomic_write
from variants import pld

ACCOUNTANTS = {"rdp": accountant, "pld": pld}
NEIGHBOURS = "one example added or removed"
MOST_ENTRIES = 1_000   # runs in one chain


def ledger_entry(plan: PrivacyPlan, steps: int, insecure_noise_seed: int = -1) -> dict:
    """What `steps` steps of `plan` did to the weights. A published noise seed is on record."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "numpy": np.__version__, "scipy": scipy.__version__}
    entry = {**dataclasses.asdict(plan), "steps": steps, "sample_rate": plan.sample_rate,
             "neighbours": NEIGHBOURS, "versions": versions}
    return entry if insecure_noise_seed < 0 else {**entry,
                                                  "insecure_noise_seed": insecure_noise_seed}


def is_seeded(ledger: Sequence[dict]) -> bool:
    """Whether the noise of some step follows from a seed, so that nothing is private."""
    return any("insecure_noise_seed" in entry for entry in ledger)


def check(ledger: Sequence[dict]) -> None:
    """ValueError unless each entry has the numbers of a plan, and accountants take them.

    Also if there are so many entries that accountants would not come to an end.
    """
    if len(ledger) > MOST_ENTRIES:
        raise ValueError(f"its ledger has more than {MOST_ENTRIES:,} entries")
    for number, entry in enumerate(ledger, 1):
        try:
            accountant.released(segments([entry]))
            usable = (0 < entry["num_examples"] < math.inf and entry["max_grad_norm"] > 0
                      and 0 < entry["delta"] < 1)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"entry {number} of its ledger or plan is wrong: {error}") from error
        if not usable:
            raise ValueError(f"entry {number} of its ledger or plan has no numbers of a plan")


def segments(ledger: Sequence[dict]) -> list[tuple[float, float, int]]:
    """The ledger as the accountant's [(sample_rate, noise_multiplier, steps), ...]."""
    return [(e["expected_batch"] / e["num_examples"], e["noise_multiplier"], e["steps"])
            for e in ledger]


def spent_epsilon(ledger: Sequence[dict], delta: float, accountant: str = "rdp") -> float:
    """Epsilon at this delta of all the ledger's steps together.

    Private data sets may overlap: the budgets of runs on different ones add up too.
    """
    return ACCOUNTANTS[accountant].total_epsilon(segments(ledger), delta)


def all_epsilons(ledger: Sequence[dict], delta: float) -> dict[str, float]:
    """{accountant: epsilon}, without PLD where it does not reach (pld.LIMITS)."""
    epsilons = {}
    for name in ACCOUNTANTS:
        with suppress(ValueError):
            epsilons[name] = spent_epsilon(ledger, delta, name)
    return epsilons


def check_overspending(ledger: Sequence[dict], plan: PrivacyPlan, epsilon: float,
                       accountant: str = "rdp") -> float:
    """Epsilon of the ledger's steps and the plan's; ValueError if it exceeds the budget epsilon."""
    total = spent_epsilon([*ledger, ledger_entry(plan, plan.steps)], plan.delta, accountant)
    if total > epsilon * (1 + 1e-9):
        remains = max(0.0, epsilon - spent_epsilon(ledger, plan.delta, accountant))
        raise ValueError(f"{plan.steps} steps would bring epsilon to {in_words(total)} at delta "
                         f"{plan.delta:g}, past the budget of {epsilon:g}, of which "
                         f"{in_words(remains, rounding=ROUND_FLOOR)} remains")
    return total


def as_json(report: dict) -> bytes:
    """The report as a file of JSON. An infinite epsilon, which JSON lacks, becomes "Infinity"."""
    plain = json.loads(json.dumps(report), parse_constant=str)
    return json.dumps(plain, indent=2).encode() + b"\n"


def privacy_json(checkpoint: Path) -> Path:
    """Where the readable ledger of a checkpoint lies: beside it."""
    return checkpoint.with_suffix(".privacy.json")


def write_privacy_json(checkpoint: Path, ledger: Sequence[dict], delta: float) -> None:
    """The ledger of a checkpoint and its epsilon, for people. No program reads this file."""
    guarantee = f"(epsilon, delta)-differential privacy; neighbours: {NEIGHBOURS}"
    if is_seeded(ledger):
        guarantee = "NONE: the noise follows from a seed that is written below"
    report = {"guarantee": guarantee, "epsilon": all_epsilons(ledger, delta), "delta": delta,
              "ledger": list(ledger)}
    with atomic_write(privacy_json(checkpoint)) as file:
        file.write(as_json(report))
