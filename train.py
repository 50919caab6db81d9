"""Train DP-LDM (TMLR 2024, arXiv 2305.15759): `--stage public` pre-trains on
public images, `--stage private` fine-tunes attention and embedder on private ones with DP-SGD.

    python train.py --stage private --eps 1                                  # embedded data, from scratch
    python train.py --preset mnist --data-dir data/mnist --stage private --eps 10

A run writes its checkpoint and a grid of samples below --out (default runs/<preset>).
"""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call, vmap
from tqdm import trange

import data
from dp_sgd import PrivacyPlan, make_plan, noisy_gradient, poisson_sample, secure_generator
from ldm import EMA, LatentDiffusion, ddim_timesteps, load_checkpoint, replace_embedder, save_checkpoint
from unet import private_parameter_names
from vae import AutoencoderKL


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
    seed: int = option(0, "seed of the public stage; private noise and batches never follow a seed")
    device: str = option("auto", "cpu, cuda, ..., or auto")
    # images and autoencoder
    image_size: int = option(32, "images are this high and wide")
    channels: int = option(1, "1 for grey, 3 for colour")
    vae_channels: int = option(8, "width of the autoencoder's first level")
    vae_mult: tuple[int, ...] = option((1, 1, 2, 4), "width multiplier of each level; all but the first halve the size")
    latent_channels: int = option(8, "channels of the latents")
    vae_steps: int = option(3_000, "optimiser steps of the autoencoder")
    vae_batch: int = option(32, "images per autoencoder step")
    vae_lr: float = option(3e-3, "the autoencoder's learning rate")
    kl_weight: float = option(5e-4, "weight of the KL term per latent number")
    # diffusion model
    unet_channels: int = option(32, "width of the U-Net's first level")
    unet_mult: tuple[int, ...] = option((1, 2), "width multiplier of each level")
    res_blocks: int = option(1, "residual blocks per level")
    attention_resolutions: tuple[int, ...] = option((1, 2), "downsampling factors with attention")
    num_heads: int = option(4, "attention heads")
    context_dim: int = option(64, "width of the class embedding")
    linear_start: float = option(0.0015, "first beta of the noise schedule")
    linear_end: float = option(0.0195, "last beta of the noise schedule")
    label_dropout: float = option(0.1, "share of examples trained with the null class, for guidance")
    public_steps: int = option(6_000, "optimiser steps of the public diffusion model")
    public_batch: int = option(128, "examples per public step")
    public_lr: float = option(1e-3, "learning rate of the public diffusion model")
    # private stage
    eps: float = option(1.0, "privacy budget epsilon")
    delta: float = option(1e-5, "privacy budget delta")
    epochs: float = option(6.0, "expected passes over the private data")
    expected_batch: int = option(1_024, "expected examples per logical step (Poisson sampling)")
    max_grad_norm: float = option(0.1, "clipping norm C of one example's gradient")
    noise_draws: int = option(1, "K: diffusion noise draws averaged in one example's gradient")
    private_lr: float = option(2e-3, "learning rate of the private stage")
    embedder_scale: float = option(30.0, "the embedder is trained in units of 1/this, which multiplies its gradient")
    attention_blocks: str = option("all", "attention modules to fine-tune: all, last:K or from:K")
    chunk: int = option(128, "examples whose gradients are in memory at a time")
    show_private_loss: bool = option(False, "print the training loss: IT IS NOT PRIVATE, never publish it")
    ema_decay: float = option(0.999, "decay of the weights' moving average, per logical step")
    # sampling, for the grid at the end
    sample_steps: int = option(50, "DDIM steps")
    eta: float = option(1.0, "0: deterministic DDIM, 1: DDPM's noise, which corrects errors of early steps")
    guidance: float = option(2.0, "classifier-free guidance; 1 is none")

    def architecture(self, num_classes: int) -> dict:
        """The arguments of LatentDiffusion (see there)."""
        vae = dict(ch=self.vae_channels, ch_mult=list(self.vae_mult), num_res_blocks=1, attn_resolutions=[],
                   in_channels=self.channels, resolution=self.image_size, z_channels=self.latent_channels,
                   embed_dim=self.latent_channels)
        unet = dict(in_channels=self.latent_channels, out_channels=self.latent_channels,
                    model_channels=self.unet_channels, num_res_blocks=self.res_blocks,
                    attention_resolutions=list(self.attention_resolutions), channel_mult=list(self.unet_mult),
                    num_heads=self.num_heads, context_dim=self.context_dim)
        return dict(vae=vae, unet=unet, num_classes=num_classes,
                    linear_start=self.linear_start, linear_end=self.linear_end)

    def load_data(self, source: str) -> data.Dataset:
        return data.load(source, "train", self.data_dir, self.image_size, self.channels)

    def check(self) -> None:
        """ValueError naming the first flag whose value cannot work."""
        if self.stage not in ("public", "private"):
            raise ValueError(f"unknown stage {self.stage!r}: give public or private")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                may_be_zero = f.name in ("seed", "kl_weight", "label_dropout", "eta")
                if f.type not in (bool, str) and not (number > 0 or may_be_zero and number == 0):
                    raise ValueError(f"--{f.name.replace('_', '-')} must be positive, not {number}")
        if not self.label_dropout < 1 or self.eta > 1:
            raise ValueError("--label-dropout must be below 1 and --eta at most 1")
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
        ddim_timesteps(self.sample_steps)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.preset}")

    @property
    def torch_device(self) -> torch.device:
        return find_device(self.device)


