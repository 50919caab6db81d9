"""Grids of samples, where samples come from, and what is said below them."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import accountant
from dp_sgd import PrivacyPlan
from runtime import samples
from runtime.ledger import ledger_entry
from runtime.samples import caption, provenance, save_samples, title
from tiny import configure, tiny_model
from variants import pld

PLAN = PrivacyPlan(1_000, 100, 20, 2.0, 0.1, 1e-5)


# ---- grids -------------------------------------------------------------------------------------

@pytest.fixture
def panels(monkeypatch) -> list:
    """The panels of each grid that is drawn; they are still written."""
    seen, save_grid = [], samples.save_grid

    def watch(path, drawn, *others):
        seen.extend(drawn)
        save_grid(path, drawn, *others)

    monkeypatch.setattr(samples, "save_grid", watch)
    return seen


@pytest.mark.parametrize("settings, names, rows", [
    ([], ["a", "b", "c"], 3),
    (["text.length=6"], [f"say {k}" for k in range(12)], 10)])
def test_the_grid_has_ten_samples_of_each_name(tmp_path, panels, settings, names, rows):
    model, config = tiny_model(*settings).float(), configure(*settings)
    save_samples(model, names, config, tmp_path / "model.pt", "eps = 1")
    [(heading, images, shown)] = panels
    assert heading == "eps = 1" and shown == names[:rows]
    assert images.shape == (rows, 10, 8, 8, 1) and images.dtype == np.uint8
    assert len({image.tobytes() for row in images for image in row}) > 1
    assert Image.open(tmp_path / "model.png").size[0] > 10 * 8
    assert [path.name for path in tmp_path.iterdir()] == ["model.png"]


def test_without_names_there_is_no_grid(tmp_path, capsys):
    model = tiny_model("text.length=6").float()
    save_samples(model, [], configure("text.length=6"), tmp_path / "model.pt", "eps = 1")
    assert "--prompt" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["samples.solver=ddim", "samples.guidance=9", "public.seed=5",
                                     "samples.steps=7"])
def test_the_grid_follows_the_settings(tmp_path, panels, setting):
    base = ["samples.solver=dpm", "samples.steps=6", "samples.guidance=1.5", "public.seed=0"]
    for settings in (base, base, [*base, setting]):
        save_samples(tiny_model().float(), ["a"], configure(*settings), tmp_path / "m.pt", "")
    first, same, other = (images for _, images, _ in panels)
    assert np.array_equal(first, same) and not np.array_equal(first, other)


# ---- where samples come from -------------------------------------------------------------------

def checkpoint(folder: Path) -> Path:
    path = folder / "private.pt"
    path.write_bytes(b"weights")
    return path


def test_a_public_model_has_spent_nothing(tmp_path):
    path = checkpoint(tmp_path)
    expected = dict(checkpoint="private.pt", sha256=hashlib.sha256(b"weights").hexdigest(),
                    epsilon=None, delta=None)
    assert provenance(path, dict(classes=[], config={})) == expected
    assert title(expected) == "public only"


@pytest.mark.parametrize("name, module", [("rdp", accountant), ("pld", pld)])
def test_epsilon_is_of_all_the_ledger(tmp_path, name, module):
    metadata = dict(ledger=[ledger_entry(PLAN, 20), ledger_entry(PLAN, 7)],
                    plan=dict(delta=1e-4), config=dict(private=dict(accountant=name)))
    found = provenance(checkpoint(tmp_path), metadata)
    assert found["epsilon"] == module.total_epsilon([(0.1, 2.0, 20), (0.1, 2.0, 7)], 1e-4)
    assert found["delta"] == 1e-4
    shown = float(title(found).removeprefix("eps = "))
    assert found["epsilon"] <= shown <= 1.01 * found["epsilon"]


def test_seeded_noise_has_spent_everything(tmp_path):
    metadata = dict(ledger=[ledger_entry(PLAN, 20), ledger_entry(PLAN, 20, 0)],
                    plan=dict(delta=1e-5), config=dict(private=dict(accountant="rdp")))
    found = provenance(checkpoint(tmp_path), metadata)
    assert found["epsilon"] == math.inf and title(found) == "eps = inf"


# ---- what is said below them -------------------------------------------------------------------

def row(mean: float, **origin: object) -> dict:
    return dict(origin=origin, accuracy=dict(cnn=dict(mean=mean)))


def report(path: Path, *rows: dict) -> Path:
    path.write_text(json.dumps(dict(results=rows, test_images=1_234, seeds=2)))
    return path


PUBLIC = dict(sha256="aa", epsilon=None, delta=None)
PRIVATE = dict(sha256="bb", epsilon=2.5, delta=1e-5)
FOREIGN = dict(sha256="cc")


def test_the_caption_tells_every_delta():
    other = dict(sha256="dd", epsilon=1.0, delta=0.01)
    assert caption([PUBLIC], []) == ""
    assert caption([other, PUBLIC, PRIVATE, PRIVATE], []) == "delta = 1e-05, 0.01. "


def test_the_caption_tells_the_accuracies(tmp_path):
    results = report(tmp_path / "r.json", row(0.9, **PRIVATE), row(0.5, **FOREIGN),
                     row(0.75, **PUBLIC), row(0.99, real=True))
    assert caption([PUBLIC, PRIVATE], [results]) == (
        "delta = 1e-05. Accuracy on 1,234 real test images of classifiers trained on "
        "eps = 2.5: cnn 90.00%; public only: cnn 75.00%; real images: cnn 99.00% (mean of 2).")


def test_a_caption_is_of_several_reports(tmp_path):
    real = report(tmp_path / "real.json", row(0.99, real=True))
    results = report(tmp_path / "r.json", row(0.9, **PRIVATE))
    assert caption([PRIVATE], [real, results]).endswith(
        "trained on real images: cnn 99.00%; eps = 2.5: cnn 90.00% (mean of 2).")
    assert "eps = 2.5: cnn 90.00%; real" in caption([PRIVATE], [results, real])
    results.write_text(json.dumps(json.loads(results.read_text()) | {"seeds": 3}))
    with pytest.raises(ValueError, match="r.json differ in .* number of classifiers"):
        caption([PRIVATE], [real, results])


def test_samples_without_classes_have_no_accuracies(tmp_path):
    results = report(tmp_path / "r.json", row(0.5, **PUBLIC) | {"accuracy": {}})
    assert caption([PUBLIC], [results]) == ""


def test_a_caption_is_never_about_other_checkpoints(tmp_path):
    results = report(tmp_path / "r.json", row(0.5, **FOREIGN), row(0.99, real=True))
    with pytest.raises(ValueError, match="r.json is about other checkpoints"):
        caption([PUBLIC], [results])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"results": [{}]}', '{"results": 3}', None,
                                     "[" * 10**5], ids=lambda content: str(content)[:20])
def test_a_foreign_report_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match="r.json is no readable file of evaluate.py") as error:
        caption([PUBLIC], [tmp_path / "r.json"])
    assert "\n" not in str(error.value)
