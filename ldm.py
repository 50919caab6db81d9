"""Latent diffusion: noise schedule, training loss, DDIM sampling, embedders of classes and captions, checkpoints.

Symbols as in Ho et al. 2020 and Song et al. 2021: alphas_cumprod[t] is the signal power left at step t,
    z_t = sqrt(alphas_cumprod[t]) z_0 + sqrt(1 - alphas_cumprod[t]) eps,   eps ~ N(0, I),
and the network predicts eps from z_t. Latents are scaled to unit variance by `latent_scale`.
"""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import atomic_write
from unet import CrossAttention, FeedForward, UNet
from vae import AutoencoderKL, AutoencoderVQ, DiagonalGaussian, images_at_once


def make_alphas_cumprod(linear_start: float, linear_end: float, timesteps: int = 1000) -> torch.Tensor:
    """prod_{s<=t} (1 - beta_s), float64 [timesteps], for LDM's "linear" schedule: linear in sqrt(beta)."""
    betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas))


def q_sample(alphas_cumprod: torch.Tensor, z_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """z_t ~ q(z_t | z_0) (Ho et al. 2020, eq. 4): z_0 and eps [B, C, h, w], t int [B] -> [B, C, h, w]."""
    a = alphas_cumprod[t][:, None, None, None]
    return a.sqrt() * z_0 + (1.0 - a).sqrt() * eps


class ClassEmbedder(nn.Module):
    """Class labels int [B] -> one context token each [B, 1, dim]. Row `num_classes` is the null class."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.null_class = num_classes
        self.embedding = nn.Embedding(num_classes + 1, dim)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.scale * self.embedding(labels)[:, None, :]

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """Embed as before, by weights in units of 1/scale, so that their gradient is `scale` times the token's.

        On public data the embedder's gradient is some 50 times smaller than that of the attention modules, so
        under one joint norm the noise would drown it, and with it the classes. Such a fixed change of variables,
        made before any gradient is clipped, costs no privacy.
        """
        self.embedding.weight.mul_(self.scale / scale)
        self.scale.fill_(scale)


PADDING = 256   # the token after a caption's last byte


def tokenise(captions: list[str], length: int) -> torch.Tensor:
    """UTF-8 bytes of each caption, cut off or padded to `length`: int [N, length]. ValueError if one is no text."""
    tokens = torch.full((len(captions), length), PADDING)
    for i, caption in enumerate(captions):
        try:
            content = caption.encode()[:length]
        except UnicodeEncodeError as error:   # half a surrogate pair, or bytes of a command line
            raise ValueError(f"caption number {i + 1} is not valid UTF-8 text") from error
        tokens[i, :len(content)] = torch.tensor(list(content), dtype=torch.long)
    return tokens


def check_prompts(prompts: Iterable[str], length: int) -> None:
    """ValueError naming the first prompt that a model of captions of `length` bytes would not see as it is."""
    for prompt in prompts:
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {prompt!a} is not UTF-8") from error
        if not prompt.strip() or size > length:
            raise ValueError(f"the prompt {prompt!r} has {size} bytes: give from 1 to {length}, and not only blanks")


class TextBlock(nn.Module):
    """Self-attention and feed-forward, each with a pre-norm and a residual connection: [B, L, dim] -> the same."""

    def __init__(self, dim: int):
        super().__init__()
        heads = max(1, dim // 32)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.ff = CrossAttention(dim, dim, heads, dim // heads), FeedForward(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class TextEmbedder(nn.Module):
    """Captions int [B, L] as of `tokenise` -> context [B, L, dim], by a transformer (Rombach et al. 2022, section 3.3).

    As in LDM's BERTEmbedder, padding is a token like others, that attention does not skip. The null condition is the
    empty caption: nothing but padding.
    """
    null_class = PADDING

    def __init__(self, dim: int, length: int, layers: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(PADDING + 1, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(TextBlock(dim) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
        return self.norm(self.blocks(self.scale * self.tokens(tokens) + self.positions(places)))

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """The same for the table of tokens as ClassEmbedder.rescale for classes; the transformer's units stay.

        Layer normalisation makes the gradients of its layers depend little on the scale of what goes in.
        """
        self.tokens.weight.mul_(self.scale / scale)
        self.scale.fill_(scale)

    @torch.no_grad()
    def start_unseen(self, captions: list[str], lookalikes: dict[str, str]) -> None:
        """Characters in no public caption start as those that look like them, {character: character}, if one has them.

        Only public captions and public knowledge enter here.
        """
        seen = set("".join(captions))
        for character, alike in lookalikes.items():
            if character not in seen and alike in seen:
                self.tokens.weight[ord(character)] = self.tokens.weight[ord(alike)]


class NoEmbedder(nn.Module):
    """In the embedder's place where the U-Net is unconditional: labels make no difference, there is no context."""
    null_class = 0

    def forward(self, labels: torch.Tensor) -> None:
        return None

    def rescale(self, scale: float) -> None:
        """Nothing to rescale."""


class LatentDiffusion(nn.Module):
    """The whole model: `vae`, `unet`, `embedder`, the noise schedule and the latent scale.

    `architecture` (plain numbers, stored in checkpoints) has the keys vae and unet (the arguments of
    AutoencoderKL, or with n_embed AutoencoderVQ, and UNet), num_classes, linear_start and linear_end. A model of
    captions has also text (length and layers of TextEmbedder), and num_classes says nothing.
    """

    bf16 = False   # compute U-Net and embedder in bfloat16 (weights and gradients stay float32)

    def __init__(self, architecture: dict):
        super().__init__()
        self.architecture = architecture
        self.vae = (AutoencoderVQ if "n_embed" in architecture["vae"] else AutoencoderKL)(**architecture["vae"])
        self.unet = UNet(**architecture["unet"])
        context_dim = architecture["unet"]["context_dim"]
        if context_dim is None:
            self.embedder = NoEmbedder()
        elif "text" in architecture:
            self.embedder = TextEmbedder(context_dim, **architecture["text"])
        else:
            self.embedder = ClassEmbedder(architecture["num_classes"], context_dim)
        alphas_cumprod = make_alphas_cumprod(architecture["linear_start"], architecture["linear_end"])
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.register_buffer("latent_scale", torch.tensor(1.0))

    def conditions(self, names: list[str]) -> torch.Tensor:
        """For the model, what its classes are called (all of them, in order), int [N], or captions, int [N, L]."""
        if isinstance(self.embedder, TextEmbedder):
            return tokenise(names, self.architecture["text"]["length"])
        return torch.arange(len(names))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, channels, H, W] in [-1, 1] -> scaled latents z_0 [B, C, h, w]: the mean of each one's posterior.

        The official code takes a sample. But what the KL term has emptied of an image has variance 1 there, noise that
        would be part of the gradient of every example, and that DP-SGD would clip along with the rest.
        """
        return DiagonalGaussian(self.vae.encode(x)).mean * self.latent_scale

    def decode(self, z_0: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, C, h, w] -> images uint8 [B, H, W, channels]."""
        parts = (z_0 / self.latent_scale).split(images_at_once(self.architecture["vae"]["resolution"]))
        images = torch.cat([self.vae.decode(part) for part in parts])
        return ((images + 1.0) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def forward(self, z_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Each example's loss mean((eps_hat(z_t, t, condition) - eps)^2) [B] (Ho et al. 2020, eq. 14).

        z_0 and eps [B, C, h, w], t int [B], condition: labels int [B] or captions int [B, L]. No state, no randomness:
        torch.func.functional_call(model, parameters, (z_0, t, eps, condition)) is the pure function
        that per-example gradients need.
        """
        z_t = q_sample(self.alphas_cumprod, z_0, t, eps)
        with torch.autocast(z_0.device.type, torch.bfloat16, enabled=self.bf16):
            context = self.embedder(condition)
        eps_hat = self.predict_eps(z_t, t, context)
        return (eps_hat - eps).square().flatten(1).mean(dim=1)

    def predict_eps(self, z_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The noise in z_t [B, C, h, w], as the U-Net sees it."""
        with torch.autocast(z_t.device.type, torch.bfloat16, enabled=self.bf16):
            return self.unet(z_t, t, context).to(z_t.dtype)

    @torch.inference_mode()
    def generate(self, labels: torch.Tensor, steps: int, eta: float = 0.0, guidance: float = 1.0,
                 generator: torch.Generator | None = None, order: int = 1) -> torch.Tensor:
        """Images uint8 [B, H, W, channels] of the classes `labels` int [B], or captions int [B, L], by `ddim_sample`.

        guidance w moves the prediction from the null class (or caption) towards the wanted one (Ho and Salimans 2022):
        eps_null + w (eps_class - eps_null); 1 is none and costs one network evaluation a step, not two. An
        unconditional model has nothing to move away from: guidance is 1.
        """
        size = self.architecture["vae"]["resolution"] // 2 ** (len(self.architecture["vae"]["ch_mult"]) - 1)
        shape = (len(labels), self.architecture["unet"]["in_channels"], size, size)
        context = self.embedder(labels)
        null_context = self.embedder(torch.full_like(labels, self.embedder.null_class))

        def noise():
            return torch.randn(shape, generator=generator).to(labels.device)

        def guided_eps(z_t, t):
            eps_hat = self.predict_eps(z_t, t, context)
            if guidance == 1.0 or context is None:
                return eps_hat
            eps_null = self.predict_eps(z_t, t, null_context)
            return eps_null + guidance * (eps_hat - eps_null)

        z_0 = ddim_sample(guided_eps, self.alphas_cumprod, noise(), steps, eta, noise, order)
        return self.decode(z_0)


def noise_draws(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor, K: int, label_dropout: float,
                rng: np.random.Generator, favoured: tuple[int, int] | None = None) -> tuple[torch.Tensor, ...]:
    """K random draws for each of B examples, z_0 [B, C, h, w] and labels int [B] or, of captions, [B, L].

    Returns what the loss takes, z_0, t, eps and condition, each [B, K, ...].

    Time steps are uniform; with `favoured` (low, high) nine of ten are from low to high - 1, after Ghalebikesabi et al.
    2023, section 3 (arXiv 2302.13861): steps that are almost free of noise, or nothing but noise, teach little.
    The range is public: it must not be chosen by private data. An example's K steps are one of each K-th of that
    distribution (stratified sampling): their mean gradient varies less than that of K independent ones.

    The draws of different examples are independent, so that one more example in a batch leaves the others' gradients
    as they were. In the private stage rng must be a secret one: the draws go by place in the batch, so that for whoever
    knew them one example more would shift those of all that follow it.
    """
    B, T, device = len(z_0), len(model.alphas_cumprod), z_0.device
    eps = torch.from_numpy(rng.standard_normal((B, K, *z_0.shape[1:]), dtype=np.float32)).to(device)
    u = (np.arange(K) + rng.random((B, K))) / K
    low, high = favoured or (0, T)
    edges = np.array([0, low, high, T])
    cdf = 0.1 * edges / T + 0.9 * np.array([0, 0, 1, 1])
    t = torch.from_numpy(np.interp(u, cdf, edges).astype(int).clip(max=T - 1)).to(device)
    dropped = torch.from_numpy(rng.random((B, K)) < label_dropout).to(device)
    condition = labels[:, None].expand(B, K, *labels.shape[1:])
    condition = condition.masked_fill(dropped.view(B, K, *[1] * (labels.dim() - 1)), model.embedder.null_class)
    return z_0[:, None].expand_as(eps), t, eps, condition


def ddim_timesteps(steps: int, total: int = 1000) -> list[int]:
    """The `steps` increasing time steps that DDIM visits, for any 1 <= steps <= total (else ValueError).

    Equal to the official 1, 1+total/steps, ... where steps divides total. Elsewhere the official code
    returns another number of steps than asked for, or runs past the last one. The first step visited is
    about total - total/steps, so fewer than ten start from noise that the network takes for half an image.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"sampling steps must be from 1 to {total}, not {steps}")
    offset = 1 if steps < total else 0
    return [i * total // steps + offset for i in range(steps)]


def check_sampling(steps: int, eta: float, order: int) -> None:
    """ValueError if ddim_sample cannot do that."""
    ddim_timesteps(steps)
    if not 0 <= eta <= 1 or order not in (1, 2):
        raise ValueError(f"--eta must be from 0 to 1 and --order 1 or 2, not {eta:g} and {order}")
    if order == 2 and eta > 0:
        raise ValueError(f"--order 2 is deterministic: give --eta 0, not {eta:g}, or --order 1")


def ddim_sample(predict_eps: Callable, alphas_cumprod: torch.Tensor, z_T: torch.Tensor, steps: int,
                eta: float = 0.0, noise: Callable | None = None, order: int = 1) -> torch.Tensor:
    """z_0 from z_T [B, C, h, w] by DDIM (Song et al. 2021, eq. 12 and 16).

    predict_eps(z_t, t int [B]) is the network; eta 0 is deterministic, 1 has DDPM's noise, for which
    `noise()` returns [B, C, h, w] standard normal numbers. order 2 (with eta 0) is DPM-Solver++ 2M (Lu et al.
    2022, arXiv 2211.01095, algorithm 2): the same step, towards the z_0 that the last two predictions
    extrapolate to, linearly in half the log SNR, lambda.
    """
    timesteps = ddim_timesteps(steps, len(alphas_cumprod))
    half_log_snr = 0.5 * (alphas_cumprod.log() - (1 - alphas_cumprod).log())
    z_t, z_0_before, h_before = z_T, None, None
    for i in reversed(range(steps)):
        t, t_prev = timesteps[i], timesteps[i - 1] if i > 0 else 0
        # As in the official code, the last step ends at the noise level of step 0, not at zero.
        a_t, a_prev, h = alphas_cumprod[t], alphas_cumprod[t_prev], half_log_snr[t_prev] - half_log_snr[t]
        sigma_t = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
        eps_hat = predict_eps(z_t, torch.full((len(z_t),), t, device=z_t.device))
        z_0 = predicted = (z_t - (1 - a_t).sqrt() * eps_hat) / a_t.sqrt()
        if order == 2 and z_0_before is not None and i > 1:   # the last step but one is long: no extrapolation
            z_0 = z_0 + h / (2 * h_before) * (z_0 - z_0_before)
            eps_hat = (z_t - a_t.sqrt() * z_0) / (1 - a_t).sqrt()
        z_t = a_prev.sqrt() * z_0 + (1 - a_prev - sigma_t**2).sqrt() * eps_hat
        if eta > 0:
            z_t = z_t + sigma_t * noise()
        z_0_before, h_before = predicted, h
    return z_t


class EMA:
    """Exponential moving average of some parameters, counted in optimiser steps.

    Early steps use the smaller decay (1 + step) / (10 + step), so that a short run forgets its start.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float):
        self.decay, self.step = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.Tensor]) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[n].detach() for n in self.shadow], 1.0 - decay)


