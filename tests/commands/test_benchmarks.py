"""The scripts of benchmarks/ load; a step's code stays within its budget; results do not mix.

What the scripts measure is not tested here.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import sample
from runtime.config import parse_args

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_how_to_run_it(name):
    assert f"python benchmarks/{name}.py" in loaded(name).__doc__


# ---- the length of one training step -----------------------------------------------------------

@pytest.fixture(scope="module")
def tracing() -> ModuleType:
    return loaded("trace_step")


def test_one_private_step_fits_four_files(tracing):
    step = tracing.trace("private", "vmap")
    assert {"train.py: train_private", "ldm.py: q_sample", "dp_sgd.py: poisson_sample",
            "dp_sgd.py: clipped_gradient_sum", "dp_sgd.py: add_noise"} <= step.functions.keys()
    assert len(step.files) <= 4
    assert step.lines <= 110


def test_one_public_step_fits_sixty_lines(tracing):
    step = tracing.trace("public")
    assert {"train.py: train_public", "ldm.py: q_sample"} <= step.functions.keys()
    assert step.lines <= 60


def test_ghost_clipping_replaces_one_function(tracing):
    steps = {clipping: tracing.trace("private", clipping) for clipping in ("vmap", "ghost")}
    common = steps["vmap"].functions.keys() & steps["ghost"].functions.keys()
    assert steps["vmap"].functions.keys() - common == {
        "dp_sgd.py: clipped_gradient_sum", "dp_sgd.py: per_example_gradients",
        "dp_sgd.py: per_example_gradients.<locals>.loss"}
    assert steps["ghost"].files - steps["vmap"].files == {"variants/ghost.py"}


def test_lines_of_code_leave_out_comments_and_docstrings(tracing, tmp_path, monkeypatch):
    (tmp_path / "some.py").write_text('''import functools


@functools.cache
def f(a):
    """Words,

    more words.
    """

    # why
    return """text
    """   # more


def g():
    def h():
        return 1
    return h
''')
    monkeypatch.setattr(tracing, "ROOT", tmp_path)
    assert tracing.code_lines("some.py") == {4: {4, 5, 12, 13}, 16: {16, 17, 18, 19}, 17: {17, 18}}


# ---- ablations ---------------------------------------------------------------------------------

def test_every_ablation_is_understood():
    for flags in loaded("ablate").ABLATIONS.values():
        if flags[:1] == ["sample"]:
            sample.parse_args(["private.pt", "--npz", "s.npz", "--guidance", "1", *flags[1:]])
        else:
            parse_args(["--preset", "mnist", *flags], "")


@pytest.fixture
def ablate(monkeypatch, tmp_path):
    """ablate.main, whose runs take no time, and the commands of all runs so far."""
    module, found = loaded("ablate"), []

    def run(command, **options):
        steps = json.loads(command[-1])
        found.append(steps)
        small_cnn = {"small-cnn": {"mean": 0.9 + 0.01 * len(found)}}
        report = dict(results=[dict(accuracy=small_cnn)], loss=0.1)
        Path(steps[-1][-1]).write_text(json.dumps(report))
        return SimpleNamespace(returncode=0)

    def main(public, *arguments, eps="1"):
        command = ["ablate.py", public, "--folder", str(tmp_path / "f"), "--ablations", "preset"]
        monkeypatch.setattr(sys, "argv", [*command, "--eps", eps, *arguments])
        module.main()

    monkeypatch.setattr(module.subprocess, "run", run)
    return main, found


def test_an_ablation_runs_once_for_the_same_commands(ablate, capsys):
    main, found = ablate
    main("public.pt")
    main("public.pt")
    assert len(found) == 1 and "91.00%" in capsys.readouterr().out
    main("public.pt", eps="1.5")
    main("public.pt", "--real", "photos.zip")
    main("public.pt", "--flags", "--epochs", "2")
    main("other/public.pt")
    assert len(found) == 5
    capsys.readouterr()
    main("public.pt")
    assert len(found) == 5
    assert "91.00%, 0.1000 |" in capsys.readouterr().out   # of one run, not of two


def test_an_interrupted_run_is_named(ablate, tmp_path, capsys):
    main, found = ablate
    main("public.pt")
    report, = (tmp_path / "f").glob("*.json")
    report.unlink()
    main("public.pt")
    assert len(found) == 1 and "delete it to try again" in capsys.readouterr().err
