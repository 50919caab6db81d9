"""Train DP-LDM (TMLR 2024, arXiv 2305.15759): `--stage public` pre-trains on
public images, `--stage private` fine-tunes attention and embedder on private ones with DP-SGD.

    python train.py --stage private --eps 1                                  # embedded data, from scratch
    python train.py --preset mnist --data-dir data/mnist --stage private --eps 10
    torchrun --standalone --nproc_per_node=2 train.py --stage private --eps 1     # two processes: one run, one noise

A run writes its checkpoint and a grid of samples below --out (default runs/<preset>); a private one writes its
ledger beside them, and can be stopped (Ctrl-C) and taken up again (--resume).
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.func import functional_call
from tqdm import trange

import data
import dp_sgd
from config import Config, count, describe, one_line_errors, parse_args, stop_after_step
from dp_sgd import (
    PrivacyPlan,
    Tensors,
    make_plan,
    noisy_gradient,
    poisson_sample,
    rank_and_world,
    secure_generator,
    sum_over_processes,
)
from ldm import EMA, LatentDiffusion, load_checkpoint, noise_draws, replace_embedder, save_checkpoint, with_lora
from official import load_official
from unet import private_parameter_names
from vae import AutoencoderKL, images_at_once

# ---- public stage ----------------------------------------------------------------------------------

def to_pixels(images, device: torch.device) -> torch.Tensor:
    """uint8 array [B, H, W, C] -> float tensor [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def lr_at(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up over the first 5% of the steps, then a cosine to zero."""
    return min((step + 1) / (0.05 * steps), 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def train_autoencoder(vae: AutoencoderKL, images, config: Config) -> None:
    """Train `vae` in place on public images, uint8 [N, H, W, C]."""
    # A run this short needs a second moment that forgets faster than Adam's usual 0.999 does.
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.vae_lr, betas=(0.9, 0.99), fused=True)
    device, size = config.torch_device, config.vae_crop or images.shape[1]
    progress = trange(config.vae_steps, desc="autoencoder")
    for step in progress:
        chosen = torch.randint(len(images), (share(config.vae_batch),)).numpy()
        corners = torch.zeros(2, len(chosen), dtype=torch.long)
        if config.vae_crop:
            corners = torch.randint(images.shape[1] - size + 1, corners.shape)
        squares = [images[k, y:y + size, x:x + size] for k, y, x in zip(chosen, *corners.tolist(), strict=True)]
        loss = vae.loss(to_pixels(np.stack(squares), device), config.kl_weight)
        optimizer.param_groups[0]["lr"] = config.vae_lr * lr_at(step, config.vae_steps)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(vae.parameters())
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def encode_all(model: LatentDiffusion, images, device: torch.device) -> torch.Tensor:
    """Scaled latents z_0 [N, C, h, w] of all images, kept in memory for the whole training."""
    batch = images_at_once(images.shape[1])
    starts = trange(0, len(images), batch, desc="encoding images", disable=len(images) < 8 * batch)
    return torch.cat([model.encode(to_pixels(images[i:i + batch], device)) for i in starts])


def train_diffusion(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor, config: Config) -> None:
    """Train U-Net and embedder on public latents, in place; the model ends with the averaged weights."""
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("vae.")}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.public_lr, fused=True)
    ema = EMA(parameters, config.ema_decay)
    rng = np.random.default_rng(config.seed + rank_and_world()[0])
    model.bf16 = config.bf16
    progress = trange(config.public_steps, desc="public diffusion")
    for step in progress:
        chosen = torch.randint(len(z_0), (share(config.public_batch),), device=z_0.device)
        batch = noise_draws(model, z_0[chosen], labels[chosen], 1, config.label_dropout, rng)
        loss = model(*(x.squeeze(1) for x in batch)).mean()
        optimizer.param_groups[0]["lr"] = config.public_lr * lr_at(step, config.public_steps)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters.values())
        optimizer.step()
        ema.update(parameters)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.load_state_dict(ema.shadow, strict=False)


def run_public(config: Config, target: Path) -> None:
    """The public stage: autoencoder, latent scale, diffusion model; writes `target` and a grid of samples."""
    if config.codebook and not config.init:
        raise ValueError("a VQ autoencoder is not trained here: give --init FILE, official weights, or --codebook 0")
    dataset = config.load_data(config.public_data)
    device = config.torch_device
    torch.manual_seed(config.seed)
    model = LatentDiffusion(config.architecture(len(dataset.classes))).to(device)
    if rank := rank_and_world()[0]:   # the same model everywhere, but other batches
        torch.manual_seed(config.seed + rank)
    print(f"public stage: {len(dataset.images):,} images of {config.public_data}; autoencoder "
          f"{count(model.vae.parameters()):,} parameters, U-Net {count(model.unet.parameters()):,}")
    target.parent.mkdir(parents=True, exist_ok=True)   # complains now rather than after training
    saved = target.with_name("autoencoder.pt")   # lets a stopped public stage go on after its slower half
    if config.init:
        model = load_official(config.init, model.architecture)[0]
        model = replace_embedder(model, None, len(dataset.classes)).to(device)
    elif saved.exists() and not config.overwrite:
        print(f"taking the autoencoder from {saved}")
        earlier, facts = load_checkpoint(saved, "autoencoder")
        wanted = model.architecture["vae"], config.public_data
        if (earlier.architecture["vae"], facts["config"]["public_data"]) != wanted:
            raise ValueError(f"{saved} has another architecture or other data: give --overwrite or another --out")
        model.vae = earlier.vae.to(device)
    else:
        train_autoencoder(model.vae, dataset.images, config)
        save_checkpoint(saved, model, classes=dataset.classes, config=dataclasses.asdict(config), part="autoencoder")
    z_0 = encode_all(model, dataset.images, device)
    if not config.init:   # the scale is still 1 here
        model.latent_scale.copy_(1.0 / z_0.std())
        z_0 *= model.latent_scale
    train_diffusion(model, z_0, config.conditions(dataset).to(device), config)
    refuse_divergence(model, "--public-lr or --vae-lr")
    if config.has_captions:
        model.embedder.start_unseen(dataset.captions, data.LOOKALIKES)
    save_checkpoint(target, model, classes=dataset.classes, config=dataclasses.asdict(config))
    names = list(dict.fromkeys(dataset.captions))[:10] if config.has_captions else dataset.classes
    save_samples(model, names, config, target, title="public only")
    if dist.is_initialized():
        dist.barrier()   # for a private stage that reads what the first process has just written


def share(batch: int) -> int:
    """This process's part of a public batch."""
    return -(-batch // rank_and_world()[1])


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients by their means over all processes."""
    gradients, world = [p.grad for p in parameters], rank_and_world()[1]
    sum_over_processes(gradients)
    if world > 1:
        torch._foreach_div_(gradients, world)


# ---- private stage ---------------------------------------------------------------------------------

def restore(state: dict, parameters: Tensors, optimizer: torch.optim.Optimizer, ema: EMA) -> None:
    """Put everything back as train_private kept it."""
    for name, p in parameters.items():
        p.copy_(state["parameters"][name])
        ema.shadow[name].copy_(state["ema"][name])
    optimizer.load_state_dict(state["optimizer"])
    ema.step = state["steps"]


def train_private(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor, names: list[str],
                  plan: PrivacyPlan, config: Config, state: dict | None = None,
                  keep: Callable[[dict], None] = lambda state: None) -> None:
    """DP-SGD on the parameters `names`, in place; the model ends with the averaged weights.

    Every save_every steps `keep(state)` is called; a later call with that state goes on from there.
    KeyboardInterrupt after Ctrl-C, once the running step is done and kept.
    """
    model.requires_grad_(False)
    model.embedder.rescale(config.embedder_scale)
    model.bf16 = config.bf16
    parameters = {name: model.get_parameter(name).clone() for name in names}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.private_lr, fused=True)
    ema = EMA(parameters, config.ema_decay)
    if state:
        restore(state, parameters, optimizer, ema)
    rng = secure_generator(config.insecure_noise_seed + ema.step if config.insecure_noise_seed >= 0 else None)

    def example_loss(parameters, *draws):   # the K noise draws of one example -> mean loss
        return functional_call(model, parameters, draws).mean()

    loss = model if config.engine == "ghost" else example_loss
    chunk = int(config.chunk) if config.chunk != "auto" else dp_sgd.largest_chunk(
        loss, parameters, made_up_example(model, z_0, labels, config.noise_draws), most=plan.expected_batch)
    progress = trange(ema.step, plan.steps, initial=ema.step, total=plan.steps, desc=f"private, eps={config.eps:g}")
    with stop_after_step() as stop:
        for step in progress:
            stop_now = anywhere(bool(stop))
            if step % config.save_every == 0 or stop_now:
                model.load_state_dict(ema.shadow, strict=False)
                keep(dict(steps=step, parameters=parameters, ema=ema.shadow, optimizer=optimizer.state_dict()))
            if stop_now:
                raise KeyboardInterrupt(f"stopped after {step} of {plan.steps} steps: the same command with --resume "
                                        "goes on from here")
            chosen = poisson_sample(plan, rng).to(z_0.device)
            batch = noise_draws(model, z_0[chosen], labels[chosen], config.noise_draws, config.label_dropout, rng,
                                config.private_timesteps)
            gradient = noisy_gradient(loss, parameters, batch, plan, chunk, rng)
            for name, p in parameters.items():
                p.grad = gradient[name]
            optimizer.param_groups[0]["lr"] = config.private_lr * lr_at(step, plan.steps)
            optimizer.step()
            ema.update(parameters)
            if config.show_private_loss and len(chosen):
                some = functional_call(model, parameters, tuple(x[:chunk].flatten(0, 1) for x in batch))
                progress.set_postfix(not_private_loss=f"{some.mean().item():.3f}")
    model.load_state_dict(ema.shadow, strict=False)
    refuse_divergence(model, "--private-lr")   # of weights that are private already


def refuse_divergence(model: LatentDiffusion, flags: str) -> None:
    """ValueError if a weight is not finite."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"training has diverged, nothing is saved: give a lower {flags}")


def made_up_example(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor,
                    K: int) -> tuple[torch.Tensor, ...]:
    """Draws, as of noise_draws, of an example that has only the shape in common with the private ones."""
    example = torch.zeros_like(z_0[:1]), torch.zeros_like(labels[:1])
    return noise_draws(model, *example, K, 0.0, np.random.default_rng())


def anywhere(asked: bool) -> bool:
    """Whether any process was asked to stop: they have to do it after the same step."""
    flag = torch.tensor([float(asked)])
    sum_over_processes([flag])
    return flag.item() > 0


# What a private run goes on from: model, plan, ledger of earlier runs, configuration of the public model, state.
Start = tuple[LatentDiffusion, PrivacyPlan, list[dict], dict, dict | None]


def interrupted_run(config: Config, path: Path, num_examples: int, classes: list[str]) -> Start:
    """Where the interrupted run in `path` stands. ValueError if these flags or data would change its course."""
    model, facts = load_checkpoint(path)
    free = ("resume", "overwrite", "data_dir", "device", "engine", "chunk", "save_every", "show_private_loss",
            "prompts", "sample_steps", "eta", "order", "guidance")
    for name, value in dataclasses.asdict(config).items():
        planned = facts["config"].get(name, getattr(Config, name))   # a flag newer than the run: as it was then
        if name not in free and planned != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{path} was planned and begun with {flag} {planned}, not {value}: "
                             "go on with that, or give --overwrite to start anew")
    if (facts["plan"]["num_examples"], facts["classes"]) != (num_examples, classes):
        raise ValueError(f"{path} was begun with {facts['plan']['num_examples']} examples of {facts['classes']}, not "
                         f"{num_examples} of {classes}: the data have changed")
    print(f"going on with {path} after {facts['training']['steps']} steps")
    return model, PrivacyPlan(**facts["plan"]), facts["ledger"][:-1], facts["public_config"], facts["training"]


def new_run(config: Config, public: Path, num_examples: int, classes: list[str]) -> Start:
    """A run from --init or the checkpoint `public`, with embeddings for the private classes; trained if missing."""
    if not public.exists() and config.public_checkpoint:
        raise ValueError(f"--public-checkpoint {public} does not exist")
    if public.exists() and config.init:
        raise ValueError(f"there are two public models, {public} and --init: leave out --init or give another --out")
    model, facts = load_checkpoint(public) if public.exists() else (None, {})
    earlier = facts.get("ledger", [])
    plan = make_plan(num_examples, config.expected_batch, config.epochs, config.max_grad_norm, config.eps,
                     config.delta, config.accountant, earlier)   # a budget that cannot be met is refused by now
    if config.init:
        model, facts = load_official(config.init, config.architecture(len(classes)))
    elif model is None:
        with torch.device("meta"):   # complains of the names now rather than after that stage
            private_parameter_names(LatentDiffusion(config.architecture(len(classes))), config.attention_blocks,
                                    config.context_tokens, config.train)
        print(f"there is no public model at {public} yet: running the public stage first")
        run_public(config, public)
        model, facts = load_checkpoint(public)
    public_config = facts.get("public_config", facts["config"])
    if data.same_source(public_config["public_data"], config.private_data):
        raise ValueError(f"{public} was trained on {config.private_data} without privacy")
    wanted = config.architecture(model.architecture["num_classes"])
    if "lora_rank" in model.architecture["unet"]:   # an earlier private run added it
        wanted["unet"]["lora_rank"] = model.architecture["unet"]["lora_rank"]
    if model.architecture != wanted:
        raise ValueError(f"{public} has another architecture than the flags ask for: "
                         "give the flags it was trained with, or another --out")
    model = replace_embedder(model, data.starting_classes(classes, facts["classes"]), len(classes))
    if config.train == "lora":
        model = with_lora(model, config.lora_rank, config.seed)
    return model, plan, earlier, public_config, None


def run_private(config: Config, public: Path, target: Path) -> None:
    """The private stage: fine-tune the model of checkpoint `public`; writes `target` and a grid of samples."""
    dataset = config.load_data(config.private_data)
    unfinished = target.with_suffix(".unfinished.pt")
    begin, path = (interrupted_run, unfinished) if config.resume and unfinished.exists() else (new_run, public)
    model, plan, earlier, public_config, state = begin(config, path, len(dataset.images), dataset.classes)
    epsilon = dp_sgd.refuse_overspending(earlier, plan, config.eps, config.accountant)
    model.to(config.torch_device)
    names = private_parameter_names(model, config.attention_blocks, config.context_tokens, config.train)
    if config.engine == "ghost":
        dp_sgd.ghost_layers(model, names)   # complains now rather than after the announcement
    announce(model, names, plan, epsilon, earlier, config, public_config["public_data"])

    def facts_after(steps: int) -> dict:
        ledger = [*earlier, dp_sgd.ledger_entry(plan, steps, config.insecure_noise_seed)]
        return dict(classes=dataset.classes, config=dataclasses.asdict(config), public_config=public_config,
                    plan=dataclasses.asdict(plan), ledger=ledger)

    def keep(state: dict) -> None:
        save_private(unfinished, model, **facts_after(state["steps"]), training=state)

    z_0 = encode_all(model, dataset.images, config.torch_device)
    train_private(model, z_0, config.conditions(dataset).to(config.torch_device), names, plan, config, state, keep)
    save_private(target, model, **facts_after(plan.steps))
    if rank_and_world()[0] == 0:   # the one that has written `target`
        for leftover in (unfinished, dp_sgd.privacy_json(unfinished)):
            leftover.unlink(missing_ok=True)
    epsilons = dp_sgd.all_epsilons(facts_after(plan.steps)["ledger"], plan.delta)
    spent = ", ".join(f"{epsilon:.4f} ({rule.upper()})" for rule, epsilon in epsilons.items())
    print(f"spent epsilon = {spent} at delta = {plan.delta:g}: see {dp_sgd.privacy_json(target)}")
    # The private captions are as private as the images: no grid shows them.
    save_samples(model, list(config.prompts) if config.has_captions else dataset.classes, config, target,
                 title=f"eps = {config.eps:g}")


def save_private(path: Path, model: LatentDiffusion, ledger: list[dict], plan: dict, **facts) -> None:
    """Write a checkpoint and its privacy.json; the latter just before the former takes its place, so that no checkpoint
    is without one, nor with another's where the disk is full."""
    save_checkpoint(path, model, lambda: dp_sgd.write_privacy_json(path, ledger, plan["delta"]), ledger=ledger,
                    plan=plan, **facts)


def announce(model: LatentDiffusion, names: list[str], plan: PrivacyPlan, epsilon: float, earlier: list[dict],
             config: Config, public_data: str) -> None:
    """Say, before the first step, what the private stage will do and spend."""
    trained = count(map(model.get_parameter, names))
    total = count(model.unet.parameters()) + count(model.embedder.parameters())
    print(f"private stage: N = {plan.num_examples:,}, sample rate {plan.sample_rate:.5f}, {plan.steps:,} steps, "
          f"sigma = {plan.noise_multiplier:.4f}, C = {plan.max_grad_norm:g}\n"
          f"spends epsilon = {epsilon:.4f} at delta = {plan.delta:g} ({config.accountant.upper()}); "
          f"trains {trained:,} of {total:,} parameters ({trained / total:.1%}) of a model that knows {public_data}")
    if earlier:
        print(f"of that epsilon, {dp_sgd.spent_epsilon(earlier, plan.delta, config.accountant):.4f} was spent before")
    if plan.delta >= 1 / plan.num_examples:
        print(f"WARNING: delta is not below 1/N = {1 / plan.num_examples:.1e}: it allows to publish single examples")
    if config.insecure_noise_seed >= 0 or dp_sgd.is_seeded(earlier):
        print("WARNING: --insecure-noise-seed: THIS RUN IS NOT PRIVATE. Whoever knows the seed can subtract the noise.")
    if config.show_private_loss:
        print("WARNING: the loss shown below is computed from private data without noise. Do not publish it.")


# ---- command line ----------------------------------------------------------------------------------

def save_samples(model: LatentDiffusion, names: list[str], config: Config, target: Path, title: str) -> None:
    """Write, beside the checkpoint `target`, a PNG with samples of up to ten classes or captions."""
    if not names:
        print(f"wrote {target}; python sample.py {target} --prompt TEXT --grid FILE shows samples")
        return
    model.eval()
    rows, columns = min(10, len(names)), 10
    labels = model.conditions(names)[:rows].repeat_interleave(columns, dim=0).to(config.torch_device)
    generator = torch.Generator().manual_seed(config.seed)
    images = model.generate(labels, config.sample_steps, config.eta, config.guidance, generator, config.order)
    picture = target.with_suffix(".png")
    data.save_grid(picture, [(title, images.cpu().numpy().reshape(rows, columns, *images.shape[1:]), names[:rows])])
    print(f"wrote {target} and {picture}")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of torchrun, if there are any; all but the first are silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()   # gloo for tensors on a CPU, nccl on GPUs
    with ExitStack() as stack:
        # Last of all, time for gloo's threads to end: where they share a core, an exit before that aborts the process.
        stack.callback(time.sleep, 0.5)
        stack.callback(dist.destroy_process_group)
        if dist.get_rank() > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        yield


def main(argv: list[str] | None = None) -> None:
    config = parse_args(argv, __doc__)
    if config.describe:
        print(describe(config))
        return
    with process_group():
        run(config)


def run(config: Config) -> None:
    """The stage that the flags ask for, unless its files forbid it."""
    public = Path(config.public_checkpoint or config.folder / "public.pt")
    target = public if config.stage == "public" else config.folder / f"private-eps{config.eps:g}.pt"
    unfinished = target.with_suffix(".unfinished.pt")
    if target.exists() and config.resume and config.stage == "private":
        print(f"{target} is complete: there is nothing to resume")
        return
    if unfinished.exists() and not (config.resume or config.overwrite):
        raise ValueError(f"{unfinished} is an interrupted run: give --resume to go on, or --overwrite to start anew")
    if target.exists() and not config.overwrite:
        raise ValueError(f"{target} exists: give --overwrite to replace it, or another --out")
    if target.suffix != ".pt":   # the picture beside it, or its ledger, would take its name
        raise ValueError(f"--public-checkpoint {target} must end in .pt")
    if config.torch_device.type == "cuda":   # TF32, as convolutions have it there; dp_sgd.full_precision is stricter
        torch.set_float32_matmul_precision("high")
    if config.stage == "public":
        run_public(config, target)
    else:
        run_private(config, public, target)


if __name__ == "__main__":
    with one_line_errors():
        main()
