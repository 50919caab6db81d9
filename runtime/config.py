"""Every setting of a run, in tables; flags are short names for those that are changed often.

    defaults below  <  presets/NAME.toml  <  --set table.key=value and flags

Two groups of tables: MODEL_TABLES define mechanism and model, which a resumed run must keep; the
others only cost time or choose a place, and a resumed run may change them.
"""

import argparse
import dataclasses
import math
import os
import re
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from ldm import ddim_timesteps
from runtime import presets
from runtime.cli import Parser, find_device
from variants.text import check_prompts

# ---- the tables --------------------------------------------------------------------------------

@dataclass
class Data:
    public: str = "letters"          # public images: a name or a path, see datasets
    private: str = "digits"          # private images, chosen likewise
    image_size: int = 32             # images are this high and wide
    channels: int = 1                # 1 for grey, 3 for colour
    num_classes: int = 10            # for --summary; training takes them from the data


@dataclass
class Vae:
    """AutoencoderKL's arguments in the official names; the rest follows from [data]."""
    ch: int = 8                      # width of the first level
    ch_mult: tuple[int, ...] = (1, 1, 3, 6)   # width of each level in units of ch
    num_res_blocks: int = 1          # residual blocks per level
    attn_resolutions: tuple[int, ...] = ()    # sizes of feature maps with attention
    z_channels: int = 8              # channels of the latents
    n_embed: int = 0                 # codes of a VQ autoencoder with pretrained weights; 0: KL


@dataclass
class Unet:
    """UNet's arguments in the official names; channels in and out follow from [vae]."""
    model_channels: int = 64         # width of the first level
    channel_mult: tuple[int, ...] = (1,)      # width of each level in units of model_channels
    num_res_blocks: int = 1          # residual blocks per level
    attention_resolutions: tuple[int, ...] = (1,)   # downsampling factors with attention
    num_heads: int = 4               # attention heads
    num_head_channels: int = 0       # width of each head, instead of their number; 0: num_heads
    use_scale_shift_norm: bool = False   # the time embedding scales and shifts, instead of adds
    resblock_updown: bool = False    # residual blocks change the size, instead of convolutions
    context_dim: int = 64            # width of a class's or caption's embedding; 0: unconditional


@dataclass
class Text:
    length: int = 0                  # 0: classes; else captions of so many bytes of UTF-8
    layers: int = 2                  # of the transformer; 0: LDM's BERT, for --summary only


@dataclass
class Schedule:
    linear_start: float = 0.0015     # first beta
    linear_end: float = 0.0195       # last beta


@dataclass
class Autoencoder:
    """How the public stage trains the autoencoder."""
    steps: int = 6_000
    batch: int = 16
    crop: int = 0                    # train on random squares of this size; 0: on whole images
    lr: float = 8e-3
    kl_weight: float = 2e-3          # weight of the KL term per latent number


@dataclass
class Public:
    """How the public stage trains U-Net and embedder."""
    steps: int = 10_000
    batch: int = 128
    lr: float = 2e-3
    seed: int = 0                    # of the public stage; private noise never follows a seed


@dataclass
class Diffusion:
    """Both stages."""
    label_dropout: float = 0.1       # share of examples with the null class, for guidance
    ema_decay: float = 0.999         # of the weights' moving average, per logical step


@dataclass
class Private:
    epsilon: float = 1.0             # budget of all private steps behind the final weights
    delta: float = 1e-5
    accountant: str = "rdp"          # calibrates the noise: rdp, or the tighter pld
    epochs: float = 6.0              # expected passes over the private data
    expected_batch: int = 1_024      # expected examples per logical step
    max_grad_norm: float = 0.1       # clipping norm C of one example's gradient
    noise_multiplicity: int = 1      # K: draws of t and eps averaged in one example's gradient
    timesteps: tuple[int, ...] = (0, 1_000)   # [low, high): nine of ten time steps are from here
    lr: float = 2e-3
    embedder_scale: float = 30.0     # multiplies the embedder's gradient
    trainable: str = "attention"     # attention, last:K, from:K, lora, resblocks or all
    lora_rank: int = 8
    insecure_noise_seed: int = -1    # FOR TESTS: noise and batches follow this seed: NOT PRIVATE


@dataclass
class Run:
    data_dir: str = "data"           # folder of the named data sets' folders
    out: str = ""                    # folder of checkpoints and pictures; "": runs/PRESET
    public_checkpoint: str = ""      # public model to start from; "": OUT/public.pt
    pretrained: str = ""             # official CompVis checkpoint, which is the public model then
    whole: bool = False              # private checkpoints hold the public weights too
    half: bool = False               # finished checkpoints hold numbers of 16 bits
    overwrite: bool = False
    resume: bool = False
    device: str = "auto"             # cpu, cuda, ..., or auto
    clipping: str = "ghost"          # ghost (fast), or vmap (torch.func, for reading)
    physical_batch: str = "256"      # examples in memory at a time, or auto: as many as fit
    bf16: bool = False               # the networks compute in bfloat16
    save_every: int = 20             # private steps between two checkpoints to resume from
    show_private_loss: bool = False  # IT IS NOT PRIVATE


