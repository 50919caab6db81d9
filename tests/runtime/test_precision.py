"""bfloat16: the networks' calls alone; losses, norms, sums and weights stay float32."""

import numpy as np
import pytest
import torch
from torch import nn

from dp_sgd import private_parameter_names
from ldm import LatentDiffusion, q_sample, sample_t_and_noise
from runtime.precision import bfloat16
from tiny import flat, tiny_data, tiny_model
from variants import ghost
from variants.unconditional import NoEmbedder


@pytest.fixture
def model() -> LatentDiffusion:
    return tiny_model().float()


def draws(model: LatentDiffusion, count: int) -> tuple[torch.Tensor, ...]:
    z_0, labels = tiny_data(count)
    return sample_t_and_noise(model, z_0.float(), labels, 2, 0.0, np.random.default_rng(0))


def relative(rough: torch.Tensor, exact: torch.Tensor) -> float:
    return ((rough - exact).norm() / exact.norm()).item()


# ---- the networks ------------------------------------------------------------------------------

def test_networks_compute_in_bfloat16_inside_only(model):
    dtypes, batch = [], [x[:, 0] for x in draws(model, 3)]
    model.unet.middle_block.register_forward_hook(lambda m, inputs, out: dtypes.append(out.dtype))
    exact = model(*batch)
    with bfloat16(model.unet, model.embedder):
        rough = model(*batch)
    again = model(*batch)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert 1e-5 < relative(rough, exact) < 0.05   # it was bfloat16, and it was right
    assert torch.equal(again, exact)


def test_losses_gradients_and_weights_stay_float32(model):
    z_0, t, eps, condition = (x[:, 0] for x in draws(model, 3))
    z_t = q_sample(model.alphas_cumprod, z_0, t, eps)
    with bfloat16(model.unet, model.embedder):
        eps_hat = model.unet(z_t, t, model.embedder(condition))
        losses = model(z_0, t, eps, condition)
        losses.sum().backward()
    assert eps_hat.dtype == losses.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    # The loss itself is not rounded: it is the float32 mean of what the network returned.
    expected = (eps_hat - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_module_s_own_forward_comes_back(enabled):
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="power cut"), bfloat16(layer, enabled=enabled):
        assert ("forward" in vars(layer)) == enabled
        raise RuntimeError("power cut")
    assert "forward" not in vars(layer)


def test_no_context_stays_none():
    embedder = NoEmbedder()
    with bfloat16(embedder):
        assert embedder(torch.zeros(2)) is None


# ---- clipping ----------------------------------------------------------------------------------

def test_clipping_is_as_exact_as_in_float32(model):
    """Each example, clipped to C, has the norm C to five digits. bfloat16 has three."""
    C, batch = 1e-3, draws(model, 5)
    model.requires_grad_(False)
    parameters = {name: model.get_parameter(name) for name in private_parameter_names(model)}
    exact = flat(ghost.clipped_gradient_sum(model, parameters, batch, C))
    with bfloat16(model.unet, model.embedder):
        rough = flat(ghost.clipped_gradient_sum(model, parameters, batch, C))
        one_by_one = [flat(ghost.clipped_gradient_sum(
            model, parameters, tuple(x[i:i + 1] for x in batch), C)) for i in range(5)]
    assert 1e-4 < relative(rough, exact) < 0.05
    for one in one_by_one:   # rounding is counted against the example
        assert C * (1 - 2e-5) < one.double().norm().item() < C * (1 + 2e-6)
