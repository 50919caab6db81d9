"""How much code is one training step? Functions, lines, files and call depth, as they are run.

    python benchmarks/trace_step.py             # the public step, and the private one by vmap
    python benchmarks/trace_step.py --ghost     # also the private one by ghost clipping

One middle step of train.py's loops is traced, from the end of one to the end of the next. Every
function of this project that is entered counts in full, the loop included, without blank lines,
comments and docstrings. The networks are left out: vae.py, unet.py and the embedders.
"""

import argparse
import ast
import functools
import inspect
import io
import sys
import tokenize
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from dp_sgd import PrivacyPlan, private_parameter_names  # noqa: E402
from ldm import EMA  # noqa: E402
from runtime.checkpoints import build_model  # noqa: E402
from runtime.config import Config  # noqa: E402
from runtime.engines import clipping_engine  # noqa: E402
from runtime.runs import Saver  # noqa: E402

NETWORKS = {"vae.py", "unet.py"}
OUTSIDE = {".venv", "benchmarks", "tests"}
STEP_ENDS = inspect.unwrap(EMA.update).__code__   # the last call of a step, in both loops
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}


class Footprint(NamedTuple):
    """What one step runs through."""
    functions: dict[str, int]   # {"file: function": lines of code}
    lines: int                  # of all functions; a function inside another counts once
    files: set[str]
    depth: int                  # of nested calls, the loop included


# ---- lines of code -----------------------------------------------------------------------------

def file_of(code: CodeType) -> str | None:
    """The file of a function of this project, networks left out; None for all other code."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    name = str(path.relative_to(ROOT))
    owner, _, method = code.co_qualname.rpartition(".")
    is_network = name in NETWORKS or method == "forward" and owner != "LatentDiffusion"
    return None if is_network or path.relative_to(ROOT).parts[0] in OUTSIDE else name


@functools.cache
def code_lines(name: str) -> dict[int, set[int]]:
    """{first line of each function, decorators included: the numbers of its lines of code}."""
    source = (ROOT / name).read_text("utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    spans = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(
                node, clean=False):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            first = min(n.lineno for n in (node, *node.decorator_list))
            spans[first] = range(first, node.end_lineno + 1)
    return {first: lines & set(span) for first, span in spans.items()}


# ---- one step ----------------------------------------------------------------------------------

class Tracer:
    """A profiler that notes the functions entered in a loop's second step.

    A step ends where its moving average is updated.
    """

    def __init__(self) -> None:
        self.ended, self.depth = 0, 0
        self.entered: dict[CodeType, str] = {}   # in the order of their first calls

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self.ended == 1 and event == "call" and file_of(frame.f_code):
            stack = self.project_frames(frame)
            self.depth = max(self.depth, len(stack))
            for code in reversed(stack):
                self.entered.setdefault(code, file_of(code))
        if event == "return" and frame.f_code is STEP_ENDS:
            self.ended += 1

    @staticmethod
    def project_frames(frame: FrameType | None) -> list[CodeType]:
        """The project's functions that are being run, the innermost first."""
        stack = []
        while frame is not None:
            if file_of(frame.f_code):
                stack.append(frame.f_code)
            frame = frame.f_back
        return stack

    def footprint(self) -> Footprint:
        functions, lines = {}, set()
        for code, name in self.entered.items():
            if not code.co_name.startswith("<"):   # lambdas and the like stand in other functions
                own = code_lines(name)[code.co_firstlineno]
                functions[f"{name}: {code.co_qualname}"] = len(own)
                lines |= {(name, number) for number in own}
        return Footprint(functions, len(lines), set(self.entered.values()), self.depth)


def trace(stage: str, clipping: str = "vmap", steps: int = 3) -> Footprint:
    """The footprint of one step of a `stage`, "public" or "private", of the default preset."""
    config = Config()
    config.run.clipping, config.public.steps, config.public.batch = clipping, steps, 4
    torch.manual_seed(0)
    model = build_model(config.architecture(10))
    z_0, labels = torch.randn(12, *model.vae.latent_shape), torch.arange(12) % 10
    rng, names = np.random.default_rng(0), private_parameter_names(model)
    tracer = Tracer()
    if stage == "public":
        run = functools.partial(train.train_public, model, z_0, labels, config, rng)
    else:   # q is 1: no batch is empty
        plan = PrivacyPlan(12, 12, steps, 1.0, config.private.max_grad_norm, config.private.delta)
        saver = Saver(model, steps, steps, [], lambda training: None)
        run = functools.partial(
            train.train_private, model, z_0, labels, names, plan, config, rng, on_step=saver,
            clipped_sum=clipping_engine(model, z_0, labels, names, config))
    before = sys.getprofile()
    sys.setprofile(tracer)
    try:
        run()
    finally:
        sys.setprofile(before)
    return tracer.footprint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ghost", action="store_true", help="also trace ghost clipping")
    args = parser.parse_args()
    found = {"public": trace("public"), "private, vmap": trace("private")}
    if args.ghost:
        found["private, ghost"] = trace("private", "ghost")
    for step, footprint in found.items():
        print(f"{step}:")
        for name, lines in footprint.functions.items():
            print(f"{lines:6}  {name}")
    print("\n| step | functions | lines of code | files | call depth |\n|---|---|---|---|---|")
    for step, (functions, lines, files, depth) in found.items():
        print(f"| {step} | {len(functions)} | {lines} | {len(files)} | {depth} |")


if __name__ == "__main__":
    main()
