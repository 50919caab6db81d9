"""Train DP-LDM (TMLR 2024, arXiv 2305.15759) in two loops that differ in four lines.

`--stage public` pre-trains on public images. `--stage private` fine-tunes attention and embedder on
private images with DP-SGD.

    python train.py --stage private --eps 1                       # rendered data, from scratch
    python train.py --preset mnist --data-dir data/mnist --stage private --eps 10
    torchrun --standalone --nproc_per_node=2 train.py --eps 1     # two processes, one run

A run writes its checkpoint and a grid of samples into --out. A private run writes its ledger beside
them; after Ctrl-C, the same command with --resume goes on.
"""

if __name__ == "__main__":   # Ctrl-C while packages load
    import runtime.quiet  # noqa: F401

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import trange

import datasets
import dp_sgd
from dp_sgd import PrivacyPlan
from ldm import (
    EMA,
    LatentDiffusion,
    drop_labels,
    lr_factor,
    normalize_images,
    sample_t_and_noise,
)
from runtime import distributed, fingerprint, runs, threads
from runtime.checkpoints import build_model, load_checkpoint, load_pretrained, save_checkpoint
from runtime.classes import LOOKALIKES, new_class_embedder
from runtime.cli import one_line_errors, stop_after_step
from runtime.config import Config, parse_args
from runtime.describe import num_parameters, summary
from runtime.engines import clipping_engine
from runtime.latents import encode_dataset
from runtime.noise import private_generator
from runtime.precision import bfloat16
from runtime.samples import save_samples

textbook_sum = dp_sgd.in_chunks(dp_sgd.clipped_gradient_sum, 256)


# ---- the two loops -----------------------------------------------------------------------------

def train_public(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor, config: Config,
                 rng: np.random.Generator) -> None:
    """Train U-Net and embedder on public latents z_0 [N, C, h, w] with labels int [N, ...].

    In place; the model ends with the averaged weights.
    """
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("vae.")}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.public.lr, fused=True)
    ema = EMA(parameters, config.diffusion.ema_decay)
    null_class, dropout = model.embedder.null_class, config.diffusion.label_dropout
    progress = trange(config.public.steps, desc="public diffusion")
    for step in progress:
        i = torch.randint(len(z_0), (config.public.batch,), device=z_0.device)   # 1. anyone
        eps = rng.standard_normal((len(i), *z_0.shape[1:]), dtype=np.float32)
        t = (rng.random(len(i)) * len(model.alphas_cumprod)).astype(int)
        eps, t = torch.from_numpy(eps).to(z_0.device), torch.from_numpy(t).to(z_0.device)
        loss = model(z_0[i], t, eps, drop_labels(labels[i], null_class, dropout, rng)).mean()
        optimizer.zero_grad()
        loss.backward()                                  # 2. unclipped, 3. mean, 4. no noise
        optimizer.param_groups[0]["lr"] = config.public.lr * lr_factor(step, config.public.steps)
        optimizer.step()
        ema.update(parameters)
        if step % 50 == 0:   # reading the loss waits for a GPU
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.load_state_dict(ema.shadow, strict=False)


def train_private(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor, names: list[str],
                  plan: PrivacyPlan, config: Config, rng: np.random.Generator, *,
                  sample: Callable = dp_sgd.poisson_sample,
                  clipped_sum: Callable = textbook_sum,
                  add_noise: Callable = dp_sgd.add_noise,
                  start: dict | None = None,
                  on_step: Callable = lambda *state: None) -> None:
    """DP-SGD on the parameters `names`, in place; the model ends with the averaged weights.

    z_0 [N, C, h, w] and labels int [N, ...] are private. rng draws batches, noise and draws: it
    must be secret. on_step(step, parameters, optimizer, ema) comes before each step: saving,
    Ctrl-C. start: what it saved, to go on from.
    """
    private = config.private
    model.requires_grad_(False)
    model.embedder.rescale(private.embedder_scale)
    # Copies, which the engines swap into the model: its own weights change at the end only.
    parameters = {name: model.get_parameter(name).clone() for name in names}
    optimizer = torch.optim.Adam(parameters.values(), lr=private.lr, fused=True)
    ema = EMA(parameters, config.diffusion.ema_decay)
    first = runs.restore(start, parameters, optimizer, ema)
    for step in trange(first, plan.steps, initial=first, total=plan.steps, desc="private"):
        on_step(step, parameters, optimizer, ema)
        i = sample(plan, rng).to(z_0.device)                                 # 1. who takes part
        batch = sample_t_and_noise(model, z_0[i], labels[i], private.noise_multiplicity,
                                   config.diffusion.label_dropout, rng, private.timesteps)
        total = clipped_sum(model, parameters, batch, plan.clip_to)          # 2. clip each, 3. sum
        grads = add_noise(total, plan, rng)              # 4. noise, once; / expected batch
        for name, p in parameters.items():               # from here on all is post-processing
            p.grad = grads[name].to(p.dtype)
        optimizer.param_groups[0]["lr"] = private.lr * lr_factor(step, plan.steps)
        optimizer.step()
        ema.update(parameters)
    model.load_state_dict(ema.shadow, strict=False)


