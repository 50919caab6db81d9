"""What a private step costs: speed and memory of the clipped gradient sum, here and by Opacus.

    python benchmarks/dp_step.py                                  # the small models: minutes
    python benchmarks/dp_step.py --models celeba64 celebahq256    # the large ones, in chunks
    python benchmarks/dp_step.py --growth                         # ghost clipping as work grows
    python benchmarks/dp_step.py --share                          # of the machine's matrix rate

Engines run one after the other, each in a process of its own, with the same model, batch and
threads. They take --rounds turns, of which the fastest counts: a machine's speed drifts, and other
work can only slow it down. On CUDA, which takes seconds to start, all run in one process, with
larger batches. Memory is the peak above the loaded model's.

    ordinary        a step without privacy: one backward pass to the same parameters
    vmap, ghost     dp_sgd.clipped_gradient_sum, variants.ghost.clipped_gradient_sum
    ghost-inexact   ghost with norms and sums in float32 and in one piece, to see what exact ones
                    cost. Never train so: one example could move the sum by more than C
    opacus-hooks, opacus-ghost    they need `pip install opacus`
    ...-bf16        the networks compute in bfloat16
    ...-tf32        matrix products in TF32; convolutions are by torch's default, on CUDA
    ...-compile     the U-Net by torch.compile, which takes up to minutes
    ...-graphs      the same with CUDA graphs

The U-Nets are the presets', with all of their attention trained.
"""

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dp_sgd import Batch, Tensors, clipped_gradient_sum, in_chunks, private_parameter_names
from ldm import ClassEmbedder, LatentDiffusion
from runtime.config import Config
from runtime.memory import peak_memory
from runtime.precision import bfloat16
from unet import UNet
from variants import ghost
from variants.unconditional import NoEmbedder

# preset: examples per step and per chunk
MODELS = {"mnist": (256, 256), "mnist-paper": (256, 256), "cifar10": (16, 16), "celeba64": (8, 8),
          "celebahq256": (2, 1)}
CUDA_MODELS = {"mnist": (8192, 8192), "mnist-paper": (4096, 4096), "cifar10": (128, 128),
               "celeba64": (64, 64), "celebahq256": (16, 16)}


def inexact_sum(model: nn.Module, parameters: Tensors, batch: Batch, C: float) -> Tensors:
    """ghost.clipped_gradient_sum without what its digits cost: no float64, no small blocks."""
    float32 = [(torch.Tensor, "double", torch.Tensor.float), (torch, "float64", torch.float32),
               (ghost, "BLOCK", 2**60), (ghost, "COPIED", 2**60)]
    with ExitStack() as stack:
        for owner, name, value in float32:
            stack.enter_context(patch.object(owner, name, value))
        return ghost.clipped_gradient_sum(model, parameters, batch, C)


CLIPPING = {"vmap": clipped_gradient_sum, "ghost": ghost.clipped_gradient_sum,
            "ghost-inexact": inexact_sum}
ENGINES = ["ordinary", *CLIPPING, "opacus-hooks", "opacus-ghost", "ordinary-bf16", "ghost-bf16"]
CUDA_ENGINES = [*ENGINES, "ordinary-tf32", "ghost-tf32"]
OTHERS = ["ordinary-compile", "ghost-compile", "ordinary-graphs"]   # if asked for
WAYS = ("bf16", "tf32", "compile", "graphs")



def setting(name: str, device: str) -> tuple[dict, int, int, int]:
    """(arguments of UNet, size of the latents, examples per step, per chunk) of a preset."""
    config = Config.from_preset(name)
    size = config.data.image_size // 2 ** (len(config.vae.ch_mult) - 1)
    sizes = (CUDA_MODELS if device == "cuda" else MODELS)[name]
    return config.architecture(10)["unet"], size, *sizes


# ---- one step ----------------------------------------------------------------------------------

def make_step(engine: str, model: LatentDiffusion, names: list[str], batch: Batch,
              chunk: int) -> Callable[[], object]:
    """A function that computes the gradient sum of `batch`, clipped unless `engine` is ordinary."""
    model.requires_grad_(False)
    if engine in CLIPPING:
        parameters = {name: model.get_parameter(name) for name in names}
        clipped_sum = in_chunks(CLIPPING[engine], chunk)
        return lambda: clipped_sum(model, parameters, batch, 1.0)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    make = {"opacus-hooks": opacus_hooks, "opacus-ghost": opacus_ghost}.get(engine, ordinary)
    return make(model, batch, chunk)


def chunks(batch: Batch, chunk: int) -> Iterator[Batch]:
    return zip(*(x.flatten(0, 1).split(chunk) for x in batch))


