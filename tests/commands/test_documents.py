"""What README.md and docs/ say of the code is true: functions, files, links, tests and commands."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import evaluate
import sample
from runtime import config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SEVEN = ["train.py", "ldm.py", "dp_sgd.py", "accountant.py", "sample.py", "unet.py", "vae.py"]


def definitions(path: str) -> set[str]:
    """Names of all functions, classes and methods of a file, these as `Class.method`."""
    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{node.name}.")

    return set(names(ast.parse((ROOT / path).read_text("utf-8")).body))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- equations and faults ----------------------------------------------------------------------

EQUATIONS = re.findall(r"`([\w/]+\.py):([\w.]+)` \|$",
                       (ROOT / "docs/equations.md").read_text("utf-8"), re.MULTILINE)
CITED_TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`",
                         (ROOT / "docs/threat-model.md").read_text("utf-8"))


def test_the_table_maps_at_least_39_equations():
    assert len(EQUATIONS) >= 39
    assert {file for file, _ in EQUATIONS} >= {"accountant.py", "dp_sgd.py", "ldm.py", "unet.py",
                                               "vae.py", "variants/ghost.py", "variants/pld.py"}


@pytest.mark.parametrize("file, function", EQUATIONS)
def test_every_function_of_the_equation_table_exists(file, function):
    assert function in definitions(file)


def test_the_threat_model_cites_tests_that_exist():
    assert CITED_TESTS
    for file, function in CITED_TESTS:
        assert function in definitions(file), function


# ---- README ------------------------------------------------------------------------------------

def test_the_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1_500


def test_the_readme_names_the_seven_files_in_order():
    text = (ROOT / "README.md").read_text("utf-8").partition("## Read seven files")[2]
    rows = re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)
    assert list(dict.fromkeys(rows)) == [file for file in SEVEN if file != "sample.py"]
    assert "`sample.py`" in text


# ---- files, links and commands of all documents ------------------------------------------------

@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_file_that_a_document_names_exists(document):
    text = without_code(document.read_text("utf-8"))
    folders = "variants|runtime|datasets|presets|benchmarks|tests|docs|assets"
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|toml|md|cff|yml))\b", text)
    named += re.findall(rf"`((?:{folders})(?:/[\w.-]+)*/?)`", text)
    named += re.findall(r"(?:^| )python ([\w/]+\.py)", document.read_text("utf-8"), re.MULTILINE)
    missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(document.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_relative_link_resolves(document):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text("utf-8")))
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(document: Path) -> Iterator[tuple[str, list[str]]]:
    """(program, arguments) of every command that a document shows, with its shell variables."""
    blocks = re.findall(r"^```\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    for block in blocks:
        known = {"EPS": "1"}   # what a loop runs over
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$([A-Z]+)", lambda match, known=known: known[match[1]], line)
            if match := re.match(r'([A-Z]+)="?([^"]*)"?$', line):
                known[match[1]] = match[2]
            elif match := re.search(r"(?:^|[ $])(?:python|torchrun .*) (\w+\.py)( .*)?$", line):
                yield match[1], shlex.split(match[2] or "", comments=True)


COMMANDS = [pytest.param(program, arguments, id=f"{name(document)}: {shlex.join(arguments)}")
            for document in DOCUMENTS for program, arguments in commands(document)
            if program in ("train.py", "sample.py", "evaluate.py") and "CHANGES" not in arguments]


def test_commands_are_found():
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize("program, arguments", COMMANDS)
def test_every_command_has_flags_that_exist(program, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)   # outputs are checked: they must not be there yet
    if program == "train.py":
        config.parse_args(arguments, "")
    else:
        {"sample.py": sample, "evaluate.py": evaluate}[program].parse_args(arguments)
