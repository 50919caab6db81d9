"""What a private step costs: speed and memory of the clipped gradient sum, by every engine and by Opacus.

    python benchmarks/dp_step.py                                  # the small models: minutes
    python benchmarks/dp_step.py --models celeba64 celebahq256    # the large ones, in chunks
    python benchmarks/dp_step.py --growth                         # the ghost engine as the work grows
    python benchmarks/dp_step.py --share                          # of the rate at which large matrices are multiplied

Each engine runs in a process of its own, one after the other, with the same model, batch and threads, in --rounds
turns of which the fastest counts: a machine's speed drifts, and other work can only slow it down. On CUDA, which takes
seconds to start, all run in one process, with larger batches. "ordinary" is a step without privacy: one backward pass
to the same parameters. Memory is the peak above that of the loaded model. An engine's name may end in bf16 (the U-Net
in bfloat16), tf32 (its matrix products in TF32; convolutions are by torch's default, on CUDA), compile (the U-Net by
torch.compile, which takes up to minutes) or graphs (the same with CUDA graphs).
The Opacus rows need `pip install opacus`. The models are those of the presets, all of their attention trained.
"""

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from config import PRESETS, Config  # noqa: E402
from dp_sgd import clipped_gradient_sum, peak_memory  # noqa: E402
from ldm import ClassEmbedder, make_alphas_cumprod, q_sample  # noqa: E402
from unet import UNet, private_parameter_names  # noqa: E402

# preset: examples per step and per chunk
MODELS = {"mnist": (256, 256), "mnist-paper": (256, 256), "cifar10": (16, 16), "celeba64": (8, 8),
          "celebahq256": (2, 1)}
CUDA_MODELS = {"mnist": (8192, 8192), "mnist-paper": (4096, 4096), "cifar10": (128, 128), "celeba64": (64, 64),
               "celebahq256": (16, 16)}
ENGINES = ["ordinary", "func", "ghost", "opacus-hooks", "opacus-ghost", "ordinary-bf16", "ghost-bf16"]
CUDA_ENGINES = [*ENGINES, "ordinary-tf32", "ghost-tf32"]
OTHERS = ["ordinary-compile", "ghost-compile", "ordinary-graphs"]   # if asked for
WAYS = ("bf16", "tf32", "compile", "graphs")


def setting(name: str, device: str) -> tuple[dict, int, int, int]:
    """(arguments of UNet, size of the latents, examples per step, examples per chunk) of a preset."""
    config = Config(**PRESETS[name])
    sizes = (CUDA_MODELS if device == "cuda" else MODELS)[name]
    return config.architecture(10)["unet"], config.image_size // 2 ** (len(config.vae_mult) - 1), *sizes


class Model(nn.Module):
    """U-Net, embedder and loss, called as ldm.LatentDiffusion is."""

    def __init__(self, unet: dict):
        super().__init__()
        self.unet = UNet(**unet)
        if unet.get("context_dim"):
            self.embedder = ClassEmbedder(10, unet["context_dim"])
        self.register_buffer("alphas_cumprod", make_alphas_cumprod(0.0015, 0.0195).float())

    bf16 = False

    def forward(self, z_0, t, eps, condition):
        context = self.embedder(condition) if hasattr(self, "embedder") else None
        with torch.autocast(z_0.device.type, torch.bfloat16, enabled=self.bf16):
            eps_hat = self.unet(q_sample(self.alphas_cumprod, z_0, t, eps), t, context)
        return (eps_hat.float() - eps).square().flatten(1).mean(dim=1)


def make_step(engine: str, model: Model, names: list[str], batch: tuple, chunk: int):
    """A function without arguments that computes the (clipped) gradient sum of `batch`, tensors [B, 1, ...]."""
    def chunks():
        return zip(*(x.flatten(0, 1).split(chunk) for x in batch))

    model.requires_grad_(False)
    if engine in ("func", "ghost"):
        parameters = {name: model.get_parameter(name) for name in names}

        def loss(parameters, *draws):
            return functional_call(model, parameters, draws).mean()
        return partial(clipped_gradient_sum, loss if engine == "func" else model, parameters, batch, 1.0, chunk)

    for name in names:
        model.get_parameter(name).requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    if engine == "ordinary":
        def step():
            for part in chunks():
                model(*part).sum().backward()
        return step

    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    settings = dict(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=len(batch[0]))
    if engine == "opacus-hooks":
        wrapped = GradSampleModule(model, loss_reduction="sum")
        optimizer = DPOptimizer(torch.optim.SGD(trained, lr=0.0), **settings)

        def step():
            for part in chunks():
                wrapped(*part).sum().backward()
                optimizer.clip_and_accumulate()
                for p in trained:
                    p.grad_sample = None
        return step
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0)
    optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(trained, lr=0.0), **settings)

    def step():
        for part in chunks():
            wrapped.enable_hooks()
            DPTensorFastGradientClipping(wrapped, optimizer, wrapped(*part), "sum").backward()
            optimizer.accumulate()
    return step


