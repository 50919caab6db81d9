"""What a run depends on: the flags of train.py with their presets, and what all the programs' command lines share."""

import argparse
import dataclasses
import math
import re
import signal
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
from accountant import ACCOUNTANTS
from formats import is_first_process
from ldm import LatentDiffusion, check_prompts, check_sampling, tokenise
from unet import PRIVATE_PARTS, private_parameter_names


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything that a run depends on. Each field is a flag of the same name; presets set some of them."""
    stage: str = option("private", "public or private")
    preset: str = option("glyphs", "data and sizes: glyphs, glyphs-text, scenes256, mnist, cifar10-small, or a "
                         "model of the paper (see PRESETS)")
    describe: bool = option(False, "print the model's parameters and the memory of a private step, and stop")
    data_dir: str = option("data", "folder of the named data sets' folders, or of MNIST's files")
    public_data: str = option("letters", "public images: letters, digits, a data set's name, or a path (see data.py)")
    private_data: str = option("digits", "private images, chosen likewise")
    out: str = option("", "folder for checkpoints and pictures (default runs/<preset>)")
    public_checkpoint: str = option("", "public model that the private stage starts from (default OUT/public.pt)")
    init: str = option("", "official CompVis checkpoint of this architecture, which is the public model then")
    overwrite: bool = option(False, "replace checkpoints of an earlier run")
    resume: bool = option(False, "go on with an interrupted private run, if there is one")
    save_every: int = option(20, "private steps between two checkpoints to resume from")
    seed: int = option(0, "seed of the public stage; private noise and batches never follow a seed")
    device: str = option("auto", "cpu, cuda, ..., or auto")
    bf16: bool = option(False, "U-Net and embedder in bfloat16: faster where the machine is made for it; weights, "
                        "norms, sums and noise stay float32")
    # images and autoencoder
    image_size: int = option(32, "images are this high and wide")
    channels: int = option(1, "1 for grey, 3 for colour")
    vae_channels: int = option(8, "width of the autoencoder's first level")
    vae_mult: tuple[int, ...] = option((1, 1, 3, 6), "width multiplier of each level; all but the first halve the size")
    vae_res_blocks: int = option(1, "residual blocks per level of the autoencoder")
    vae_attention: tuple[int, ...] = option((), "sizes of the autoencoder's feature maps that have attention")
    latent_channels: int = option(8, "channels of the latents")
    codebook: int = option(0, "codes of a VQ autoencoder, whose weights --init brings; 0: KL autoencoder")
    vae_steps: int = option(6_000, "optimiser steps of the autoencoder")
    vae_batch: int = option(16, "images per autoencoder step")
    vae_crop: int = option(0, "train the autoencoder on random squares of this size, which costs less per image; 0: on "
                           "whole images")
    vae_lr: float = option(8e-3, "the autoencoder's learning rate")
    kl_weight: float = option(2e-3, "weight of the KL term per latent number")
    # diffusion model
    unet_channels: int = option(64, "width of the U-Net's first level")
    unet_mult: tuple[int, ...] = option((1,), "width multiplier of each level")
    res_blocks: int = option(1, "residual blocks per level")
    attention_resolutions: tuple[int, ...] = option((1,), "downsampling factors with attention")
    num_heads: int = option(4, "attention heads")
    num_head_channels: int = option(0, "width of each head, instead of their number; 0: as many as --num-heads")
    use_scale_shift_norm: bool = option(False, "the time embedding scales and shifts, instead of being added")
    resblock_updown: bool = option(False, "the U-Net changes size in residual blocks, instead of convolutions")
    context_dim: int = option(64, "width of the embedding of a class or caption; 0: unconditional, without either")
    context_tokens: int = option(1, "1: a class; more: a caption, cut off after so many bytes of UTF-8")
    text_layers: int = option(2, "layers of the caption's transformer; 0: LDM's BERT, which only --describe knows")
    num_classes: int = option(10, "private classes that --describe counts with; training takes them from the data")
    linear_start: float = option(0.0015, "first beta of the noise schedule")
    linear_end: float = option(0.0195, "last beta of the noise schedule")
    label_dropout: float = option(0.1, "share of examples trained with the null class or no caption, for guidance")
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
    private_timesteps: tuple[int, ...] = option((0, 1_000), "LOW HIGH: of ten noise draws of the private stage, nine "
                                                "are of time steps LOW to HIGH - 1, one of any")
    private_lr: float = option(2e-3, "learning rate of the private stage")
    embedder_scale: float = option(30.0, "the table of classes or bytes is trained in units of 1/this, which "
                                   "multiplies its gradient")
    train: str = option("attention", "what of the U-Net is fine-tuned: attention, lora (of low rank, in its "
                        "projections), resblocks or all")
    lora_rank: int = option(8, "rank of --train lora")
    attention_blocks: str = option("all", "attention modules to fine-tune: all, last:K or from:K")
    engine: str = option("ghost", "how gradients are clipped: ghost (fast), or func (torch.func, for reading)")
    chunk: str = option("256", "examples whose gradients are in memory at a time, or auto: as many as fit")
    insecure_noise_seed: int = option(-1, "FOR TESTS: private noise and batches follow this seed: NOT PRIVATE")
    show_private_loss: bool = option(False, "print the training loss: IT IS NOT PRIVATE, never publish it")
    ema_decay: float = option(0.999, "decay of the weights' moving average, per logical step")
    # sampling, for the grid at the end
    prompts: tuple[str, ...] = option((), "captions of that grid; the private stage makes none without them")
    sample_steps: int = option(12, "network evaluations")
    order: int = option(2, "1: DDIM, 2: DPM-Solver++ 2M, which needs fewer steps")
    eta: float = option(0.0, "with order 1 up to 1, DDPM's noise: samples are cleaner and less diverse")
    guidance: float = option(1.5, "classifier-free guidance; 1 is none")

    def architecture(self, num_classes: int) -> dict:
        """The arguments of LatentDiffusion (see there)."""
        vae = dict(ch=self.vae_channels, ch_mult=list(self.vae_mult), num_res_blocks=self.vae_res_blocks,
                   attn_resolutions=list(self.vae_attention), in_channels=self.channels, resolution=self.image_size,
                   z_channels=self.latent_channels, embed_dim=self.latent_channels)
        unet = dict(in_channels=self.latent_channels, out_channels=self.latent_channels,
                    model_channels=self.unet_channels, num_res_blocks=self.res_blocks,
                    attention_resolutions=list(self.attention_resolutions), channel_mult=list(self.unet_mult),
                    num_heads=self.num_heads, context_dim=self.context_dim or None)
        # What is off is left out, as it was when there were no such flags: old checkpoints stay comparable.
        vae |= {"n_embed": self.codebook} if self.codebook else {}
        unet |= {name: getattr(self, name) for name in ("num_head_channels", "use_scale_shift_norm", "resblock_updown")
                 if getattr(self, name)}
        text = dict(length=self.context_tokens, layers=self.text_layers)
        return dict(vae=vae, unet=unet, num_classes=num_classes,
                    linear_start=self.linear_start, linear_end=self.linear_end,
                    **({"text": text} if self.has_captions and self.text_layers else {}))

    @property
    def has_captions(self) -> bool:
        return self.context_tokens > 1 and self.context_dim > 0

    def load_data(self, source: str) -> data.Dataset:
        """The training images; a model without classes takes them for one. ValueError where captions are missing."""
        dataset = data.load(source, "train", self.data_dir, self.image_size, self.channels)
        if self.has_captions and dataset.captions is None:
            raise ValueError(f"{source} has no captions: give data with captions (a folder with a metadata.jsonl), or "
                             "--context-tokens 1 for a model of classes")
        if self.context_dim and not self.has_captions:
            return dataset
        return data.Dataset(dataset.images, 0 * dataset.labels, ["all"], dataset.captions)

    def conditions(self, dataset: data.Dataset) -> torch.Tensor:
        """What the U-Net is told of each image: its label, int [N], or its caption, int [N, L]."""
        if self.has_captions:
            return tokenise(dataset.captions, self.context_tokens)
        return torch.from_numpy(dataset.labels)

    def check(self) -> None:
        """ValueError naming the first flag whose value cannot work."""
        if self.stage not in ("public", "private"):
            raise ValueError(f"unknown stage {self.stage!r}: give public or private")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                may_be_zero = f.name in ("seed", "kl_weight", "label_dropout", "eta", "codebook", "num_head_channels",
                                         "context_dim", "text_layers", "vae_crop", "private_timesteps")
                if not isinstance(number, bool | str) and f.name != "insecure_noise_seed" and not (
                        0 < number < math.inf or may_be_zero and number == 0):
                    raise ValueError(f"--{f.name.replace('_', '-')} must be positive and finite, not {number}")
        if self.accountant not in ACCOUNTANTS:
            raise ValueError(f"unknown accountant {self.accountant!r}: give one of {', '.join(ACCOUNTANTS)}")
        if self.engine not in ("ghost", "func"):
            raise ValueError(f"unknown engine {self.engine!r}: give ghost or func")
        if self.bf16 and self.engine == "func":
            raise ValueError("--bf16 needs --engine ghost: torch.func does not take it")
        if not re.fullmatch(r"auto|[1-9][0-9]*", self.chunk):
            raise ValueError(f"--chunk must be a positive number or auto, not {self.chunk!r}")
        if len(self.private_timesteps) != 2 or not self.private_timesteps[0] < self.private_timesteps[1] <= 1_000:
            raise ValueError("--private-timesteps must be two numbers LOW < HIGH from 0 to 1000")
        if not self.label_dropout < 1:
            raise ValueError(f"--label-dropout must be below 1, not {self.label_dropout:g}")
        if self.stage == "private" and data.same_source(self.public_data, self.private_data):
            raise ValueError(f"--public-data and --private-data are both {self.private_data}; they must differ")
        if self.channels not in (1, 3):
            raise ValueError(f"--channels must be 1 (grey) or 3 (colour), not {self.channels}")
        if self.train not in PRIVATE_PARTS:
            raise ValueError(f"unknown --train {self.train!r}: give one of {', '.join(PRIVATE_PARTS)}")
        if not re.fullmatch(r"all|(last|from):[0-9]+", self.attention_blocks):
            raise ValueError(f"--attention-blocks must be all, last:K or from:K, not {self.attention_blocks!r}")
        smallest = 2 ** (len(self.vae_mult) + len(self.unet_mult) - 2)
        if self.image_size % smallest:
            raise ValueError(f"--image-size must be a multiple of {smallest}: autoencoder and U-Net halve it that far")
        if self.vae_crop > self.image_size or self.vae_crop % 2 ** (len(self.vae_mult) - 1):
            raise ValueError(f"--vae-crop must be a multiple of {2 ** (len(self.vae_mult) - 1)}, as the autoencoder "
                             f"halves it that far, and at most --image-size, not {self.vae_crop}")
        heads = self.num_head_channels or self.num_heads
        if self.unet_channels % 2 or any(self.unet_channels * mult % heads for mult in self.unet_mult):
            raise ValueError("--unet-channels must be even, and times each of --unet-mult a multiple of --num-heads "
                             "(or --num-head-channels)")
        if self.has_captions and not self.text_layers and not self.describe:
            raise ValueError("captions in LDM's BERT (--text-layers 0) cannot be trained on: give --describe to see "
                             "the model, or --text-layers for a text encoder that is trained here")
        if self.has_captions:
            check_prompts(self.prompts, self.context_tokens)
        if self.init and self.public_checkpoint:
            raise ValueError("--init and --public-checkpoint both give a public model: leave one out")
        check_sampling(self.sample_steps, self.eta, self.order)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.preset}")

    @property
    def torch_device(self) -> torch.device:
        return find_device(self.device)


# The paper's models (DP-LDM's configs/finetuning): architecture, noise schedule, epsilon, delta, C, expected batch,
# trained blocks, and as --chunk their physical batch. Not theirs: learning rates (here independent of C) and the
# number of epochs, which are not tuned at these sizes, and a null class for guidance. Data sets are
# data.py's; data/imagenet, data/laion and data/celebahq are folders of your own.
PAPER = dict(channels=3, vae_channels=128, vae_mult=(1, 2), vae_res_blocks=2, vae_attention=(16, 8), vae_lr=1e-4,
             latent_channels=3, res_blocks=2, num_heads=8, context_dim=512, public_lr=1e-4)
SCALE_SHIFT = dict(use_scale_shift_norm=True, resblock_updown=True)
CELEBA = dict(PAPER, **SCALE_SHIFT, public_data="imagenet32", private_data="celeba", context_dim=0,
              unet_mult=(1, 2, 4), attention_resolutions=(4, 2, 1), eps=1.0, delta=1e-6, max_grad_norm=5e-4)

# Six latent channels, where the default has eight: fewer are learnt sooner, and a demo has minutes only.
GLYPHS = dict(vae_steps=3_000, latent_channels=6, unet_channels=48, public_steps=1_400, public_lr=4e-3,
              expected_batch=256, epochs=6.0, private_lr=4e-3)

PRESETS = {
    "glyphs": GLYPHS,
    "glyphs-text": dict(GLYPHS, public_data="captioned-letters", private_data="captioned-digits", context_tokens=32,
                        context_dim=48, public_steps=1_800, epochs=4.0, prompts=(
                            "a thin digit 7 leaning right", "a bold digit 2 leaning left", "a medium digit 4 upright",
                            "a bold digit 5 upright", "a thin digit 0 leaning left")),
    # 256x256 in minutes, so narrow: a feature map of 8 channels costs as much there as one of 512 at 32x32.
    "scenes256": dict(public_data="scenes", private_data="scenes-private", image_size=256, channels=3,
                      vae_mult=(1, 2, 3, 6), latent_channels=4, vae_steps=1_500, vae_batch=2, vae_crop=128,
                      vae_lr=1.5e-3, kl_weight=2e-4, unet_channels=24, unet_mult=(1, 2, 4),
                      attention_resolutions=(4,), public_steps=1_000, public_batch=16,
                      eps=10.0, expected_batch=250, epochs=4.0, chunk="25"),
    # For C, K and the time steps see benchmarks/budget.py, which finds without private data what leaves most signal.
    "mnist": dict(public_data="pen-letters-varied", private_data="mnist", data_dir="data/mnist", vae_steps=12_000,
                  public_steps=20_000, accountant="pld", expected_batch=2_048, epochs=6.0, max_grad_norm=0.03,
                  noise_draws=4, private_timesteps=(200, 600), private_lr=4e-3, embedder_scale=5.0),
    # The data of the paper's cifar10, sizes for two CPU cores, and public images that need no download.
    # Squares of 16x16 of many images: the autoencoder learns colours late, after 1,000 steps whatever their size. The
    # classes look like no public ones and all start from one embedding, which has to move far: a large embedder_scale.
    "cifar10-small": dict(public_data="leaves", private_data="cifar10", channels=3, vae_channels=32, vae_mult=(1, 2, 4),
                          vae_steps=2_500, vae_batch=64, vae_crop=16, vae_lr=2e-3, kl_weight=2e-4, unet_channels=48,
                          unet_mult=(1, 2), attention_resolutions=(1, 2), public_steps=6_000, public_batch=64,
                          eps=10.0, accountant="pld", expected_batch=2_000, epochs=20.0, max_grad_norm=0.03,
                          noise_draws=2, chunk="128", private_timesteps=(400, 800), private_lr=4e-3,
                          embedder_scale=100.0),
    "mnist-paper": dict(PAPER, **SCALE_SHIFT, private_data="mnist", data_dir="data/mnist", vae_mult=(1, 2, 3, 5),
                        vae_attention=(32, 16, 8), unet_channels=64, unet_mult=(1, 2), res_blocks=1,
                        attention_resolutions=(1, 2), num_heads=4, context_dim=5, linear_end=0.0155,
                        eps=10.0, max_grad_norm=1e-3, expected_batch=2_000, chunk="256"),
    "cifar10": dict(PAPER, public_data="imagenet32", private_data="cifar10", unet_channels=128,
                    unet_mult=(1, 2, 2, 4), attention_resolutions=(1, 2, 4), linear_end=0.0155,
                    eps=10.0, max_grad_norm=1e-6, expected_batch=2_000, attention_blocks="from:8", chunk="40"),
    "celeba32": dict(CELEBA, unet_channels=192, num_head_channels=32, expected_batch=2_048, chunk="100"),
    "celeba64": dict(CELEBA, public_data="imagenet64",
                     image_size=64, vae_channels=192, unet_channels=128, expected_batch=8_192, chunk="50"),
    "celebahq256": dict(PAPER, public_data="data/imagenet", private_data="data/celebahq", num_classes=2,
                        image_size=256, vae_mult=(1, 2, 4), vae_attention=(), codebook=8_192, unet_channels=192,
                        unet_mult=(1, 2, 3, 5), attention_resolutions=(8, 4, 2), num_heads=1,
                        eps=1.0, max_grad_norm=5e-4, expected_batch=2_048, chunk="15"),
    "text256": dict(PAPER, public_data="data/laion", private_data="celebahq", image_size=256,
                    vae_mult=(1, 2, 4, 4), vae_attention=(), latent_channels=4, unet_channels=320,
                    unet_mult=(1, 2, 4, 4), attention_resolutions=(4, 2, 1), context_dim=1_280, context_tokens=77,
                    text_layers=0, linear_start=0.00085, linear_end=0.012,
                    eps=10.0, max_grad_norm=1e-3, expected_batch=256, chunk="3"),
}


# ---- what a configuration amounts to ---------------------------------------------------------------

# LDM's BERTEmbedder of txt2img-1p4B (32 layers, width 1280; CompVis/latent-diffusion a506df5), which is trained whole.
TEXT_ENCODER_PARAMETERS = 581_994_042


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def describe(config: Config) -> str:
    """Parameters of each part, trained ones, and memory of a private step, as text. Nothing is allocated."""
    architecture = config.architecture(config.num_classes)
    if config.train == "lora":
        architecture["unet"]["lora_rank"] = config.lora_rank
    with torch.device("meta"):
        model = LatentDiffusion(architecture).to("meta").requires_grad_(False)
    tokens = config.context_tokens
    names, more = ([name.removeprefix("unet.") for name in private_parameter_names(
        model, config.attention_blocks, t, config.train) if name.startswith("unet.")] for t in (tokens, 2))
    trained = count(map(model.unet.get_parameter, names))
    idle = count(map(model.unet.get_parameter, more)) - trained
    chunk = 1 if config.chunk == "auto" else int(config.chunk)
    official = config.has_captions and not config.text_layers
    embedder = TEXT_ENCODER_PARAMETERS if official else count(model.embedder.parameters())
    kind = ("text encoder of txt2img-1p4B" if official else "no embedder" if not embedder else
            f"text encoder, {config.text_layers} layers" if config.has_captions else
            f"class embedder, {config.num_classes} + 1 rows")
    unet, vae = count(model.unet.parameters()), count(model.vae.parameters())
    channels, side = config.latent_channels, config.image_size // 2 ** (len(config.vae_mult) - 1)
    lines = [f"preset {config.preset}: images {config.image_size}x{config.image_size}x{config.channels}, latents "
             f"{side}x{side}x{channels}", f"{'':34}{'parameters':>15}{'trained':>15}{'share':>9}"]
    parts = [(f"autoencoder ({'VQ' if config.codebook else 'KL'})", vae, 0), ("U-Net", unet, trained),
             (kind, embedder, embedder), ("U-Net and embedder", unet + embedder, trained + embedder)]
    for part, total, learns in parts:
        lines.append(f"{part:34}{total:>15,}{learns:>15,}{learns / max(1, total):>9.2%}")
    if idle:
        lines.append(f"{idle:,} more in the trained modules have no effect with one context token: they stay frozen")
    example = config.noise_draws * kept_bytes(model.unet, names, (1, channels, side, side), tokens, config.context_dim)
    gradients = 4 * (trained + embedder) if config.engine == "func" else 0
    memory = [
        (4 * (vae + unet + embedder), "all weights, float32"),
        (28 * (trained + embedder), "seven more per trained one: copy, average, Adam's moments (2), clipped sum, noisy "
                                    "gradient, the last one"),
        (chunk * (example + gradients),
         f"{chunk} examples at a time (--chunk), {example / 2**20:,.1f} MiB each: what autograd keeps of the "
         f"U-Net's forward pass{' (not the text encoder)' * config.has_captions}"
         + f", and {gradients / 2**20:,.1f} MiB: their gradients" * bool(gradients))]
    lines.append(f"a private step needs about {sum(size for size, _ in memory) / 2**30:.2f} GiB, an estimate:")
    lines += [f"{size / 2**30:9.2f} GiB  {what}" for size, what in memory]
    return "\n".join(lines)


def kept_bytes(unet: torch.nn.Module, names: list[str], shape: tuple[int, ...], tokens: int, context_dim: int) -> int:
    """Bytes that autograd keeps of the U-Net's forward pass until the backward pass to its parameters `names`.

    The U-Net lies on the meta device, `shape` is that of z_t. Weights do not count. The backward pass frees this bit
    by bit; what it needs beside (gradients of activations) is not counted, nor is what a library takes for itself.
    """
    context = torch.zeros(shape[0], tokens, context_dim, device="meta") if context_dim else None
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()   # views of one tensor share it
        storages[id(storage)] = storage
        return tensor

    for name in names:
        unet.get_parameter(name).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        eps_hat = unet(torch.zeros(shape, device="meta"), torch.zeros(shape[0], device="meta"), context)
        eps_hat.square().mean()
    weights = {id(p.untyped_storage()) for p in unet.parameters()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


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
    first = is_first_process()
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
    except (MemoryError, RuntimeError) as error:   # without numbers: they could be those of a private batch
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        print("error: out of memory: lower --chunk (train.py), --public-batch or --columns", file=sys.stderr)
        sys.exit(2)


@contextmanager
def stop_after_step() -> Iterator[list]:
    """Ctrl-C inside fills the list that is yielded, for the loop to end between two steps; twice stops at once."""
    stop = []

    def ask(number, frame):
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)
        stop.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()   # "meta" has no values
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
            parser.add_argument(flag, type=typing.get_args(f.type)[0], nargs="+", help=text)
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
