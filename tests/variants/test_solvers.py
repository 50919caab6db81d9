"""DPM-Solver++ 2M: algorithm 2 by hand, and fewer steps than DDIM on an exact solution."""

from collections.abc import Callable

import pytest
import torch

from ldm import ddim_sample, ddim_timesteps, make_alphas_cumprod
from tiny import tiny_model
from variants.solvers import dpm_solver_2m

ALPHAS_CUMPROD = make_alphas_cumprod(0.0015, 0.0195)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def error(solver: Callable, z_T: torch.Tensor, steps: int) -> float:
    """Mean error for the data N(0.7, 1).

    Along the exact flow (z_t - mean_t) / std_t is constant.
    """
    def predict_eps(z_t, t):
        a = ALPHAS_CUMPROD[t][:, None, None, None]
        return (1 - a).sqrt() * (z_t - a.sqrt() * 0.7)   # E[eps | z_t]; the variance of z_t is 1

    z = solver(predict_eps, ALPHAS_CUMPROD, z_T, steps)
    first, last = ALPHAS_CUMPROD[ddim_timesteps(steps)[-1]], ALPHAS_CUMPROD[0]
    expected = last.sqrt() * 0.7 + (z_T - first.sqrt() * 0.7)
    return (z - expected).abs().mean().item()


def test_the_second_order_needs_fewer_steps():
    z_T = randn(100, 1, 4, 4)
    ddim = {steps: error(ddim_sample, z_T, steps) for steps in (25, 50, 200)}
    dpm = {steps: error(dpm_solver_2m, z_T, steps) for steps in (12, 25, 200)}
    assert dpm[12] < ddim[25] and dpm[25] < ddim[50] / 1.5
    assert ddim[200] < 0.01 and dpm[200] < 0.001


def test_its_steps_by_hand():
    """As algorithm 2 of Lu et al. 2022 writes them, with a predictor that depends on t only."""
    z_T, (t_2, t_1, t_0) = randn(2, 1, 2, 2), (501, 251, 1)   # of 4 steps the first is 751

    def predicted(t):   # the network's z_0
        return 1.0 + t / 1000

    def predict_eps(z_t, t):
        a = ALPHAS_CUMPROD[t][:, None, None, None]
        z_0 = predicted(t)[:, None, None, None].double()
        return (z_t - a.sqrt() * z_0) / (1 - a).sqrt()

    alpha, sigma = ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()
    lam = (alpha / sigma).log()

    def step(x, s, t, D):
        return sigma[t] / sigma[s] * x - alpha[t] * torch.expm1(lam[s] - lam[t]) * D

    x = step(z_T, 751, t_2, predicted(751))
    r = (lam[t_2] - lam[751]) / (lam[t_1] - lam[t_2])
    x = step(x, t_2, t_1, (1 + 1 / (2 * r)) * predicted(t_2) - 1 / (2 * r) * predicted(751))
    x = step(x, t_1, t_0, predicted(t_1))   # the last two steps do not extrapolate
    x = step(x, t_0, 0, predicted(t_0))
    torch.testing.assert_close(dpm_solver_2m(predict_eps, ALPHAS_CUMPROD, z_T, 4), x)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_are_ddim_s(steps):
    z_T = randn(2, 1, 2, 2)
    ours, expected = (solver(lambda z, t: z.sin(), ALPHAS_CUMPROD, z_T, steps)
                      for solver in (dpm_solver_2m, ddim_sample))
    torch.testing.assert_close(ours, expected)


@torch.inference_mode()
def test_generation_takes_it_as_a_solver():
    model = tiny_model().float().eval()

    def images(solver):
        generator = torch.Generator().manual_seed(0)
        return model.generate(torch.tensor([0, 1, 2]), 5, 0.0, 1.5, generator, solver)

    assert images(dpm_solver_2m).shape == (3, 8, 8, 1)
    assert not torch.equal(images(dpm_solver_2m), images(ddim_sample))


def test_ddpm_noise_is_refused():
    with pytest.raises(ValueError, match="eta must be 0, not 0.5"):
        dpm_solver_2m(lambda z, t: z, ALPHAS_CUMPROD, randn(1, 1, 2, 2), 4, eta=0.5)


@pytest.mark.parametrize("steps", [0, 1001])
def test_numbers_of_steps_that_do_not_exist_are_refused(steps):
    with pytest.raises(ValueError, match="from 1 to 1000"):
        dpm_solver_2m(lambda z, t: z, ALPHAS_CUMPROD, randn(1, 1, 2, 2), steps)
