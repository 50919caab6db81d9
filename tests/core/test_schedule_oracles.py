"""Schedule, loss, DDIM, guidance and averages against the official code's numbers.

CompVis/latent-diffusion a506df5. test_ldm.py computes the same functions by hand.
"""

import pytest
import torch
from oracles.official import close, oracle
from torch import nn

from ldm import EMA, LatentDiffusion, ddim_sample, ddim_timesteps, make_alphas_cumprod, q_sample


class LinearPredictor(nn.Module):
    """The noise predictor that the numbers were made with, their `model_formula`."""

    def __init__(self, W: torch.Tensor, b: torch.Tensor, v: torch.Tensor, U: torch.Tensor):
        super().__init__()
        self.W, self.b, self.v, self.U = W, b, v, U

    def forward(self, x, t, context=None):
        per_channel = self.b + t[:, None] / 1000 * self.v
        if context is not None:
            per_channel = per_channel + context.mean(1) @ self.U.T
        return torch.einsum("oc,bchw->bohw", self.W, x) + per_channel[:, :, None, None]


class Lookup(nn.Module):
    """An embedder that looks its answer up by the first label: {label: context}."""
    null_class = 9

    def __init__(self, contexts: dict[int, torch.Tensor | None]):
        super().__init__()
        self.contexts = contexts

    def forward(self, labels: torch.Tensor) -> torch.Tensor | None:
        return self.contexts[labels[0].item()]


class NoAutoencoder(nn.Module):
    """Images are latents."""
    resolution, latent_shape = 8, (4, 8, 8)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z


def latent_diffusion(contexts: dict) -> LatentDiffusion:
    case = oracle("schedule.pt")
    return LatentDiffusion(NoAutoencoder(), LinearPredictor(**case["model"]), Lookup(contexts),
                           case["config"]["linear_start"], case["config"]["linear_end"])


def test_the_schedule_equals_the_official_one():
    case, model = oracle("schedule.pt"), latent_diffusion({})
    close(model.alphas_cumprod, case["buffers"]["alphas_cumprod"], 1e-5, rtol=1e-5)
    # In float64 there is no rounding to forgive, not even for the last, tiny values.
    exact = make_alphas_cumprod(case["config"]["linear_start"], case["config"]["linear_end"])
    close(exact, (1.0 - case["betas_float64"]).cumprod(0), 0.0, rtol=1e-12)


def test_the_loss_equals_the_official_one():
    case, model = oracle("schedule.pt"), latent_diffusion({0: None})
    q, expected = case["q_sample"], case["p_losses"]
    z_t = q_sample(model.alphas_cumprod, q["x0"], q["t"], q["noise"])
    close(z_t, q["x_t"], 1e-5, rtol=1e-5)
    losses = model(q["x0"], q["t"], q["noise"], torch.zeros(4, dtype=torch.long))
    close(losses, expected["per_sample"], 1e-5, rtol=1e-5)
    close(losses.mean(), expected["batch"], 1e-5, rtol=1e-5)


def test_ddim_timesteps_equal_the_official_ones():
    case = oracle("schedule.pt")
    for run in case["ddim_schedules"] + case["ddim_runs"]:
        assert ddim_timesteps(run["steps_asked"]) == run["timesteps"].tolist()


@pytest.mark.parametrize("number", [0, 1], ids=["eta 0", "eta 1"])
def test_ddim_visits_the_official_latents(number):
    model, run, visited = latent_diffusion({}), oracle("schedule.pt")["ddim_runs"][number], []

    def predict_eps(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        visited.append(z_t)
        return model.unet(z_t, t)

    noise = iter(run["noises"]).__next__ if number else None
    z_0 = ddim_sample(predict_eps, model.alphas_cumprod, run["x_T"], run["steps_asked"],
                      run["eta"], noise)
    close(torch.stack([*visited, z_0]), run["x_inter"], 1e-4)
    close(z_0, run["final"], 1e-4)


def test_guided_generation_equals_the_official_one():
    run, finals = oracle("schedule.pt")["ddim_runs"][2], []
    model = latent_diffusion({0: run["context"], Lookup.null_class: run["uncond_context"]})

    def from_official_start(predict_eps, alphas_cumprod, z_T, *rest) -> torch.Tensor:
        finals.append(ddim_sample(predict_eps, alphas_cumprod, run["x_T"], *rest))
        return finals[0]

    model.generate(torch.zeros(len(run["x_T"]), dtype=torch.long), run["steps_asked"], run["eta"],
                   run["guidance_scale"], solver=from_official_start)
    close(finals[0], run["final"], 1e-4)


def test_averages_equal_the_official_ones():
    case = oracle("ema.pt")
    names = case["name_to_ema_name"]   # without the frozen parameters
    ema = EMA({name: case["parameters_initial"][name] for name in names}, case["config"]["decay"])

    def compare(expected: dict) -> None:
        for name, ema_name in names.items():
            close(ema.shadow[name], expected[ema_name], 1e-6)

    compare(case["ema_initial"])
    updates = zip(case["parameters_before_update"], case["ema_after_update"], strict=True)
    for parameters, expected in updates:
        ema.update(parameters)
        compare(expected)
