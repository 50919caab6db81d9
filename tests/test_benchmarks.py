"""The scripts below benchmarks/ load, and levers.py mixes up no results. What they measure is not tested here."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_measures(path):
    assert f"benchmarks/{path.name}" in loaded(path).__doc__


@pytest.fixture
def levers(monkeypatch, tmp_path):
    """levers.main, of which every run takes no time; `found` holds the commands of the runs so far."""
    module, found = loaded(SCRIPTS[[path.stem for path in SCRIPTS].index("levers")]), []

    def run(command, **options):
        steps = json.loads(command[-1])
        found.append(steps)
        small_cnn = {"small-cnn": {"mean": 0.9 + 0.01 * len(found)}}
        Path(steps[-1][-1]).write_text(json.dumps(dict(results=[dict(accuracy=small_cnn)], loss=0.1)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["levers.py", *arguments[:1], "--folder", str(tmp_path / "f"), *arguments[1:]])
        module.main()
    return main, found


def test_a_lever_is_run_once_and_again_for_other_data_flags_or_epsilon(levers, capsys):
    main, found = levers
    main("public.pt", "--levers", "preset", "--eps", "1")
    main("public.pt", "--levers", "preset", "--eps", "1")
    assert len(found) == 1 and "91.00%" in capsys.readouterr().out
    main("public.pt", "--levers", "preset", "--eps", "1.5")
    main("public.pt", "--levers", "preset", "--eps", "1", "--real", "photos.zip")
    main("public.pt", "--levers", "preset", "--eps", "1", "--flags", "--epochs", "2")
    main("other/public.pt", "--levers", "preset", "--eps", "1")
    assert len(found) == 5
    capsys.readouterr()
    main("public.pt", "--levers", "preset", "--eps", "1")
    assert len(found) == 5 and "91.00%, 0.1000 |" in capsys.readouterr().out   # of one run, not of two


def test_an_interrupted_run_is_named(levers, tmp_path, capsys):
    main, found = levers
    main("public.pt", "--levers", "preset", "--eps", "1")
    report, = (tmp_path / "f").glob("*.json")
    report.unlink()
    main("public.pt", "--levers", "preset", "--eps", "1")
    assert len(found) == 1 and "delete it to try again" in capsys.readouterr().err