def ordinary(model: nn.Module, batch: Batch, chunk: int) -> Callable[[], None]:
    def step() -> None:
        for part in chunks(batch, chunk):
            model(*part).sum().backward()
    return step


def opacus_hooks(model: nn.Module, batch: Batch, chunk: int) -> Callable[[], None]:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(torch.optim.SGD(trained, lr=0.0), noise_multiplier=0.0,
                            max_grad_norm=1.0, expected_batch_size=len(batch[0]))

    def step() -> None:
        for part in chunks(batch, chunk):
            wrapped(*part).sum().backward()
            optimizer.clip_and_accumulate()
            for p in trained:
                p.grad_sample = None
    return step


def opacus_ghost(model: nn.Module, batch: Batch, chunk: int) -> Callable[[], None]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(trained, lr=0.0), noise_multiplier=0.0, max_grad_norm=1.0,
        expected_batch_size=len(batch[0]))

    def step() -> None:
        for part in chunks(batch, chunk):
            wrapped.enable_hooks()
            losses = wrapped(*part)
            DPTensorFastGradientClipping(wrapped, optimizer, losses, "sum").backward()
            optimizer.accumulate()
    return step


# ---- measuring ---------------------------------------------------------------------------------

def make_model(arguments: dict, device: str) -> LatentDiffusion:
    """A model without an autoencoder, which no step needs."""
    torch.manual_seed(0)
    with torch.device(device):   # large models take seconds to fill with random numbers on a CPU
        unet, dim = UNet(**arguments), arguments["context_dim"]
        embedder = ClassEmbedder(10, dim) if dim else NoEmbedder()
        return LatentDiffusion(nn.Identity(), unet, embedder).to(device)


def made_up_batch(B: int, K: int, channels: int, size: int, device: str) -> Batch:
    shape = (B, K, channels, size, size)
    return (torch.randn(shape, device=device), torch.randint(1000, (B, K), device=device),
            torch.randn(shape, device=device), torch.randint(10, (B, K), device=device))


def measure(engine: str, name: str, device: str, seconds: float, batch: int | None = None,
            chunk: int | None = None, width: int | None = None, K: int = 1,
            count: bool = False) -> dict:
    """{rate: examples/s, bytes}: the fastest step of at least three within `seconds`.

    A warm-up comes before. batch, chunk and width are the preset's unless given. With `count` also
    flops, the floating-point operations of matrix products and convolutions per example, and peak,
    operations per second in a product of two 2048 x 2048 matrices.
    """
    arguments, size, *sizes = setting(name, device)
    arguments = {**arguments, "model_channels": width or arguments["model_channels"]}
    B, chunk = batch or sizes[0], chunk or sizes[1]
    engine, _, way = engine.rpartition("-") if engine.endswith(WAYS) else (engine, "", "")
    torch.set_float32_matmul_precision("high" if way == "tf32" else "highest")
    model = make_model(arguments, device)
    if compiled := way in ("compile", "graphs"):
        torch.compiler.reset()
        model.unet.compile(mode="reduce-overhead" if way == "graphs" else None)
    names = private_parameter_names(model)
    examples = made_up_batch(B, K, arguments["in_channels"], size, device)
    step = make_step(engine, model, names, examples, chunk)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(examples[0].device)
    with bfloat16(model.unet, model.embedder, enabled=way == "bf16"):
        # Some steps are compiled, or recorded, in the second call.
        fastest = fastest_call(step, device, seconds, 3 if compiled else 1)
        result = dict(rate=B / fastest, bytes=peak_memory(examples[0].device) - before)
        if not count:
            return result
        with FlopCounterMode(display=False) as counter:
            step()
    peak = matrix_rate(device, torch.bfloat16 if way == "bf16" else torch.float32)
    return dict(result, flops=counter.get_total_flops() / B, peak=peak)