def replace_embedder(model: LatentDiffusion, init_from: list[int] | None, num_classes: int) -> LatentDiffusion:
    """A copy of `model` for other classes: new class k starts as public class init_from[k].

    Without `init_from` every class starts as the mean of the public ones. The null class is kept.
    Only public weights and public knowledge (the names of the classes) enter here. Models without classes keep what
    they have: captions are all made of the same bytes.
    """
    new = copy.deepcopy(model)
    new.architecture = {**model.architecture, "num_classes": num_classes}
    if not isinstance(model.embedder, ClassEmbedder):
        return new
    old = model.embedder.scale * model.embedder.embedding.weight.detach()
    rows = old[init_from] if init_from is not None else old[:-1].mean(0).expand(num_classes, -1)
    new.embedder = ClassEmbedder(num_classes, old.shape[1]).to(old.device)
    new.embedder.embedding.weight.data.copy_(torch.cat([rows, old[-1:]]))
    return new


def with_lora(model: LatentDiffusion, rank: int, seed: int) -> LatentDiffusion:
    """A copy of `model`, whose outputs are the same, with LoRA of this rank in its attention.

    What LoRA's weights start from follows from the seed: public, and the same in all processes of a run.
    """
    if model.architecture["unet"].get("lora_rank") == rank:   # it was fine-tuned so before
        return model
    torch.manual_seed(seed)
    new = LatentDiffusion({**model.architecture, "unet": {**model.architecture["unet"], "lora_rank": rank}})
    new.load_state_dict(model.state_dict(), strict=False)
    return new.eval()


def save_checkpoint(path: Path, model: LatentDiffusion, before: Callable[[], None] = lambda: None, **facts) -> None:
    """Write model and facts (plain values) atomically; load_checkpoint reads them. `before` is atomic_write's."""
    with atomic_write(path, before) as file:
        torch.save({"architecture": model.architecture, "model": model.state_dict(), **facts}, file)


def load_checkpoint(path: Path, part: str = "") -> tuple[LatentDiffusion, dict]:
    """The model in `path` and all that is stored beside it. ValueError if it is no such checkpoint.

    part: "autoencoder" for one of which only that is trained, which is refused otherwise.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist; train it first with train.py")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = LatentDiffusion(content["architecture"])
        model.load_state_dict(content["model"])
        if missing := {"classes", "config"} - content.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except Exception as error:   # damaged bytes can fail anywhere in torch's reader
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(f"checkpoint {path} is damaged or of another program ({reason})") from error
    if content.get("part", part) != part:
        raise ValueError(f"{path} holds a trained {content['part']} only: give the public.pt beside it")
    if "privacy" in content:   # taking it for a public one would forget what it has spent
        raise ValueError(f"private checkpoint {path} has no ledger (an earlier version wrote it): train it again")
    return model.eval(), content