def measure(engine: str, name: str, device: str, seconds: float, batch: int | None = None, chunk: int | None = None,
            width: int | None = None, K: int = 1, count: bool = False) -> dict:
    """{rate: examples/s, bytes}: the fastest step of at least three within `seconds`, after a warm-up.

    batch, chunk and width are the preset's unless given. With `count` also {flops: floating-point operations of matrix
    products and convolutions per example, peak: per second, in a product of two 2048 x 2048 matrices}.
    """
    arguments, size, *sizes = setting(name, device)
    arguments = {**arguments, "model_channels": width or arguments["model_channels"]}
    B, chunk = batch or sizes[0], chunk or sizes[1]
    engine, _, way = engine.rpartition("-") if engine.endswith(WAYS) else (engine, "", "")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if way == "tf32" else "highest")
    with torch.device(device):   # large models take seconds to fill with random numbers on a CPU
        model = Model(arguments).to(device)
    model.bf16 = way == "bf16"
    if way in ("compile", "graphs"):
        torch.compiler.reset()
        model.unet.compile(mode="reduce-overhead" if way == "graphs" else None)
    names = private_parameter_names(model)
    shape = (B, K, arguments["in_channels"], size, size)
    batch = (torch.randn(shape, device=device), torch.randint(1000, (B, K), device=device),
             torch.randn(shape, device=device), torch.randint(10, (B, K), device=device))
    step = make_step(engine, model, names, batch, chunk)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def timed() -> float:
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    before, times = peak_memory(batch[0].device), []
    for _ in range(3 if way in ("compile", "graphs") else 1):   # some are compiled, or recorded, in the second step
        timed()
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        times.append(timed())
    result = dict(rate=B / min(times), bytes=peak_memory(batch[0].device) - before)
    if not count:
        return result
    with FlopCounterMode(display=False) as counter:
        step()
    a, times = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if model.bf16 else torch.float32), []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()   # waits for the device
        times.append(time.perf_counter() - begin)
    return dict(result, flops=counter.get_total_flops() / B, peak=2 * 2048**3 / min(times))


def measured(device: str, seconds: float, **what) -> dict | None:
    """What `measure` returns, in a process of its own unless on CUDA; None, with last words on stderr, if it fails."""
    if device == "cuda":
        try:
            return measure(device=device, seconds=seconds, **what)
        except Exception as error:   # of memory, or in Opacus
            print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        finally:   # models with hooks hold on to themselves
            gc.collect()
            torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--one", json.dumps(what), "--seconds", str(seconds)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    print(f"{what}: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)


def compare(models: list[str], engines: list[str], rounds: int, batch: int | None, device: str, seconds: float) -> None:
    """Print the table of all engines on these models; "-" where an engine fails."""
    others = [engine for engine in engines if engine != "ordinary"]
    print(f"| U-Net, latents, batch | ordinary step | {' | '.join(others)} |\n|---|---|{'---|' * len(others)}")
    for name in models:
        arguments, size, *sizes = setting(name, device)
        B, chunk = (batch, batch) if batch else sizes
        found = {}
        for engine in ["ordinary", *others] * rounds:
            if result := measured(device, seconds, engine=engine, name=name, batch=batch, chunk=batch):
                found.setdefault(engine, []).append(result)
        if "ordinary" not in found:   # what the others are compared with
            print(f"| {name}, {size}x{size}x{arguments['in_channels']}, {B} by {chunk} | - |{' - |' * len(others)}")
            continue
        rates = {engine: max(r["rate"] for r in runs) for engine, runs in found.items()}
        peaks = {engine: max(r["bytes"] for r in runs) for engine, runs in found.items()}
        ordinary = float(f"{rates['ordinary']:.3g}")   # 1,000 rather than 1e+03
        cells = [f"{rates['ordinary'] / rates[engine]:.2f} ({peaks[engine] / peaks['ordinary']:.2f})"
                 if engine in found else "-" for engine in others]
        print(f"| {name}, {size}x{size}x{arguments['in_channels']}, {B} by {chunk} | {ordinary:,g}/s, "
              f"{peaks['ordinary'] / 1e9:.2f} GB | {' | '.join(cells)} |", flush=True)


def growth(device: str, seconds: float) -> None:
    """Print what an example costs, by the ghost engine on the mnist preset's U-Net, as the work grows."""
    print("| batch | width | K | ms per example | peak memory |\n|---|---|---|---|---|")
    ways = ([dict(batch=B) for B in (64, 256, 1024, 8192)] + [dict(batch=256, width=w) for w in (32, 128, 256)]
            + [dict(batch=256, K=K) for K in (2, 4, 8)])
    for way in ways:
        if result := measured(device, seconds, engine="ghost", name="mnist", **way):
            print(f"| {way['batch']} | {way.get('width', 64)} | {way.get('K', 1)} | "
                  f"{1e3 / result['rate']:.2f} | {result['bytes'] / 1e9:.2f} GB |", flush=True)


def share(models: list[str], device: str, seconds: float) -> None:
    """Print what share of the machine's matrix rate the ordinary step reaches."""
    print("| U-Net | float32: GFLOP/s | of the matrix rate | bfloat16: GFLOP/s | of the matrix rate |\n"
          "|---|---|---|---|---|")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mnist", "mnist-paper", "cifar10"])
    parser.add_argument("--engines", nargs="+", choices=[*CUDA_ENGINES, *OTHERS], default=engines)
    parser.add_argument("--batch", type=int, help="examples per step and chunk instead of the table's")
    parser.add_argument("--growth", action="store_true", help="batch, width and K instead of engines")
    parser.add_argument("--share", action="store_true", help="of the matrix rate, of the ordinary step")
    parser.add_argument("--rounds", type=int, default=2, help="turns of all the engines; the fastest counts")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time per engine and turn")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)   # what a child process measures
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(device=device, seconds=args.seconds, **args.one)))
        return
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {hardware}\n")
    if args.growth:
        growth(device, args.seconds)
    elif args.share:
        share(args.models, device, args.seconds)
    else:
        engines = [e for e in args.engines if not e.startswith("opacus") or importlib.util.find_spec("opacus")]
        compare(args.models, engines, args.rounds, args.batch, device, args.seconds)


if __name__ == "__main__":
    main()