@dataclass
class Samples:
    """The grid of samples at the end of a stage."""
    steps: int = 12                  # network evaluations
    solver: str = "dpm"              # ddim, or dpm: DPM-Solver++ 2M
    eta: float = 0.0                 # with ddim up to 1: DDPM's noise
    guidance: float = 1.5            # classifier-free guidance; 1 is none
    prompts: tuple[str, ...] = ()    # captions of the grid


MODEL_TABLES = ("data", "vae", "unet", "text", "schedule", "autoencoder", "public", "diffusion",
                "private")


@dataclass
class Config:
    stage: str = "private"
    preset: str = "glyphs"
    summary: bool = False
    data: Data = field(default_factory=Data)
    vae: Vae = field(default_factory=Vae)
    unet: Unet = field(default_factory=Unet)
    text: Text = field(default_factory=Text)
    schedule: Schedule = field(default_factory=Schedule)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    public: Public = field(default_factory=Public)
    diffusion: Diffusion = field(default_factory=Diffusion)
    private: Private = field(default_factory=Private)
    run: Run = field(default_factory=Run)
    samples: Samples = field(default_factory=Samples)

    @classmethod
    def from_preset(cls, name: str) -> "Config":
        """The settings of presets/NAME.toml. ValueError for an unknown or wrong preset."""
        config = cls(preset=name)
        presets.apply(config, presets.read_preset(name), f"preset {name}")
        return config

    @property
    def folder(self) -> Path:
        return Path(self.run.out or f"runs/{self.preset}")

    @property
    def device(self) -> torch.device:
        return find_device(self.run.device)

    @property
    def has_captions(self) -> bool:
        return self.text.length > 0 and self.unet.context_dim > 0

    @property
    def context_tokens(self) -> int:
        return self.text.length if self.has_captions else 1

    def architecture(self, num_classes: int) -> dict:
        """What checkpoints.build_model takes. Widths that follow from others are derived."""
        vae, unet = dataclasses.asdict(self.vae), dataclasses.asdict(self.unet)
        z = vae["z_channels"]
        vae |= dict(in_channels=self.data.channels, resolution=self.data.image_size, embed_dim=z)
        if not vae["n_embed"]:
            del vae["n_embed"]   # AutoencoderKL has no codes
        unet |= dict(in_channels=z, out_channels=z, context_dim=unet["context_dim"] or None,
                     num_head_channels=unet["num_head_channels"] or None)
        parts = dict(vae=vae, unet=unet, num_classes=num_classes,
                     **dataclasses.asdict(self.schedule))
        if self.has_captions and self.text.layers:
            parts["text"] = dataclasses.asdict(self.text)
        return parts

    def changed(self, planned: dict) -> tuple[str, object, object] | None:
        """The first setting of MODEL_TABLES that differs from `planned`: (name, there, here).

        planned: dataclasses.asdict of another Config. One path may be spelled in two ways.
        """
        for table in MODEL_TABLES:
            for key, value in vars(getattr(self, table)).items():
                there = planned[table].get(key)
                if there != value and not (table == "data" and is_one_path(there, value)):
                    return flag_of(table, key), there, value
        return None


def is_one_path(one: object, other: object) -> bool:
    """Whether two values are paths to one file or folder that exists."""
    try:
        return os.path.samefile(one, other)
    except (OSError, TypeError, ValueError):
        return False


# ---- flags -------------------------------------------------------------------------------------

