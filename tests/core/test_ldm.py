"""Schedule, loss, random draws, DDIM, guidance, latents, averaging: by hand or by exact solutions.

test_schedule_oracles.py compares the same functions with the official code.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from dp_sgd import private_parameter_names
from ldm import (
    EMA,
    LatentDiffusion,
    ddim_sample,
    ddim_timesteps,
    drop_labels,
    lr_factor,
    make_alphas_cumprod,
    normalize_images,
    q_sample,
    sample_t_and_noise,
)
from tiny import seed_everything, tiny_data, tiny_model

ALPHAS_CUMPROD = make_alphas_cumprod(0.0015, 0.0195)


@pytest.fixture
def model() -> LatentDiffusion:
    return tiny_model().float().eval()


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- schedule and loss -------------------------------------------------------------------------

def test_the_schedule_is_linear_in_sqrt_beta():
    assert ALPHAS_CUMPROD.dtype == torch.float64 and len(ALPHAS_CUMPROD) == 1000
    before = torch.cat([torch.ones(1, dtype=torch.float64), ALPHAS_CUMPROD[:-1]])
    expected = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64)
    torch.testing.assert_close((1 - ALPHAS_CUMPROD / before).sqrt(), expected, rtol=1e-9, atol=0)
    assert ALPHAS_CUMPROD[-1].item() == pytest.approx(1.4230e-4, rel=1e-4)   # the official buffer


def test_q_sample_by_hand():
    z_0, eps = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), -1.0)
    z_t = q_sample(torch.tensor([1.0, 0.64]), z_0, torch.tensor([0, 1]), eps)
    torch.testing.assert_close(z_t.flatten(), torch.tensor([2.0, 0.8 * 2.0 - 0.6]))


def loss_arguments() -> tuple[torch.Tensor, ...]:
    t, labels = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    return randn(4, 4, 4, 4), t, randn(4, 4, 4, 4, seed=2), labels


def test_a_zero_predictor_loses_the_noise_s_mean_square():
    z_0, t, eps, labels = loss_arguments()
    losses = tiny_model(randomise=False).float()(z_0, t, eps, labels)   # the last layer is zero
    torch.testing.assert_close(losses, eps.square().mean(dim=(1, 2, 3)))


def test_the_loss_is_per_example(model):
    batch = loss_arguments()
    one_by_one = torch.cat([model(*(x[i:i + 1] for x in batch)) for i in range(4)])
    torch.testing.assert_close(model(*batch), one_by_one)


def test_the_loss_is_pure(model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = model(*loss_arguments()), model(*loss_arguments())
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_loss_depends_on_the_class(model):
    z_0, t, eps, _ = (x[:1].expand(4, *x.shape[1:]) for x in loss_arguments())
    losses = model(z_0, t, eps, torch.arange(4))
    assert len(losses.unique()) == 4   # three classes and the null class


# ---- random draws ------------------------------------------------------------------------------

def test_dropout_gives_a_share_the_null_class():
    labels = torch.arange(10_000) % 3
    dropped = drop_labels(labels, 3, 0.2, rng())
    is_null = dropped == 3
    assert torch.equal(dropped[~is_null], labels[~is_null])
    assert is_null.float().mean().item() == pytest.approx(0.2, abs=0.02)   # standard error 0.004


def test_draws_are_what_the_loss_takes():
    model, (z_0, labels) = tiny_model(), tiny_data(5)
    same, t, eps, condition = sample_t_and_noise(model, z_0, labels, 3, 0.0, rng())
    assert torch.equal(same, z_0[:, None].expand(5, 3, 4, 4, 4)) and eps.shape == same.shape
    assert t.shape == (5, 3) and torch.equal(condition, labels[:, None].expand(5, 3))
    for example in range(5):
        assert model(same[example], t[example], eps[example], condition[example]).shape == (3,)


def test_the_noise_is_standard_normal():
    eps = sample_t_and_noise(tiny_model(), *tiny_data(100), 4, 0.1, rng())[2].flatten()
    assert eps.mean().item() == pytest.approx(0.0, abs=0.03)   # standard error 0.006
    assert eps.std().item() == pytest.approx(1.0, abs=0.03)    # standard error 0.004


def test_an_examples_gradient_ignores_the_rest_of_its_batch():
    model = tiny_model()
    names = private_parameter_names(model)
    parameters = [p for name, p in model.named_parameters() if name in set(names)]
    z_0, labels = tiny_data(5)
    others = torch.cat([z_0[:1], 100 * z_0[1:].flip(0)]), torch.cat([labels[:1], 2 - labels[1:]])
    gradients = []
    for z, l in ((z_0, labels), others):
        seed_everything()
        draws = (x[:, 0] for x in sample_t_and_noise(model, z, l, 1, 0.1, rng()))
        gradients.append(torch.autograd.grad(model(*draws)[0], parameters))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_examples_and_draws_share_no_randomness():
    z_0, labels = tiny_data(1)
    equal = z_0.expand(4, -1, -1, -1), labels.expand(4)
    _, t, eps, _ = sample_t_and_noise(tiny_model(), *equal, 3, 0.1, rng())
    # 4 equal examples with 3 draws each: 12 different draws
    assert len(eps.flatten(0, 1).flatten(1).unique(dim=0)) == 12
    assert len(t.unique()) > 6   # of 1,000 time steps


def test_each_draw_drops_its_label_for_itself():
    z_0, labels = tiny_data(300)
    condition = sample_t_and_noise(tiny_model(), z_0, labels, 2, 0.5, rng())[3]
    dropped = condition == 3
    assert (dropped[:, 0] != dropped[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("favoured, share", [((200, 300), 0.91), ((0, 1_000), 0.1), (None, 0.1)])
def test_nine_of_ten_time_steps_are_in_the_range(favoured, share):
    t = sample_t_and_noise(tiny_model(), *tiny_data(1), 20_000, 0.1, rng(), favoured)[1]
    assert ((t >= 200) & (t < 300)).float().mean() == pytest.approx(share, abs=0.01)
    assert len(t.unique()) == 1_000 or favoured == (200, 300)
    assert t.min() < 10 and t.max() >= 990   # the others are of any time step


@pytest.mark.parametrize("favoured, edges", [
    (None, [0, 250, 500, 750, 1_000]), ((200, 800), [0, 343, 500, 657, 1_000])])
def test_an_examples_time_steps_are_stratified(favoured, edges):
    t = sample_t_and_noise(tiny_model(), *tiny_data(500), 4, 0.1, rng(), favoured)[1]
    for k in range(4):   # a quarter of the draws, whose borders are time steps themselves
        assert ((t[:, k] >= edges[k]) & (t[:, k] <= edges[k + 1])).all()
        assert len(t[:, k].unique()) > 90
    # The same place in each quarter would be no better than one draw.
    assert len((t[:, 0] - t[:, 1]).unique()) > 90


# ---- DDIM --------------------------------------------------------------------------------------

def test_ddim_timesteps_for_every_number_of_steps():
    for steps in range(1, 1001):
        timesteps = ddim_timesteps(steps)
        assert len(timesteps) == steps
        assert 0 <= timesteps[0] and timesteps[-1] < 1000
        assert all(a < b for a, b in zip(timesteps, timesteps[1:]))
        if 1000 % steps == 0 and steps < 1000:
            assert timesteps == list(range(1, 1000, 1000 // steps))   # the official ones
    assert ddim_timesteps(1000) == list(range(1000))


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_steps_that_do_not_exist_are_refused(steps):
    with pytest.raises(ValueError, match="from 1 to 1000"):
        ddim_sample(lambda z_t, t: z_t, ALPHAS_CUMPROD, randn(1, 1, 2, 2), steps)


def gaussian_predictor(mean: torch.Tensor | float, std: float) -> Callable:
    """E[eps | z_t] where z_0 ~ N(mean, std^2): what a perfectly trained network predicts."""
    def predict_eps(z_t, t):
        a = ALPHAS_CUMPROD[t][:, None, None, None]
        return (1 - a).sqrt() * (z_t - a.sqrt() * mean) / (a * std**2 + 1 - a)
    return predict_eps


@pytest.mark.parametrize("steps", [7, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_recovers_a_point(steps, eta):
    point, z_T = randn(3, 2, 4, 4).double(), randn(3, 2, 4, 4, seed=2).double()
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(z_T.shape, generator=generator, dtype=torch.float64)

    z_0 = ddim_sample(gaussian_predictor(point, 0.0), ALPHAS_CUMPROD, z_T, steps, eta, noise)
    # The last step ends at the noise level of step 0: sqrt(a_0) z_0 + sqrt(1 - a_0) eps.
    a = ALPHAS_CUMPROD[0]
    eps = (z_0 - a.sqrt() * point) / (1 - a).sqrt()
    if eta == 0.0:   # eps does not change on the way
        last = ALPHAS_CUMPROD[ddim_timesteps(steps)[-1]]
        torch.testing.assert_close(eps, (z_T - last.sqrt() * point) / (1 - last).sqrt())
    # 96 numbers: 1 with a standard deviation of 0.07
    assert 0.7 < eps.square().mean().sqrt() < 1.3


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_recovers_a_gaussian(eta):
    z_T, generator = randn(1000, 1, 4, 4), torch.Generator().manual_seed(0)
    z_0 = ddim_sample(gaussian_predictor(0.7, 0.5), ALPHAS_CUMPROD, z_T, 250, eta,
                      lambda: torch.randn(z_T.shape, generator=generator))
    assert z_0.mean().item() == pytest.approx(0.7, abs=0.02)    # standard error 0.004
    assert z_0.std().item() == pytest.approx(0.5, abs=0.02)     # standard error 0.003


def test_ddim_noise_by_hand():
    # Two steps visit t = 501 and 1. Only the first noise is not zero; the network predicts zero.
    start = torch.zeros(1, 1, 1, 1)
    noise = iter([torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)]).__next__
    z_0 = ddim_sample(lambda z, t: torch.zeros_like(z), ALPHAS_CUMPROD, start, 2, 0.5, noise)
    a_501, a_1, a_0 = ALPHAS_CUMPROD[[501, 1, 0]].tolist()
    # Song et al. 2021, eq. 16
    sigma = 0.5 * math.sqrt((1 - a_1) / (1 - a_501)) * math.sqrt(1 - a_501 / a_1)
    assert z_0.item() == pytest.approx(sigma * math.sqrt(a_0 / a_1), rel=1e-6)


@pytest.mark.parametrize("eta, expected", [(0.0, 0), (1.0, 10)])
def test_ddim_draws_noise_only_with_eta(eta, expected):
    draws = []

    def noise():
        draws.append(torch.zeros(1, 1, 2, 2))
        return draws[-1]

    ddim_sample(lambda z, t: z, ALPHAS_CUMPROD, torch.ones(1, 1, 2, 2), 10, eta, noise)
    assert len(draws) == expected


# ---- generation and guidance -------------------------------------------------------------------

def test_generation_follows_the_seed(model):
    def images(seed, eta):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(torch.tensor([0, 1]), 4, eta, 2.0, generator)

    for eta in (0.0, 1.0):
        first = images(0, eta)
        assert first.shape == (2, 8, 8, 1) and first.dtype == torch.uint8
        assert torch.equal(first, images(0, eta))
        assert not torch.equal(first, images(1, eta))


def test_generation_takes_ddim_unless_told(model):
    def images(**solver):
        generator = torch.Generator().manual_seed(0)
        return model.generate(torch.tensor([0, 2]), 3, 1.0, 1.0, generator, **solver)

    assert torch.equal(images(), images(solver=ddim_sample))
    assert not torch.equal(images(), images(solver=lambda *args: torch.zeros(2, 4, 4, 4)))


def guided_eps(model: LatentDiffusion, guidance: float) -> Callable:
    """What `generate` hands to its solver as predict_eps, for the classes 0 and 2."""
    seen = []

    def solver(predict_eps, alphas_cumprod, z_T, *others):
        seen.append(predict_eps)
        return z_T

    model.generate(torch.tensor([0, 2]), 1, guidance=guidance, solver=solver)
    return seen[0]


@torch.inference_mode()
def test_guidance_extrapolates_from_the_null_class(model):
    z, t = randn(2, 4, 4, 4), torch.tensor([300, 300])
    eps_class = model.unet(z, t, model.embedder(torch.tensor([0, 2])))
    eps_null = model.unet(z, t, model.embedder(torch.tensor([3, 3])))
    assert (eps_class - eps_null).abs().max() > 1e-3
    for guidance in (0.0, 1.0, 2.0):
        expected = eps_null + guidance * (eps_class - eps_null)
        torch.testing.assert_close(guided_eps(model, guidance)(z, t), expected)


@torch.inference_mode()
@pytest.mark.parametrize("guidance, expected", [(1.0, 1), (2.0, 2)])
def test_no_guidance_costs_one_network_evaluation(model, guidance, expected):
    calls = []
    model.unet.register_forward_hook(lambda module, inputs, output: calls.append(1))
    guided_eps(model, guidance)(randn(2, 4, 4, 4), torch.tensor([3, 3]))
    assert len(calls) == expected


# ---- latents and images ------------------------------------------------------------------------

def test_latents_are_posterior_means_times_the_scale(model):
    model.latent_scale.fill_(5.0)
    mean = randn(2, 4, 4, 4)
    model.vae.encode = lambda x: torch.cat([mean, torch.zeros_like(mean)], 1)   # of variance 1
    assert torch.equal(model.encode(randn(2, 1, 8, 8)), 5.0 * mean)


def test_decoding_undoes_the_scale(model):
    model.latent_scale.fill_(5.0)
    decoded = []

    def decode(z):
        decoded.append(z)
        return torch.zeros(len(z), 1, 8, 8)

    model.vae.decode = decode
    model.decode(torch.full((2, 4, 4, 4), 10.0))
    assert (decoded[0] == 2.0).all()


def test_decoded_pixels_are_rounded_and_clamped(model):
    # (x + 1) * 127.5 is 0.64 for -0.995, and 191.25 for 0.5.
    values = torch.tensor([-3.0, -1.0, -0.995, 0.5, 1.0, 3.0])
    model.vae.decode = lambda z: values.reshape(1, 2, 1, 3)   # [B, C, H, W]
    images = model.decode(torch.zeros(1, 4, 4, 4))
    assert images.tolist() == [[[[0, 191], [0, 255], [1, 255]]]]   # [B, H, W, C]


@torch.no_grad()
def test_many_latents_are_decoded_in_parts(model, monkeypatch):
    z_0, sizes, decode = randn(5, 4, 4, 4), [], model.vae.decode
    whole = model.decode(z_0)

    def watch(z):
        sizes.append(len(z))
        return decode(z)

    monkeypatch.setattr("ldm.images_at_once", lambda resolution: 2)
    model.vae.decode = watch
    assert torch.equal(model.decode(z_0), whole) and sizes == [2, 2, 1]


def test_images_are_normalised_to_minus_one_and_one():
    images = np.array([[[[0, 51], [255, 102]]]], dtype=np.uint8)   # [1, 1, 2, 2]: B, H, W, C
    pixels = normalize_images(images, torch.device("cpu"))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.tensor([[[[-1.0, 1.0]], [[-0.6, -0.2]]]]))


# ---- class embedder ----------------------------------------------------------------------------

def test_classes_are_conditions_by_their_number():
    embedder = tiny_model().embedder
    assert embedder.conditions(["a", "b"]).tolist() == [0, 1]
    tokens = embedder(torch.tensor([2, 3]))
    assert tokens.shape == (2, 1, 8) and embedder.null_class == 3
    assert torch.equal(tokens[:, 0], embedder.embedding.weight[2:])


def test_rescaling_multiplies_only_the_embedder_s_gradient():
    embedder, labels = tiny_model().embedder, torch.tensor([2, 0, 2])
    tokens = embedder(labels)
    (gradient,) = torch.autograd.grad(tokens.square().sum(), embedder.embedding.weight)
    for scale in (30.0, 4.0):
        embedder.rescale(scale)
        again = embedder(labels)
        torch.testing.assert_close(again, tokens)
        (scaled,) = torch.autograd.grad(again.square().sum(), embedder.embedding.weight)
        torch.testing.assert_close(scaled, scale * gradient)


# ---- learning rate and averaging ---------------------------------------------------------------

def test_the_learning_rate_warms_up_and_anneals():
    factors = [lr_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 50) and factors[24] == pytest.approx(25 / 50)
    assert factors[500] == pytest.approx(0.5)
    assert factors[750] == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    peak = factors.index(max(factors))
    assert 48 <= peak <= 50 and factors[peak] > 0.99
    assert factors == sorted(factors[:peak]) + sorted(factors[peak:], reverse=True)
    assert 0 < factors[-1] < 1e-5
    assert 0 < lr_factor(0, 1) <= 1   # a run of one step learns


def test_ema_by_hand():
    weight = nn.Parameter(torch.zeros(1))
    ema = EMA({"w": weight}, decay=0.2)
    weight.data.fill_(1.0)
    assert ema.shadow["w"].item() == 0.0       # a copy
    ema.update({"w": weight})                  # decay min(0.2, 2/11)
    assert ema.shadow["w"].item() == pytest.approx(9 / 11)
    ema.update({"w": weight})                  # decay min(0.2, 3/12)
    assert ema.shadow["w"].item() == pytest.approx(1 - 2 / 11 * 0.2)
