"""The house: imports go down the floors only, and the seven files stay short enough to read."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# From the ground up. A file is named by its module, a folder by its package.
FLOORS = [("vae", "unet", "ldm", "dp_sgd", "accountant"), ("variants",), ("runtime",),
          ("datasets",), ("train", "sample", "evaluate", "audit", "data"), ("benchmarks", "learn")]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
COMMANDS = FLOORS[4]
AMONG_COMMANDS = {("audit", "train")}   # the audit attacks train.py's own loop
PACKAGES = {"torch", "numpy", "scipy", "PIL", "tqdm"}
SEVEN = ["ldm", "vae", "unet", "dp_sgd", "accountant", "train", "sample"]

Sources = dict[str, str]   # {path: what stands there}


def read_sources(*folders: str) -> Sources:
    """The Python files of the repository's own folder and of `folders`."""
    paths = [*ROOT.glob("*.py"), *(p for name in folders for p in (ROOT / name).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(paths)}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(source: str, known: set[str]) -> Iterator[str]:
    """The modules that a file imports, inside functions too: "package.module" if it is `known`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known else base


def wrong_import(module: str, target: str) -> str | None:
    """What is wrong with an import, if anything."""
    here, there = module.split(".")[0], target.split(".")[0]
    if there not in FLOOR_OF:
        is_known = there in PACKAGES or there in sys.stdlib_module_names
        return None if is_known or here == "benchmarks" else "is no package of requirements.txt"
    if FLOOR_OF[there] > FLOOR_OF[here]:
        return "stands on a floor above"
    if {here, there} <= set(COMMANDS) and (here, there) not in AMONG_COMMANDS:
        return "is a command too"
    return None


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, in order; empty if there is none."""
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module):]
        if module in finished:
            return []
        for target in sorted(graph.get(module, ())):
            if circle := visit(target, [*trail, module]):
                return circle
        finished.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), [])


def complaints(sources: Sources) -> list[str]:
    """Every import that goes up or to a foreign package, and one circle."""
    graph, found = {}, []
    known = {module_name(path) for path in sources}
    for path, source in sources.items():
        module = module_name(path)
        if module.split(".")[0] not in FLOOR_OF:
            found.append(f"{path} stands on no floor")
            continue
        graph[module] = set(imported(source, known))
        found += [f"{path} imports {target}, which {wrong}" for target in sorted(graph[module])
                  if (wrong := wrong_import(module, target))]
    if circle := find_circle(graph):
        found.append(f"circle: {' -> '.join([*circle, circle[0]])}")
    return found


# ---- floors ------------------------------------------------------------------------------------

def test_imports_go_down_and_never_round():
    folders = {name for names in FLOORS for name in names if (ROOT / name).is_dir()} - {"data"}
    sources = read_sources(*folders)
    assert len(sources) > 30
    assert complaints(sources) == []


def test_wrong_imports_are_found():
    assert complaints({
        "vae.py": "def f():\n    if f:\n        from variants import vq\n",
        "variants/vq.py": "import math\nimport torch.nn as nn\nimport pandas.io\n",
        "runtime/files.py": "from runtime import pictures\n",
        "runtime/pictures.py": "def draw():\n    from runtime.files import save\n",
        "sample.py": "import train\nimport benchmarks.speed\n",
        "audit.py": "import train\n",
        "train.py": "import datasets\nfrom PIL import Image\nfrom . import vae\n",
        "benchmarks/speed.py": "import opacus\nimport train\n",
        "helpers.py": "",
    }) == ["vae.py imports variants.vq, which stands on a floor above",
           "variants/vq.py imports pandas.io, which is no package of requirements.txt",
           "sample.py imports benchmarks.speed, which stands on a floor above",
           "sample.py imports train, which is a command too",
           "train.py imports ., which is no package of requirements.txt",
           "helpers.py stands on no floor",
           "circle: runtime.files -> runtime.pictures -> runtime.files"]


def test_the_ground_loads_no_other_floor():
    code = "import sys, ldm, dp_sgd; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert {"ldm", "dp_sgd", "torch"} <= loaded
    assert not loaded & {"PIL", "variants", "runtime", "datasets", *COMMANDS}


# ---- budgets -----------------------------------------------------------------------------------

def functions(name: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_the_seven_files_are_short():
    texts = [(ROOT / f"{name}.py").read_text("utf-8") for name in SEVEN]
    assert sum(len(text.splitlines()) for text in texts) <= 1_700
    assert sum(map(len, texts)) <= 90_000


def test_no_line_is_wider_than_a_hundred_columns():
    sources = read_sources("variants", "runtime", "datasets", "benchmarks", "learn", "tests")
    wide = [f"{path}:{number}" for path, source in sources.items()
            for number, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert wide == []


def test_each_function_of_the_seven_fits_a_screen():
    long = [f"{name}.{node.name}" for name in SEVEN for node in functions(name)
            if node.end_lineno - node.lineno >= 50]
    assert long == []


def without_annotation(node: ast.FunctionDef) -> list[str]:
    """What a function leaves without a type: arguments except self and cls, and its result."""
    a = node.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    bare = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in
            ("self", "cls")]
    return bare + ["its result"] * (node.returns is None and node.name != "__init__")


def test_each_function_of_the_seven_is_annotated():
    bare = {f"{name}.{node.name}": missing for name in SEVEN for node in functions(name)
            if (missing := without_annotation(node))}
    assert bare == {}
