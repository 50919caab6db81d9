"""The list of deliberate faults fits the code, and the program that tries them tells the truth."""

import ast
from collections import Counter
from pathlib import Path

import faults
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = [fault.name for fault in faults.FAULTS]


def test_no_two_faults_have_one_name():
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []


@pytest.mark.parametrize("fault", faults.FAULTS, ids=NAMES)
def test_every_fault_has_one_place_and_tests(fault, tmp_path):
    copy = tmp_path / fault.file
    copy.parent.mkdir(exist_ok=True)
    copy.write_text((ROOT / fault.file).read_text("utf-8"), "utf-8")
    before = faults.put_into(fault, tmp_path)
    assert copy.read_text("utf-8") != before
    ast.parse(copy.read_text("utf-8"))   # what does not even compile would be caught by any test
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        assert not name or name in {node.name for node in tree.body
                                    if isinstance(node, ast.FunctionDef)}, test


def test_a_fault_without_a_place_is_named(tmp_path):
    (tmp_path / "ldm.py").write_text("twice twice")
    with pytest.raises(ValueError, match="mine: ldm.py has its text 2 times"):
        faults.put_into(faults.fault("mine", "ldm.py", "twice", "once"), tmp_path)


def test_missed_faults_are_told(monkeypatch, capsys):
    file, test = "accountant.py", "core/test_accountant.py::test_numpy_scalars_are_numbers"
    monkeypatch.setattr(faults, "FAULTS", [
        faults.fault("grave", file, "return float(sum(steps", "return 2 * float(len(steps", test),
        faults.fault("harmless", file, '"""Privacy accountant', '"""The accountant', test),
        faults.fault("fatal", file, "import decimal", "import decimals", test)])
    assert faults.main([]) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("caught 1 of 3\n") and "MISSED: harmless (its tests pass)" in printed
    assert "MISSED: fatal (pytest ended with code" in printed
