"""What a run depends on: the flags of train.py with their presets, and what all the programs' command lines share."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
from accountant import ACCOUNTANTS
from ldm import check_sampling


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything that a run depends on. Each field is a flag of the same name; presets set some of them."""
    stage: str = option("private", "public or private")
    preset: str = option("glyphs", "the pair of public and private data: glyphs or mnist")
    data_dir: str = option("data", "folder of the files of named data sets (mnist)")
    public_data: str = option("letters", "public images: letters, digits, mnist, or a folder or zip of class folders")
    private_data: str = option("digits", "private images, chosen likewise")
    out: str = option("", "folder for checkpoints and pictures (default runs/<preset>)")
    public_checkpoint: str = option("", "public model that the private stage starts from (default OUT/public.pt)")
    overwrite: bool = option(False, "replace checkpoints of an earlier run")
    resume: bool = option(False, "go on with an interrupted private run, if there is one")
    save_every: int = option(20, "private steps between two checkpoints to resume from")
    seed: int = option(0, "seed of the public stage; private noise and batches never follow a seed")
    device: str = option("auto", "cpu, cuda, ..., or auto")
    # images and autoencoder
    image_size: int = option(32, "images are this high and wide")
    channels: int = option(1, "1 for grey, 3 for colour")
    vae_channels: int = option(8, "width of the autoencoder's first level")
    vae_mult: tuple[int, ...] = option((1, 1, 3, 6), "width multiplier of each level; all but the first halve the size")
    latent_channels: int = option(8, "channels of the latents")
    vae_steps: int = option(6_000, "optimiser steps of the autoencoder")
    vae_batch: int = option(16, "images per autoencoder step")
    vae_lr: float = option(8e-3, "the autoencoder's learning rate")
    kl_weight: float = option(2e-3, "weight of the KL term per latent number")
    # diffusion model
    unet_channels: int = option(64, "width of the U-Net's first level")
    unet_mult: tuple[int, ...] = option((1,), "width multiplier of each level")
    res_blocks: int = option(1, "residual blocks per level")
    attention_resolutions: tuple[int, ...] = option((1,), "downsampling factors with attention")
    num_heads: int = option(4, "attention heads")
    context_dim: int = option(64, "width of the class embedding; 0: unconditional, without classes")
    linear_start: float = option(0.0015, "first beta of the noise schedule")
    linear_end: float = option(0.0195, "last beta of the noise schedule")
    label_dropout: float = option(0.1, "share of examples trained with the null class, for guidance")
    public_steps: int = option(10_000, "optimiser steps of the public diffusion model")
    public_batch: int = option(128, "examples per public step")
    public_lr: float = option(2e-3, "learning rate of the public diffusion model")
    # private stage
    eps: float = option(1.0, "privacy budget epsilon, of all private steps that the final weights depend on")
    delta: float = option(1e-5, "privacy budget delta")
    accountant: str = option("rdp", "what the noise is calibrated by: rdp, or the tighter pld")
    epochs: float = option(6.0, "expected passes over the private data")
    expected_batch: int = option(1_024, "expected examples per logical step (Poisson sampling)")
    max_grad_norm: float = option(0.1, "clipping norm C of one example's gradient")
    noise_draws: int = option(1, "K: diffusion noise draws averaged in one example's gradient")
    private_lr: float = option(2e-3, "learning rate of the private stage")
    embedder_scale: float = option(30.0, "the embedder is trained in units of 1/this, which multiplies its gradient")
    attention_blocks: str = option("all", "attention modules to fine-tune: all, last:K or from:K")
    engine: str = option("ghost", "how gradients are clipped: ghost (fast), or func (torch.func, for reading)")
    chunk: int = option(128, "examples whose gradients are in memory at a time")
    insecure_noise_seed: int = option(-1, "FOR TESTS: private noise and batches follow this seed: NOT PRIVATE")
    show_private_loss: bool = option(False, "print the training loss: IT IS NOT PRIVATE, never publish it")
    ema_decay: float = option(0.999, "decay of the weights' moving average, per logical step")
    # sampling, for the grid at the end
    sample_steps: int = option(12, "network evaluations")
    order: int = option(2, "1: DDIM, 2: DPM-Solver++ 2M, which needs fewer steps")
    eta: float = option(0.0, "with order 1 up to 1, DDPM's noise: samples are cleaner and less diverse")
    guidance: float = option(1.5, "classifier-free guidance; 1 is none")

    def architecture(self, num_classes: int) -> dict:
        """The arguments of LatentDiffusion (see there)."""
        vae = dict(ch=self.vae_channels, ch_mult=list(self.vae_mult), num_res_blocks=1, attn_resolutions=[],
                   in_channels=self.channels, resolution=self.image_size, z_channels=self.latent_channels,
                   embed_dim=self.latent_channels)
        unet = dict(in_channels=self.latent_channels, out_channels=self.latent_channels,
                    model_channels=self.unet_channels, num_res_blocks=self.res_blocks,
                    attention_resolutions=list(self.attention_resolutions), channel_mult=list(self.unet_mult),
                    num_heads=self.num_heads, context_dim=self.context_dim or None)
        return dict(vae=vae, unet=unet, num_classes=num_classes,
                    linear_start=self.linear_start, linear_end=self.linear_end)

    def load_data(self, source: str) -> data.Dataset:
        """The training images; an unconditional model takes them for one class."""
        dataset = data.load(source, "train", self.data_dir, self.image_size, self.channels)
        return dataset if self.context_dim else data.Dataset(dataset.images, 0 * dataset.labels, ["all"])

    def check(self) -> None:
        """ValueError naming the first flag whose value cannot work."""
        if self.stage not in ("public", "private"):
            raise ValueError(f"unknown stage {self.stage!r}: give public or private")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                may_be_zero = f.name in ("seed", "kl_weight", "label_dropout", "eta", "context_dim")
                if f.type not in (bool, str) and f.name != "insecure_noise_seed" and not (
                        number > 0 or may_be_zero and number == 0):
                    raise ValueError(f"--{f.name.replace('_', '-')} must be positive, not {number}")
        if self.accountant not in ACCOUNTANTS:
            raise ValueError(f"unknown accountant {self.accountant!r}: give one of {', '.join(ACCOUNTANTS)}")
        if self.engine not in ("ghost", "func"):
            raise ValueError(f"unknown engine {self.engine!r}: give ghost or func")
        if not self.label_dropout < 1:
            raise ValueError(f"--label-dropout must be below 1, not {self.label_dropout:g}")
        if self.stage == "private" and self.public_data == self.private_data:
            raise ValueError(f"--public-data and --private-data are both {self.private_data}; they must differ")
        if self.channels not in (1, 3):
            raise ValueError(f"--channels must be 1 (grey) or 3 (colour), not {self.channels}")
        if not re.fullmatch(r"all|(last|from):[0-9]+", self.attention_blocks):
            raise ValueError(f"--attention-blocks must be all, last:K or from:K, not {self.attention_blocks!r}")
        smallest = 2 ** (len(self.vae_mult) + len(self.unet_mult) - 2)
        if self.image_size % smallest:
            raise ValueError(f"--image-size must be a multiple of {smallest}: autoencoder and U-Net halve it that far")
        if self.unet_channels % 2 or any(self.unet_channels * mult % self.num_heads for mult in self.unet_mult):
            raise ValueError("--unet-channels must be even, and times each of --unet-mult a multiple of --num-heads")
        check_sampling(self.sample_steps, self.eta, self.order)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.preset}")

    @property
    def torch_device(self) -> torch.device:
        return find_device(self.device)


