"""Faster samplers: drop-ins for ldm.ddim_sample."""

from collections.abc import Callable

import torch

from ldm import ddim_timesteps


def dpm_solver_2m(predict_eps: Callable, alphas_cumprod: torch.Tensor, z_T: torch.Tensor,
                  steps: int, eta: float = 0.0, noise: Callable | None = None) -> torch.Tensor:
    """z_0 from z_T [B, C, h, w] by DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    A step is DDIM's, towards the z_0 that the last two predictions extrapolate to, linearly in half
    the log SNR. It is deterministic: ValueError for eta other than 0. `noise` is never called.
    """
    if eta:
        raise ValueError(f"DPM-Solver++ is deterministic: eta must be 0, not {eta:g}")
    timesteps = ddim_timesteps(steps, len(alphas_cumprod))
    half_log_snr = 0.5 * (alphas_cumprod.log() - (1 - alphas_cumprod).log())
    z_t, z_0_before, h_before = z_T, None, None
    for i in reversed(range(steps)):
        t, t_prev = timesteps[i], timesteps[i - 1] if i > 0 else 0
        a_t, a_prev = alphas_cumprod[t], alphas_cumprod[t_prev]
        h = half_log_snr[t_prev] - half_log_snr[t]
        eps_hat = predict_eps(z_t, torch.full((len(z_t),), t, device=z_t.device))
        z_0 = predicted = (z_t - (1 - a_t).sqrt() * eps_hat) / a_t.sqrt()
        if z_0_before is not None and i > 1:   # the last step but one is long: no extrapolation
            z_0 = z_0 + h / (2 * h_before) * (z_0 - z_0_before)
            eps_hat = (z_t - a_t.sqrt() * z_0) / (1 - a_t).sqrt()
        z_t = a_prev.sqrt() * z_0 + (1 - a_prev).sqrt() * eps_hat
        z_0_before, h_before = predicted, h
    return z_t