# group: {flag: (table.key, help)}
FLAGS = {
    "data and place": {
        "public-data": ("data.public", "public images: a name (data.py lists them) or a path"),
        "private-data": ("data.private", "private images, chosen likewise"),
        "data-dir": ("run.data_dir", "folder of the named data sets' folders"),
        "out": ("run.out", "folder of checkpoints and pictures (default runs/PRESET)"),
        "public-checkpoint": ("run.public_checkpoint", "public model (default OUT/public.pt)"),
        "pretrained": ("run.pretrained", "official CompVis checkpoint, as the public model"),
        "whole": ("run.whole", "the private checkpoint holds the public weights too"),
        "overwrite": ("run.overwrite", "replace checkpoints of an earlier run"),
        "resume": ("run.resume", "go on with an interrupted private run, if there is one"),
    },
    "privacy": {
        "eps": ("private.epsilon", "budget epsilon of all private steps behind the weights"),
        "delta": ("private.delta", "budget delta"),
        "accountant": ("private.accountant", "calibrates the noise: rdp, or the tighter pld"),
        "epochs": ("private.epochs", "expected passes over the private data"),
        "expected-batch": ("private.expected_batch", "expected examples per logical step"),
        "max-grad-norm": ("private.max_grad_norm", "clipping norm C of one example's gradient"),
        "insecure-noise-seed": ("private.insecure_noise_seed", "FOR TESTS: NOT PRIVATE"),
        "show-private-loss": ("run.show_private_loss", "print the loss: IT IS NOT PRIVATE"),
    },
    "training": {
        "trainable": ("private.trainable", "attention, last:K, from:K, lora, resblocks, all"),
        "noise-multiplicity": ("private.noise_multiplicity", "K draws of t and eps per example"),
        "private-lr": ("private.lr", "learning rate of the private stage"),
        "label-dropout": ("diffusion.label_dropout", "share trained with the null class"),
        "public-steps": ("public.steps", "optimiser steps of the public diffusion model"),
        "seed": ("public.seed", "of the public stage; private noise never follows a seed"),
    },
    "cost": {
        "device": ("run.device", "cpu, cuda, ..., or auto"),
        "clipping": ("run.clipping", "ghost (fast), or vmap (torch.func, for reading)"),
        "physical-batch": ("run.physical_batch", "examples in memory at a time, or auto"),
        "bf16": ("run.bf16", "the networks compute in bfloat16"),
        "save-every": ("run.save_every", "private steps between two checkpoints"),
    },
    "samples": {
        "prompts": ("samples.prompts", "captions of the grid at the end"),
        "guidance": ("samples.guidance", "classifier-free guidance of the grid; 1 is none"),
    },
}
PLACES = {place: flag for flags in FLAGS.values() for flag, (place, _) in flags.items()}


def flag_of(table: str, key: str) -> str:
    """How the user writes a setting: its flag, or table.key for --set."""
    place = f"{table}.{key}"
    return f"--{PLACES[place]}" if place in PLACES else place


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(description)
    parser.usage = "train.py [--stage public|private] [--preset NAME] [--set TABLE.KEY=VALUE] ..."
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(
        prog, max_help_position=30, width=100)
    parser.add_argument("--stage", default="private", help="public or private (default private)")
    parser.add_argument("--preset", default="glyphs", metavar="NAME",
                        help=f"{', '.join(presets.preset_names())} (default glyphs)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE",
                        help="any setting of presets/NAME.toml, such as unet.model_channels=128")
    parser.add_argument("--summary", action="store_true",
                        help="print parameters and memory of a private step, and stop")
    for group, flags in FLAGS.items():
        arguments = parser.add_argument_group(group)
        for flag, (place, text) in flags.items():
            add_flag(arguments, flag, place, text)
    return parser


def add_flag(arguments: argparse._ArgumentGroup, flag: str, place: str, text: str) -> None:
    table, key = place.split(".")
    settings = getattr(Config(), table)
    kind = {f.name: f.type for f in fields(settings)}[key]
    if kind is bool:
        how = dict(action="store_const", const=True)
    elif typing.get_origin(kind) is tuple:
        how = dict(nargs="+", type=typing.get_args(kind)[0], metavar="TEXT")
    else:
        how = dict(type=kind, metavar={str: "TEXT", int: "N", float: "X"}[kind])
    arguments.add_argument(f"--{flag}", dest=place, help=text, **how)


def parse_args(argv: list[str] | None, description: str) -> Config:
    """The settings that a command line asks for. ValueError in one line for bad ones."""
    args = vars(make_parser(description).parse_args(argv))
    config = Config.from_preset(args["preset"])
    config.stage, config.summary = args["stage"], args["summary"]
    for text in args["set"]:
        presets.apply(config, presets.read_assignment(text), "--set")
    for place, value in args.items():
        if "." in place and value is not None:
            table, key = place.split(".")
            presets.apply(config, {table: {key: value}}, f"--{PLACES[place]}")
    check(config)
    return config


# ---- checks ------------------------------------------------------------------------------------

MAY_BE_ZERO = {"public.seed", "autoencoder.kl_weight", "autoencoder.crop", "vae.n_embed",
               "diffusion.label_dropout", "unet.num_head_channels", "unet.context_dim",
               "text.length", "text.layers", "private.timesteps", "samples.eta"}
CHOICES = {"private.accountant": ("rdp", "pld"), "run.clipping": ("ghost", "vmap"),
           "samples.solver": ("ddim", "dpm"), "data.channels": (1, 3)}


