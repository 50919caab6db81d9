"""The tiny model, its data and its command line, which tests of all floors share."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from dp_sgd import PrivacyPlan
from ldm import LatentDiffusion
from runtime import presets
from runtime.checkpoints import build_model
from runtime.cli import one_line_errors
from runtime.config import Config

NUM_CLASSES = 3
MODEL = ["data.image_size=8", "vae.ch_mult=[1, 2]", "vae.z_channels=4", "unet.model_channels=16",
         "unet.channel_mult=[1, 2]", "unet.attention_resolutions=[2]", "unet.num_heads=2",
         "unet.context_dim=8", "private.embedder_scale=7.0", "run.device=cpu", "samples.steps=1",
         "run.physical_batch=3"]
STAGES = ["autoencoder.steps=2", "autoencoder.batch=4", "public.steps=2", "public.batch=4",
          "private.epochs=4", "private.expected_batch=8", "private.epsilon=3", "run.save_every=2"]
FLAGS = [word for text in MODEL + STAGES for word in ("--set", text)]   # a tiny run of train.py

# What private_parameter_names should find in that model, written out by hand.
ATTENTION = ["unet.input_blocks.3.1", "unet.middle_block.1", "unet.output_blocks.0.1",
             "unet.output_blocks.1.1"]
TRANSFORMER = {"norm.weight", "norm.bias", "proj_in.weight", "proj_in.bias", "proj_out.weight",
               "proj_out.bias"} | {"transformer_blocks.0." + name for name in (
                   "norm1.weight", "norm1.bias", "attn1.to_q.weight", "attn1.to_k.weight",
                   "attn1.to_v.weight", "attn1.to_out.0.weight", "attn1.to_out.0.bias",
                   "attn2.to_v.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias",
                   "norm3.weight", "norm3.bias", "ff.net.0.proj.weight", "ff.net.0.proj.bias",
                   "ff.net.2.weight", "ff.net.2.bias")}
WITHOUT_EFFECT = {"transformer_blocks.0." + name for name in (
    "attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")}
EMBEDDER = {"embedder.embedding.weight"}
SCALE = {"embedder.scale"}   # no parameter: the unit that the embedder is trained in


def parameters_of(modules: list[str], names: set[str]) -> set[str]:
    return {f"{module}.{name}" for module in modules for name in names}


def configure(*assignments: str) -> Config:
    """The settings of the tiny model, then "table.key=value" assignments."""
    config = Config()
    for text in (*MODEL, *assignments):
        presets.apply(config, presets.read_assignment(text), "test")
    return config


def tiny_model(*assignments: str, randomise: bool = True) -> LatentDiffusion:
    """In float64. All parameters are random: output layers of zeros would hide other gradients."""
    torch.manual_seed(0)
    model = build_model(configure(*assignments).architecture(NUM_CLASSES))
    if randomise:
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    return model.double()


def tiny_data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [count, 4, 4, 4] in float64, and labels int [count]."""
    g = torch.Generator().manual_seed(1)
    z_0 = torch.randn(count, 4, 4, 4, dtype=torch.float64, generator=g)
    return z_0, torch.arange(count) % NUM_CLASSES


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def write_images(folder: Path, per_class: list[int], seed: int) -> Path:
    """Random grey 8x8 images in the class folders a, b, ... of `folder`."""
    rng = np.random.default_rng(seed)
    for name, count in zip("abcdefghij", per_class):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def arguments(public: Path, out: Path, *more: object) -> list[str]:
    """A private run of 12 steps on the images and the model in the folder `public`."""
    return ["--public-checkpoint", str(public / "public.pt"),
            "--public-data", str(public / "public-images"),
            "--private-data", str(public / "private-images"), "--out", str(out), *FLAGS,
            *map(str, more)]


def refuse(capsys: pytest.CaptureFixture, main: object, argv: list) -> str:
    """Run a program's main, which must exit with code 2 and one line; that line."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        main([str(a) for a in argv])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def included_by(plan: PrivacyPlan, batches: list) -> np.ndarray:
    """bool [steps, N] from the indices in every batch."""
    included = np.zeros((len(batches), plan.num_examples), dtype=bool)
    for row, chosen in zip(included, batches):
        row[np.asarray(chosen, dtype=np.int64)] = True   # of this type even where empty
        assert row.sum() == len(chosen)   # no example twice
    return included


def assert_poisson_sampled(included: np.ndarray, q: float) -> None:
    """included, bool [steps, N]: every entry is true independently with probability q."""
    steps, N = included.shape
    var, centred = q * (1 - q), included - q

    def assert_chi2(value: float, freedom: int) -> None:   # shuffling makes counts too even
        low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], freedom)
        assert low < value < high

    assert abs(centred.mean()) < 6 * (var / included.size) ** 0.5
    assert_chi2((centred.sum(0) ** 2).sum() / (steps * var), N)    # how often each was drawn
    assert_chi2((centred.sum(1) ** 2).sum() / (N * var), steps)    # variance N q (1 - q) of sizes
    for a, b in ((centred[:, 1:], centred[:, :-1]),                # two examples in one batch
                 (centred[:, :1], centred[:, 1:2]),
                 (centred[1:], centred[:-1])):                     # one in successive batches
        assert abs((a * b).sum()) / var < 6 * a.size ** 0.5