PRESETS = {
    # Four latent channels and a stronger KL term: such latents are learnt in the minutes that a demo has.
    "glyphs": dict(vae_steps=800, latent_channels=4, kl_weight=2e-3, unet_channels=48, unet_mult=(1,),
                   attention_resolutions=(1,), public_steps=1_100, public_batch=128, public_lr=4e-3,
                   expected_batch=256, epochs=1.5, private_lr=4e-3),
    "mnist": dict(private_data="mnist", data_dir="data/mnist"),
}


# ---- public stage ----------------------------------------------------------------------------------

def to_pixels(images, device: torch.device) -> torch.Tensor:
    """uint8 array [B, H, W, C] -> float tensor [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def lr_at(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up over the first 5% of the steps, then a cosine to zero."""
    return min((step + 1) / (0.05 * steps), 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def train_autoencoder(vae: AutoencoderKL, images, config: Config) -> None:
    """Train `vae` in place on public images, uint8 [N, H, W, C]."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.vae_lr, fused=True)
    device = config.torch_device
    progress = trange(config.vae_steps, desc="autoencoder")
    for step in progress:
        chosen = torch.randint(len(images), (config.vae_batch,)).numpy()
        loss = vae.loss(to_pixels(images[chosen], device), config.kl_weight)
        optimizer.param_groups[0]["lr"] = config.vae_lr * lr_at(step, config.vae_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images, device: torch.device) -> torch.Tensor:
    """Posterior moments [N, 2C, h, w] of all images, kept in memory for the whole training."""
    starts = trange(0, len(images), 250, desc="encoding images", disable=len(images) < 2_000)
    return torch.cat([vae.encode(to_pixels(images[i:i + 250], device)) for i in starts])


def noise_draws(model: LatentDiffusion, moments: torch.Tensor, labels: torch.Tensor, K: int,
                label_dropout: float, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """K random draws for each of B examples: z_0, t, eps and condition, each [B, K, ...].

    `moments` [B, 2C, h, w] are the autoencoder's, `labels` int [B]. The draws of different examples are
    independent, so that one more example in a batch leaves the others' gradients as they were. In the private
    stage rng must be a secret one: the draws go by place in the batch, so that for whoever knew them one
    example more would shift those of all that follow it.
    """
    B, T, device = len(moments), len(model.alphas_cumprod), moments.device
    shape = (B * K, moments.shape[1] // 2, *moments.shape[2:])

    def normal():
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)

    z_0 = model.latents(moments.repeat_interleave(K, dim=0), normal())
    t = torch.from_numpy(rng.integers(T, size=B * K)).to(device)
    dropped = torch.from_numpy(rng.random(B * K) < label_dropout).to(device)
    condition = labels.repeat_interleave(K).masked_fill(dropped, model.embedder.null_class)
    return tuple(x.reshape(B, K, *x.shape[1:]) for x in (z_0, t, normal(), condition))


def train_diffusion(model: LatentDiffusion, moments: torch.Tensor, labels: torch.Tensor, config: Config) -> None:
    """Train U-Net and embedder on public latents, in place; the model ends with the averaged weights."""
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("vae.")}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.public_lr, fused=True)
    ema = EMA(parameters, config.ema_decay)
    rng = np.random.default_rng(config.seed)
    progress = trange(config.public_steps, desc="public diffusion")
    for step in progress:
        chosen = torch.randint(len(moments), (config.public_batch,), device=moments.device)
        batch = noise_draws(model, moments[chosen], labels[chosen], 1, config.label_dropout, rng)
        loss = model(*(x.squeeze(1) for x in batch)).mean()
        optimizer.param_groups[0]["lr"] = config.public_lr * lr_at(step, config.public_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(parameters)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.load_state_dict(ema.shadow, strict=False)


def run_public(config: Config, target: Path) -> None:
    """The public stage: autoencoder, latent scale, diffusion model; writes `target` and a grid of samples."""
    dataset = config.load_data(config.public_data)
    device = config.torch_device
    torch.manual_seed(config.seed)
    model = LatentDiffusion(config.architecture(len(dataset.classes))).to(device)
    print(f"public stage: {len(dataset.images):,} images of {config.public_data}; autoencoder "
          f"{count(model.vae.parameters()):,} parameters, U-Net {count(model.unet.parameters()):,}")
    saved = target.with_name("autoencoder.pt")   # lets a stopped public stage go on after its slower half
    if saved.exists() and not config.overwrite:
        print(f"taking the autoencoder from {saved}")
        earlier, facts = load_checkpoint(saved)
        wanted = model.architecture["vae"], config.public_data
        if (earlier.architecture["vae"], facts["config"]["public_data"]) != wanted:
            raise ValueError(f"{saved} has another architecture or other data: give --overwrite or another --out")
        model.vae = earlier.vae.to(device)
    else:
        train_autoencoder(model.vae, dataset.images, config)
        save_checkpoint(saved, model, classes=dataset.classes, config=dataclasses.asdict(config))
    moments = encode_all(model.vae, dataset.images, device)
    model.latent_scale.copy_(1.0 / model.latents(moments).std())   # the scale is still 1 here
    train_diffusion(model, moments, torch.from_numpy(dataset.labels).to(device), config)
    finish(model, dataset.classes, config, target, title="public only")


# ---- private stage ---------------------------------------------------------------------------------

def train_private(model: LatentDiffusion, moments: torch.Tensor, labels: torch.Tensor, names: list[str],
                  plan: PrivacyPlan, config: Config) -> None:
    """DP-SGD on the parameters `names`, in place; the model ends with the averaged weights.

    On public data the embedder's gradient is some 50 times smaller than that of the attention modules, so
    under one joint norm the noise would drown it, and with it the classes. Training embedder / embedder_scale
    instead, a fixed change of variables before clipping, multiplies its gradient and costs no privacy.
    """
    model.requires_grad_(False)
    scale = {name: config.embedder_scale if name.startswith("embedder.") else 1.0 for name in names}
    parameters = {name: model.get_parameter(name) / scale[name] for name in names}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.private_lr, fused=True)
    ema = EMA(parameters, config.ema_decay)
    rng = secure_generator()

    def in_model_units(parameters):
        # Leaves the others as they are: a product, even by 1, would pass over every per-example gradient again.
        return {name: p if scale[name] == 1.0 else p * scale[name] for name, p in parameters.items()}

    def example_loss(parameters, z_0, t, eps, condition):   # the K noise draws of one example -> mean loss
        return functional_call(model, in_model_units(parameters), (z_0, t, eps, condition)).mean()

    for step in (progress := trange(plan.steps, desc=f"private, eps={config.eps:g}")):
        chosen = poisson_sample(plan, rng).to(moments.device)
        batch = noise_draws(model, moments[chosen], labels[chosen], config.noise_draws, config.label_dropout, rng)
        gradient = noisy_gradient(example_loss, parameters, batch, plan, config.chunk, rng)
        for name, p in parameters.items():
            p.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = config.private_lr * lr_at(step, plan.steps)
        optimizer.step()
        ema.update(parameters)
        if config.show_private_loss and len(chosen):
            loss = vmap(example_loss, in_dims=(None, 0, 0, 0, 0), chunk_size=config.chunk)(parameters, *batch).mean()
            progress.set_postfix(not_private_loss=f"{loss.item():.3f}")
    model.load_state_dict(in_model_units(ema.shadow), strict=False)


def run_private(config: Config, public: Path, target: Path) -> None:
    """The private stage: fine-tune the model of checkpoint `public`; writes `target` and a grid of samples."""
    dataset = config.load_data(config.private_data)
    plan = make_plan(len(dataset.images), config.expected_batch, config.epochs, config.max_grad_norm,
                     config.eps, config.delta)
    if not public.exists():
        if config.public_checkpoint:
            raise ValueError(f"--public-checkpoint {public} does not exist")
        print(f"there is no public model at {public} yet: running the public stage first")
        run_public(config, public)
    model, facts = load_checkpoint(public)
    if "privacy" in facts or facts["config"]["public_data"] == config.private_data:
        raise ValueError(f"{public} was trained on private data already: its budget and this one's would add up")
    if model.architecture != config.architecture(model.architecture["num_classes"]):
        raise ValueError(f"{public} has another architecture than the flags ask for: "
                         "give the flags it was trained with, or another --out")
    model = replace_embedder(model, starting_classes(dataset.classes, facts["classes"]), len(dataset.classes))
    model.to(config.torch_device)
    names = private_parameter_names(model, config.attention_blocks)
    trained = count(map(model.get_parameter, names))
    total = count(model.unet.parameters()) + count(model.embedder.parameters())
    print(f"private stage: N = {plan.num_examples:,}, sample rate {plan.sample_rate:.5f}, {plan.steps:,} steps, "
          f"sigma = {plan.noise_multiplier:.4f}, C = {plan.max_grad_norm:g}\n"
          f"spends epsilon = {plan.epsilon:.4f} at delta = {plan.delta:g} (RDP); "
          f"trains {trained:,} of {total:,} parameters ({trained / total:.1%}) "
          f"of {public}, which knows {facts['config']['public_data']}")
    if plan.delta >= 1 / plan.num_examples:
        print(f"WARNING: delta is not below 1/N = {1 / plan.num_examples:.1e}: it allows to publish single examples")
    if config.show_private_loss:
        print("WARNING: the loss shown below is computed from private data without noise. Do not publish it.")
    moments = encode_all(model.vae, dataset.images, config.torch_device)
    train_private(model, moments, torch.from_numpy(dataset.labels).to(config.torch_device), names, plan, config)
    finish(model, dataset.classes, config, target, title=f"eps = {config.eps:g}",
           privacy=dataclasses.asdict(plan), public_config=facts["config"])


def starting_classes(private: list[str], public: list[str]) -> list[int] | None:
    """For every private class the public one it starts from: its namesake or lookalike; None if one has none."""
    names = [c if c in public else data.LOOKALIKES.get(c) for c in private]
    return [public.index(n) for n in names] if all(n in public for n in names) else None


# ---- command line ----------------------------------------------------------------------------------

def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def finish(model: LatentDiffusion, classes: list[str], config: Config, target: Path, title: str, **facts) -> None:
    """Write the checkpoint and, beside it, a PNG with samples of up to ten classes."""
    model.eval()
    save_checkpoint(target, model, classes=classes, config=dataclasses.asdict(config), **facts)
    rows, columns = min(10, len(classes)), 10
    labels = torch.arange(rows, device=config.torch_device).repeat_interleave(columns)
    images = model.generate(labels, config.sample_steps, config.eta, config.guidance).cpu().numpy()
    picture = target.with_suffix(".png")
    data.save_grid(picture, [(title, images.reshape(rows, columns, *images.shape[1:]), classes[:rows])])
    print(f"wrote {target} and {picture}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ValueErrors, for `one_line_errors`."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the options)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the program with one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
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


def parse_args(argv: list[str] | None = None) -> Config:
    """Flags -> Config: the defaults, then the preset's values, then what the command line says."""
    parser = Parser(__doc__)
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


def main(argv: list[str] | None = None) -> None:
    config = parse_args(argv)
    public = Path(config.public_checkpoint or config.folder / "public.pt")
    target = public if config.stage == "public" else config.folder / f"private-eps{config.eps:g}.pt"
    if target.exists() and not config.overwrite:
        raise ValueError(f"{target} exists: give --overwrite to replace it, or another --out")
    if config.stage == "public":
        run_public(config, target)
    else:
        run_private(config, public, target)


if __name__ == "__main__":
    with one_line_errors():
        main()
