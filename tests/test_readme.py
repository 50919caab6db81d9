"""What the README promises about the code stays true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CORE = ("accountant.py audit.py config.py data.py download.py dp_sgd.py evaluate.py folders.py formats.py glyphs.py "
        "ldm.py official.py pld.py sample.py scenes.py train.py unet.py vae.py").split()


def definitions(tree: ast.AST, prefix: str = "") -> set[str]:
    """Names of all functions, classes and methods, as `Class.method`."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= definitions(node, f"{node.name}.")
    return found


ENTRIES = re.findall(r"`(\w+\.py):([\w.]+)`", README)


def test_the_table_maps_at_least_twenty_equations():
    assert len(ENTRIES) >= 20
    assert {file for file, _ in ENTRIES} >= {"accountant.py", "dp_sgd.py", "ldm.py", "train.py", "unet.py", "vae.py"}


@pytest.mark.parametrize("file, name", ENTRIES)
def test_every_entry_of_the_equation_table_exists(file, name):
    assert name in definitions(ast.parse((ROOT / file).read_text()))


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"\((assets/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    for name in CORE:
        assert f"`{name}`" in README


def test_line_counts_are_right_to_ten_percent():
    for name in CORE:
        stated = int(re.search(rf"`{name}` \| (\d+) \|", README).group(1))
        assert stated == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.1), name


def test_the_first_screen_is_short():
    assert len(README.split("\n## ")[0].split()) <= 150


def test_the_core_imports_only_the_five_packages():
    import sys
    allowed = {"torch", "numpy", "scipy", "PIL", "tqdm", *sys.stdlib_module_names, *(n[:-3] for n in CORE)}
    for name in CORE:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {m.split(".")[0] for m in modules} <= allowed, (name, modules)