PRESETS = {
    # Six latent channels, where the default has eight: fewer are learnt sooner, and a demo has minutes only.
    "glyphs": dict(vae_steps=3_000, latent_channels=6, unet_channels=48, public_steps=1_400, public_lr=4e-3,
                   expected_batch=256, epochs=6.0, private_lr=4e-3),
    "mnist": dict(private_data="mnist", data_dir="data/mnist", expected_batch=2_048, epochs=12.0),
}


# ---- command lines ---------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ValueErrors, for `one_line_errors`."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the options)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the program with one line on stderr and exit code 2, Ctrl-C with one and 130.

    Of several processes (torchrun), which fail alike, the first one says it.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        yield
    except KeyboardInterrupt as stop:
        if first:
            print(f"\n{stop}" if stop.args else "\nstopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: out of device memory: lower --chunk (train.py), --public-batch or --columns", file=sys.stderr)
        sys.exit(2)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def parse_args(argv: list[str] | None, description: str) -> Config:
    """Flags -> Config: the defaults, then the preset's values, then what the command line says."""
    parser = Parser(description)
    for f in dataclasses.fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default {f.default})"
        if f.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, type=int, nargs="+", help=text)
        else:
            parser.add_argument(flag, type=f.type, help=text)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = given.get("preset", Config.preset)
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: give one of {', '.join(PRESETS)}")
    config = Config(**{**PRESETS[preset], **given})
    config.check()
    return config