def check(config: Config) -> None:
    """ValueError naming the first setting whose value cannot work."""
    if config.stage not in ("public", "private"):
        raise ValueError(f"unknown --stage {config.stage!r}: give public or private")
    for table in fields(config)[3:]:   # behind stage, preset and summary
        for key, value in vars(getattr(config, table.name)).items():
            check_value(table.name, key, value)
    check_sizes(config)
    check_private(config)
    check_samples(config)
    if config.run.pretrained and config.run.public_checkpoint:
        raise ValueError("--pretrained and --public-checkpoint both give a public model: "
                         "leave one out")


def check_value(table: str, key: str, value: object) -> None:
    """ValueError for a number that is not positive and finite, and for an unknown choice."""
    place, name = f"{table}.{key}", flag_of(table, key)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool | str) or key == "insecure_noise_seed":
            continue
        if not (0 < number < math.inf or number == 0 and place in MAY_BE_ZERO):
            raise ValueError(f"{name} must be positive and finite, not {number}")
    if key == "lr" and value > 1:   # clipping and noise hide from the loss that the run diverges
        raise ValueError(f"{name} must be at most 1, not {value:g}")
    if place in CHOICES and value not in CHOICES[place]:
        raise ValueError(f"{name} must be one of {', '.join(map(str, CHOICES[place]))}, not "
                         f"{value!r}")


def check_sizes(config: Config) -> None:
    """ValueError for widths and sizes that the networks cannot have."""
    vae, unet, size = config.vae, config.unet, config.data.image_size
    halvings = 2 ** (len(vae.ch_mult) - 1)
    smallest = halvings * 2 ** (len(unet.channel_mult) - 1)
    if size % smallest:
        raise ValueError(f"data.image_size must be a multiple of {smallest}: autoencoder and U-Net "
                         "halve it that far")
    if config.autoencoder.crop > size or config.autoencoder.crop % halvings:
        raise ValueError(f"autoencoder.crop must be a multiple of {halvings}, as the autoencoder "
                         f"halves it that far, and at most data.image_size, not "
                         f"{config.autoencoder.crop}")
    heads = unet.num_head_channels or unet.num_heads
    if unet.model_channels % 2 or any(unet.model_channels * m % heads for m in unet.channel_mult):
        raise ValueError("unet.model_channels must be even, and times each of unet.channel_mult a "
                         "multiple of unet.num_heads (or unet.num_head_channels)")
    widest = unet.model_channels * max(unet.channel_mult)
    if config.private.trainable.startswith("lora") and config.private.lora_rank > widest:
        raise ValueError(f"private.lora_rank must be at most {widest}, the width of the widest "
                         f"layer, not {config.private.lora_rank}")


def check_private(config: Config) -> None:
    """ValueError for settings that make no private stage."""
    private, run = config.private, config.run
    if config.stage == "private" and run.device.startswith("mps"):
        raise ValueError(f"--device {run.device} has no float64, which private sums need: give cpu")
    if run.bf16 and run.clipping == "vmap":
        raise ValueError("--bf16 needs --clipping ghost: torch.func does not take it")
    if not re.fullmatch(r"auto|[1-9][0-9]*", run.physical_batch):
        raise ValueError("--physical-batch must be a positive number or auto, not "
                         f"{run.physical_batch!r}")
    if len(private.timesteps) != 2 or not private.timesteps[0] < private.timesteps[1] <= 1_000:
        raise ValueError("private.timesteps must be two numbers, low < high, from 0 to 1000, not "
                         f"{list(private.timesteps)}")
    if not config.diffusion.label_dropout < 1:
        raise ValueError("--label-dropout must be below 1, not "
                         f"{config.diffusion.label_dropout:g}")
    if not re.fullmatch(r"all|resblocks|attention|lora|(lora:)?(last|from):[0-9]+",
                        private.trainable):
        raise ValueError("--trainable must be attention, last:K, from:K, lora, lora:last:K, "
                         f"lora:from:K, resblocks or all, not {private.trainable!r}")


def check_samples(config: Config) -> None:
    """ValueError for a grid of samples that cannot be drawn."""
    samples = config.samples
    check_sampling(samples.steps, samples.solver, samples.eta, samples.guidance)
    if config.has_captions and not config.text.layers and not config.summary:
        raise ValueError("captions in LDM's BERT (text.layers 0) cannot be trained on: give "
                         "--summary to see the model, or text.layers for an encoder trained here")
    if config.has_captions:
        check_prompts(samples.prompts, config.text.length)


def check_sampling(steps: int, solver: str, eta: float, guidance: float) -> None:
    """ValueError for what the solvers cannot do."""
    ddim_timesteps(steps)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta:g}")
    if solver == "dpm" and eta > 0:
        raise ValueError(f"the solver dpm is deterministic: take eta 0, not {eta:g}, or ddim")
    if not math.isfinite(guidance):
        raise ValueError(f"--guidance must be finite, not {guidance:g}")