# ---- the autoencoder ---------------------------------------------------------------------------

def train_autoencoder(vae: nn.Module, images: np.ndarray, config: Config) -> None:
    """Train `vae` in place on public images, uint8 [N, H, W, C]."""
    settings, device = config.autoencoder, config.device
    # A run this short needs a second moment that forgets faster than Adam's usual 0.999 does.
    optimizer = torch.optim.Adam(vae.parameters(), lr=settings.lr, betas=(0.9, 0.99), fused=True)
    progress = trange(settings.steps, desc="autoencoder")
    for step in progress:
        chosen = torch.randint(len(images), (settings.batch,)).numpy()
        x = random_squares(images, chosen, settings.crop)
        loss = vae.loss(normalize_images(x, device), settings.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = settings.lr * lr_factor(step, settings.steps)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def random_squares(images: np.ndarray, chosen: np.ndarray, crop: int) -> np.ndarray:
    """The images `chosen`, int [B], or a random crop x crop square of each: uint8 [B, h, w, C]."""
    if not crop:
        return images[chosen]
    corners = torch.randint(images.shape[1] - crop + 1, (2, len(chosen))).tolist()
    return np.stack([image[y:y + crop, x:x + crop]
                     for image, y, x in zip(images[chosen], *corners, strict=True)])


# ---- the two stages ----------------------------------------------------------------------------

def load_images(source: str, config: Config) -> datasets.Dataset:
    """The training images of `source`; a model without classes takes them all for one class.

    ValueError as of `check_captions`.
    """
    size, channels = config.data.image_size, config.data.channels
    dataset = datasets.load(source, "train", config.run.data_dir, size, channels,
                            is_public=source == config.data.public)
    runs.check_captions(dataset.captions, source, config)
    if config.unet.context_dim and not config.has_captions:
        return dataset
    return datasets.Dataset(dataset.images, 0 * dataset.labels, ["all"], dataset.captions)


def conditions(model: LatentDiffusion, dataset: datasets.Dataset, config: Config) -> torch.Tensor:
    """What the U-Net is told of each image: its label, int [N], or its caption, int [N, L]."""
    if config.has_captions:
        return model.embedder.conditions(dataset.captions).to(config.device)
    return torch.from_numpy(dataset.labels).to(config.device)


def public_autoencoder(model: LatentDiffusion, dataset: datasets.Dataset, config: Config,
                       saved: Path, digest: str) -> LatentDiffusion:
    """`model` with an autoencoder: official weights, the one in `saved`, or a newly trained one.

    ValueError if that in `saved` was made otherwise.
    """
    if config.run.pretrained:
        official, _ = load_pretrained(config.run.pretrained, model.architecture)
        return new_class_embedder(official, None, len(dataset.classes)).to(config.device)
    if saved.exists() and not config.run.overwrite:   # a stopped stage has its slower half done
        model.vae = runs.earlier_autoencoder(saved, config, digest).to(config.device)
        return model
    with distributed.averaged_gradients():
        train_autoencoder(model.vae, dataset.images, distributed.local_batches(config))
    runs.check_finite(model, "autoencoder.lr")
    save_checkpoint(saved, model, classes=dataset.classes, config=dataclasses.asdict(config),
                    part="autoencoder", public_digest=digest)
    return model


def run_public(config: Config, target: Path, private: np.ndarray | tuple = ()) -> None:
    """The public stage: autoencoder, latent scale, diffusion model; writes `target` and samples.

    ValueError, before any work, if its images are the `private` ones, uint8 [N, H, W, C].
    """
    if config.vae.n_embed and not config.run.pretrained:
        raise ValueError("a VQ autoencoder is not trained here: give --pretrained FILE, or "
                         "vae.n_embed 0")
    rank = distributed.rank_and_world()[0]
    dataset = load_images(config.data.public, config)
    digest = runs.public_digest(dataset.images, private, config)
    torch.manual_seed(config.public.seed)
    model = build_model(config.architecture(len(dataset.classes))).to(config.device)
    if rank:   # the same model everywhere, but other batches
        torch.manual_seed(config.public.seed + rank)
    print(f"public stage: autoencoder {num_parameters(model.vae.parameters()):,} parameters, "
          f"U-Net {num_parameters(model.unet.parameters()):,}")
    model = public_autoencoder(model, dataset, config, runs.autoencoder_beside(target), digest)
    z_0 = encode_dataset(model, dataset.images, config.device, config.folder)
    if not config.run.pretrained:   # the scale is still 1 here
        model.latent_scale.copy_(1.0 / z_0.std())
        z_0 *= model.latent_scale
    rng = np.random.default_rng(config.public.seed + rank)
    with (bfloat16(model.unet, model.embedder, enabled=config.run.bf16),
          distributed.averaged_gradients()):
        train_public(model, z_0, conditions(model, dataset, config),
                     distributed.local_batches(config), rng)
    runs.check_finite(model, "public.lr")
    if config.has_captions:
        model.embedder.init_unseen_bytes(dataset.captions, LOOKALIKES)
    save_checkpoint(target, model, half=config.run.half, classes=dataset.classes,
                    config=dataclasses.asdict(config), public_digest=digest)
    names = list(dict.fromkeys(dataset.captions))[:10] if config.has_captions else dataset.classes
    save_samples(model, names, config, target, "public only")
    distributed.wait_for_all()   # a private stage may read what the first process has just written


def public_model(config: Config, target: Path,
                 private: datasets.Dataset) -> tuple[LatentDiffusion, dict]:
    """The public model that is not there yet: official weights, or the public stage's."""
    if config.run.public_checkpoint:
        raise ValueError(f"--public-checkpoint {target} does not exist")
    if config.run.pretrained:
        return load_pretrained(config.run.pretrained, config.architecture(len(private.classes)))
    runs.make_public(target, lambda: run_public(config, target, private.images))
    return load_checkpoint(target)


def run_private(config: Config, files: runs.Files) -> None:
    """The private stage: fine-tunes the public model, writes checkpoint, ledger and samples."""
    dataset = load_images(config.data.private, config)
    N, classes = len(dataset.images), dataset.classes
    if config.run.resume and files.unfinished.exists():
        run = runs.interrupted_run(config, files.unfinished, N, classes)
    else:
        run = runs.new_run(config, files.public, N, classes,
                           lambda: public_model(config, files.public, dataset))
    runs.announce(run, config)
    model, plan, digests = run.model.to(config.device), run.plan, []
    z_0 = encode_dataset(model, dataset.images, config.device, config.folder, digests)
    if run.knows(digests, datasets.same_source(run.public_data, config.data.private)):
        raise ValueError(f"{files.public} was trained on {config.data.private} without privacy")
    fingerprint.keep_data(files.unfinished, run.handle, dataset, digests, run.start is not None)
    labels, names = conditions(model, dataset, config), run.trained_names(config)
    private = config.private
    normals = private.expected_batch * private.noise_multiplicity * z_0[0].numel()
    rng = private_generator(private.insecure_noise_seed, run.start["step"] if run.start else 0,
                            normals + num_parameters(map(model.get_parameter, names)))
    with stop_after_step() as asked, bfloat16(model.unet, model.embedder, enabled=config.run.bf16):
        saver = runs.Saver(model, plan.steps, config.run.save_every, distributed.shared_stop(asked),
                           lambda training: run.save(files.unfinished, config, classes,
                                                     training["step"], training=training))
        train_private(model, z_0, labels, names, plan, config, rng, start=run.start, on_step=saver,
                      sample=distributed.of_share(dp_sgd.poisson_sample),
                      add_noise=distributed.by_first_process(dp_sgd.add_noise),
                      clipped_sum=clipping_engine(model, z_0, labels, names, config))
    runs.check_finite(model, "--private-lr")   # of weights that are private already
    run.finish(config, files, classes)
    # The private captions are as private as the images: no grid shows them.
    names = list(config.samples.prompts) if config.has_captions else classes
    save_samples(model, names, config, files.target, f"eps = {config.private.epsilon:g}")


# ---- command line ------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    config = parse_args(argv, __doc__)
    if config.summary:
        print(summary(config))
        return
    if config.stage == "private" and datasets.same_source(config.data.public, config.data.private):
        raise ValueError(f"--public-data and --private-data are both {config.data.private}; "
                         "they must differ")
    files = runs.Files.of(config)
    with distributed.process_group(), files.locked(config) as complete:
        threads.choose(threads.of_training(config), config.device)
        if config.device.type == "cuda":   # TF32; norms and sums are in float64
            torch.set_float32_matmul_precision("high")
        if config.stage == "public":
            run_public(config, files.target)
        elif not complete:
            run_private(config, files)


if __name__ == "__main__":
    with one_line_errors(several=True):
        main()
