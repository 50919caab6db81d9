"""Latent diffusion: noise schedule, training loss, guidance, DDIM sampling, class embedder, EMA.

Symbols are those of Ho et al. 2020 and Song et al. 2021. alphas_cumprod[t] is the signal power that
is left at step t:

    z_t = sqrt(alphas_cumprod[t]) z_0 + sqrt(1 - alphas_cumprod[t]) eps,    eps ~ N(0, I),

and the network predicts eps from z_t. Latents z_0 have unit variance: `latent_scale` sees to it.
The loss is a pure function of its arguments, so that dp_sgd.py can differentiate it per example.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vae import DiagonalGaussian

# ---- schedule and loss -------------------------------------------------------------------------

def make_alphas_cumprod(linear_start: float, linear_end: float,
                        timesteps: int = 1000) -> torch.Tensor:
    """prod_{s<=t} (1 - beta_s), float64 [timesteps].

    This is LDM's "linear" schedule, which is linear in sqrt(beta).
    """
    betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas))


def q_sample(alphas_cumprod: torch.Tensor, z_0: torch.Tensor, t: torch.Tensor,
             eps: torch.Tensor) -> torch.Tensor:
    """z_t ~ q(z_t | z_0) (Ho et al. 2020, eq. 4).

    z_0 and eps [B, C, h, w], t int [B] -> [B, C, h, w].
    """
    a = alphas_cumprod[t][:, None, None, None]
    return a.sqrt() * z_0 + (1.0 - a).sqrt() * eps


class LatentDiffusion(nn.Module):
    """Autoencoder, U-Net, embedder, noise schedule and latent scale.

    vae: AutoencoderKL or its like. unet: UNet. embedder: ClassEmbedder or its like.
    linear_start, linear_end: first and last beta of the schedule.
    """

    def __init__(self, vae: nn.Module, unet: nn.Module, embedder: nn.Module,
                 linear_start: float = 0.0015, linear_end: float = 0.0195):
        super().__init__()
        self.vae, self.unet, self.embedder = vae, unet, embedder
        alphas_cumprod = make_alphas_cumprod(linear_start, linear_end)
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.register_buffer("latent_scale", torch.tensor(1.0))

    def forward(self, z_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor,
                condition: torch.Tensor) -> torch.Tensor:
        """Each example's loss mean((eps_hat(z_t, t, c) - eps)^2) [B] (Ho et al. 2020, eq. 14).

        z_0 and eps [B, C, h, w], t int [B], condition: what the embedder takes, int [B, ...].
        """
        z_t = q_sample(self.alphas_cumprod, z_0, t, eps)
        eps_hat = self.unet(z_t, t, self.embedder(condition))
        return (eps_hat - eps).square().flatten(1).mean(dim=1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, channels, H, W] in [-1, 1] -> scaled latents z_0 [B, C, h, w].

        z_0 is the mean of each image's posterior; the official code takes a sample. A channel that
        the KL term has emptied has variance 1 in a sample: noise that every example's gradient
        would contain, and that DP-SGD would clip along with the signal.
        """
        return DiagonalGaussian(self.vae.encode(x)).mean * self.latent_scale

    def decode(self, z_0: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, C, h, w] -> images uint8 [B, H, W, channels]."""
        parts = (z_0 / self.latent_scale).split(images_at_once(self.vae.resolution))
        images = torch.cat([self.vae.decode(part) for part in parts])
        return ((images + 1.0) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    @torch.inference_mode()
    def generate(self, condition: torch.Tensor, steps: int, eta: float = 0.0, guidance: float = 1.0,
                 generator: torch.Generator | None = None,
                 solver: Callable | None = None) -> torch.Tensor:
        """Images uint8 [B, H, W, channels] of the classes or captions `condition`, int [B, ...].

        solver: ddim_sample, unless another function of its signature is given.
        guidance w moves the prediction from the null class towards the wanted one (Ho and Salimans
        2022, eq. 6): eps_null + w (eps_c - eps_null). w = 1 is no guidance and costs one network
        evaluation a step instead of two. An unconditional model knows no guidance.
        """
        shape = (len(condition), *self.vae.latent_shape)
        context = self.embedder(condition)
        null_context = self.embedder(torch.full_like(condition, self.embedder.null_class))

        def noise() -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(condition.device)

        def guided_eps(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            eps_c = self.unet(z_t, t, context)
            if guidance == 1.0 or context is None:
                return eps_c
            eps_null = self.unet(z_t, t, null_context)
            return eps_null + guidance * (eps_c - eps_null)

        solve = solver or ddim_sample
        return self.decode(solve(guided_eps, self.alphas_cumprod, noise(), steps, eta, noise))


class ClassEmbedder(nn.Module):
    """Class labels int [B] -> one context token each [B, 1, dim].

    Row num_classes of the table is the null class.
    """

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.null_class = num_classes
        self.embedding = nn.Embedding(num_classes + 1, dim)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.scale * self.embedding(labels)[:, None, :]

    def conditions(self, names: list[str]) -> torch.Tensor:
        """What `forward` takes for all the classes, which are called `names`: int [N]."""
        return torch.arange(len(names))

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """Embed as before, by weights in units of 1/scale: their gradient is `scale` times larger.

        On public data the embedder's gradient is some 50 times smaller than the attention's. Under
        one joint norm the noise would drown it, and with it the classes. A fixed change of
        variables, made before any gradient is clipped, costs no privacy.
        """
        self.embedding.weight.mul_(self.scale / scale)
        self.scale.fill_(scale)


# ---- random draws ------------------------------------------------------------------------------

def sample_t_and_noise(model: LatentDiffusion, z_0: torch.Tensor, labels: torch.Tensor, K: int,
                       label_dropout: float, rng: np.random.Generator,
                       timestep_range: tuple[int, int] | None = None) -> tuple[torch.Tensor, ...]:
    """K draws of t and eps for each of B examples, z_0 [B, C, h, w] and labels int [B, ...].

    Returns what the loss takes, each [B, K, ...]: z_0, t, eps, condition. K is the noise
    multiplicity (Dockhorn et al. 2022, section 3.2).

    timestep_range (low, high): nine of ten time steps are from low to high - 1, one is any
    (Ghalebikesabi et al. 2023, section 3). Steps with almost no noise, or with nothing else, teach
    little. Private data must not choose the range. An example's K time steps are stratified: one
    from each K-th of the distribution, so that their mean gradient varies less.

    The draws of different examples are independent: one more example leaves the others' gradients
    as they were. In the private stage rng must be secret. Draws go by place in the batch, and
    whoever knew them would see one more example shift all that follow.
    """
    B, T, device = len(z_0), len(model.alphas_cumprod), z_0.device
    eps = rng.standard_normal((B, K, *z_0.shape[1:]), dtype=np.float32)
    u = (np.arange(K) + rng.random((B, K))) / K   # stratified, uniform on [0, 1)
    # t is the inverse at u of a distribution function with two slopes: 0.1/T everywhere, and
    # 0.9/(high - low) more within the range.
    low, high = timestep_range or (0, T)
    edges = np.array([0, low, high, T])
    cdf = 0.1 * edges / T + 0.9 * np.array([0, 0, 1, 1])
    t = np.interp(u, cdf, edges).astype(int).clip(max=T - 1)
    eps, t = torch.from_numpy(eps).to(device), torch.from_numpy(t).to(device)
    condition = labels.repeat_interleave(K, dim=0)
    condition = drop_labels(condition, model.embedder.null_class, label_dropout, rng)
    return z_0[:, None].expand_as(eps), t, eps, condition.unflatten(0, (B, K))


def drop_labels(labels: torch.Tensor, null_class: int, label_dropout: float,
                rng: np.random.Generator) -> torch.Tensor:
    """labels int [B, ...], each replaced by the null class with probability label_dropout.

    Guidance needs a model that knows the null class (Ho and Salimans 2022, algorithm 1).
    """
    dropped = torch.from_numpy(rng.random(len(labels)) < label_dropout).to(labels.device)
    return labels.masked_fill(dropped.view(-1, *[1] * (labels.dim() - 1)), null_class)


# ---- sampling ----------------------------------------------------------------------------------

def ddim_timesteps(steps: int, total: int = 1000) -> list[int]:
    """The `steps` increasing time steps that DDIM visits, 1 <= steps <= total, else ValueError.

    They equal the official 1, 1 + total/steps, ... where steps divides total. Elsewhere the
    official code returns another number of steps, or runs past the last one. The last one is about
    total - total/steps: fewer than ten steps start from noise that the network takes for half an
    image.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"sampling steps must be from 1 to {total}, not {steps}")
    offset = 1 if steps < total else 0
    return [i * total // steps + offset for i in range(steps)]


def ddim_sample(predict_eps: Callable, alphas_cumprod: torch.Tensor, z_T: torch.Tensor, steps: int,
                eta: float = 0.0, noise: Callable | None = None) -> torch.Tensor:
    """z_0 from z_T [B, C, h, w] by DDIM (Song et al. 2021, eq. 12 and 16).

    predict_eps(z_t, t int [B]) is the network. eta 0 is deterministic; eta 1 has DDPM's noise, for
    which noise() returns standard normal numbers [B, C, h, w]. ValueError for steps that do not
    exist.
    """
    timesteps = ddim_timesteps(steps, len(alphas_cumprod))
    z_t = z_T
    # As in the official code, the last step ends at the noise level of step 0, not at zero.
    for t, t_prev in reversed(list(zip(timesteps, [0, *timesteps]))):
        a_t, a_prev = alphas_cumprod[t], alphas_cumprod[t_prev]
        sigma_t = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
        eps_hat = predict_eps(z_t, torch.full((len(z_t),), t, device=z_t.device))
        z_0 = (z_t - (1 - a_t).sqrt() * eps_hat) / a_t.sqrt()
        z_t = a_prev.sqrt() * z_0 + (1 - a_prev - sigma_t**2).sqrt() * eps_hat
        if eta > 0:
            z_t = z_t + sigma_t * noise()
    return z_t


def images_at_once(resolution: int) -> int:
    """How many images to encode or decode together, so that memory is the same at every size."""
    return max(1, 250 * 32**2 // resolution**2)


def normalize_images(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [B, H, W, C] -> float [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


# ---- training ----------------------------------------------------------------------------------

def lr_factor(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over 5% of the steps, then a cosine to zero.

    Loshchilov and Hutter 2017, eq. 5.
    """
    return min((step + 1) / (0.05 * steps), 0.5 * (1.0 + math.cos(math.pi * step / steps)))


class EMA:
    """Exponential moving average of parameters, counted in optimiser steps.

    Early steps use the smaller decay (1 + step) / (10 + step): a short run forgets its start.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float):
        self.decay, self.step = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.Tensor]) -> None:
        self.step += 1
        weight = 1.0 - min(self.decay, (1 + self.step) / (10 + self.step))
        averages, values = list(self.shadow.values()), [parameters[n].detach() for n in self.shadow]
        torch._foreach_lerp_(averages, values, weight)