def fastest_call(step: Callable[[], object], device: str, seconds: float, warm_up: int) -> float:
    """Seconds that the fastest of at least three calls takes, after `warm_up` calls."""
    def timed() -> float:
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(warm_up):
        timed()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        times.append(timed())
    return min(times)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second in a product of two 2048 x 2048 matrices."""
    a, times = torch.randn(2048, 2048, device=device, dtype=dtype), []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()   # waits for the device
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times)


def measured(device: str, seconds: float, **what: object) -> dict | None:
    """What `measure` returns, in a process of its own unless on CUDA.

    None if it fails, with its last words on stderr.
    """
    if device == "cuda":
        try:
            return measure(device=device, seconds=seconds, **what)
        except Exception as error:   # of memory, or in Opacus
            first = str(error).splitlines()[0]
            print(f"{what}: {type(error).__name__}: {first}", file=sys.stderr)
            return None
        finally:   # models with hooks hold on to themselves
            gc.collect()
            torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--one", json.dumps(what), "--seconds", str(seconds)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    print(f"{what}: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return None


# ---- tables ------------------------------------------------------------------------------------

def compare(models: list[str], engines: list[str], rounds: int, batch: int | None, device: str,
            seconds: float) -> None:
    """Print the table of all engines on these models; "-" where an engine fails."""
    others = [engine for engine in engines if engine != "ordinary"]
    print(f"| U-Net, latents, batch | ordinary step | {' | '.join(others)} |\n"
          f"|---|---|{'---|' * len(others)}")
    for name in models:
        arguments, size, *sizes = setting(name, device)
        B, chunk = (batch, batch) if batch else sizes
        found = {}
        for engine in ["ordinary", *others] * rounds:
            what = dict(engine=engine, name=name, batch=batch, chunk=batch)
            if result := measured(device, seconds, **what):
                found.setdefault(engine, []).append(result)
        cells = " | ".join(cells_of(found, others))
        print(f"| {name}, {size}x{size}x{arguments['in_channels']}, {B} by {chunk} | {cells} |",
              flush=True)


def cells_of(found: dict[str, list[dict]], others: list[str]) -> list[str]:
    """Speed and memory of the ordinary step; of the others, its multiples of time (memory)."""
    if "ordinary" not in found:   # what the others are compared with
        return ["-"] * (1 + len(others))
    rates = {engine: max(r["rate"] for r in runs) for engine, runs in found.items()}
    peaks = {engine: max(r["bytes"] for r in runs) for engine, runs in found.items()}
    ordinary = float(f"{rates['ordinary']:.3g}")   # 1,000 rather than 1e+03
    cells = [f"{ordinary:,g}/s, {peaks['ordinary'] / 1e9:.2f} GB"]
    for engine in others:
        if engine in found:
            slower = rates["ordinary"] / rates[engine]
            cells.append(f"{slower:.2f} ({peaks[engine] / peaks['ordinary']:.2f})")
        else:
            cells.append("-")
    return cells


def growth(device: str, seconds: float) -> None:
    """Print what an example costs by ghost clipping, on the mnist preset's U-Net."""
    print("| batch | width | K | ms per example | peak memory |\n|---|---|---|---|---|")
    ways = [*(dict(batch=B) for B in (64, 256, 1024, 8192)),
            *(dict(batch=256, width=w) for w in (32, 128, 256)),
            *(dict(batch=256, K=K) for K in (2, 4, 8))]
    for way in ways:
        if result := measured(device, seconds, engine="ghost", name="mnist", **way):
            print(f"| {way['batch']} | {way.get('width', 64)} | {way.get('K', 1)} | "
                  f"{1e3 / result['rate']:.2f} | {result['bytes'] / 1e9:.2f} GB |", flush=True)


def share(models: list[str], device: str, seconds: float) -> None:
    """Print what share of the machine's matrix rate the ordinary step reaches."""
    print("| U-Net | float32: GFLOP/s | of the matrix rate | bfloat16: GFLOP/s "
          "| of the matrix rate |\n|---|---|---|---|---|")
    for name in models:
        cells = []
        for engine in ("ordinary", "ordinary-bf16"):
            found = measured(device, seconds, engine=engine, name=name, count=True)
            if not found:   # out of memory
                cells += ["-", "-"]
                continue
            reached = found["rate"] * found["flops"]
            cells += [f"{reached / 1e9:.0f}", f"{reached / found['peak']:.0%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engines = CUDA_ENGINES if device == "cuda" else ENGINES
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["mnist", "mnist-paper", "cifar10"])
    add("--engines", nargs="+", choices=[*CUDA_ENGINES, *OTHERS], default=engines)
    add("--batch", type=int, help="examples per step and chunk instead of the table's")
    add("--growth", action="store_true", help="batch, width and K instead of engines")
    add("--share", action="store_true", help="of the machine's matrix rate, by an ordinary step")
    add("--rounds", type=int, default=2, help="turns of all the engines; the fastest counts")
    add("--seconds", type=float, default=5.0, help="least time per engine and turn")
    add("--one", type=json.loads, help=argparse.SUPPRESS)   # what a child process measures
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(device=device, seconds=args.seconds, **args.one)))
        return
    hardware = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {hardware}\n")
    if args.growth:
        growth(device, args.seconds)
    elif args.share:
        share(args.models, device, args.seconds)
    else:
        has_opacus = importlib.util.find_spec("opacus")
        engines = [e for e in args.engines if has_opacus or not e.startswith("opacus")]
        compare(args.models, engines, args.rounds, args.batch, device, args.seconds)


if __name__ == "__main__":
    main()
