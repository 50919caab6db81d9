"""The published checkpoints: small, private as they say, and enough to sample from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "checkpoints"
PRIVATE = {eps: FOLDER / f"mnist-eps{eps}.pt" for eps in ("10", "1", "0.2")}


def test_make_samples_works_in_a_clone(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "runs", "data"))
    subprocess.run(["make", "-o", ".venv/installed", "samples", f"PYTHON={sys.executable}"],
                   cwd=clone, check=True, capture_output=True)
    with Image.open(clone / "runs/samples.png") as picture:
        assert min(picture.size) > 300 and np.unique(picture.convert("L")).size > 100


def test_published_checkpoints_are_small():
    sizes = {path.name: path.stat().st_size for path in FOLDER.glob("*.pt")}
    assert set(sizes) == {"mnist.pt", *(path.name for path in PRIVATE.values())}
    assert sizes.pop("mnist.pt") <= 4e6 and max(sizes.values()) <= 0.5e6


@pytest.mark.parametrize("epsilon, path", PRIVATE.items())
def test_a_published_ledger_keeps_its_budget(epsilon, path):
    metadata = load_checkpoint(path)[1]
    report = json.loads(path.with_suffix(".privacy.json").read_text())
    assert report["ledger"] == metadata["ledger"] and len(report["ledger"]) == 1
    assert report["epsilon"]["pld"] <= float(epsilon) and report["delta"] == 1e-5
    assert report["guarantee"].startswith("(epsilon, delta)-differential privacy")
    assert metadata["public_config"]["data"]["public"] == "pen-letters-varied"
