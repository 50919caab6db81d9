"""The rules that the privacy of DP-LDM's private stage rests on, each with a test that a broken version fails.

Most tests use a loss that is linear in the parameters: the gradient of an example is then the example itself,
so that norms are known exactly. The others run the real model, made tiny, through train.py's own private step.
"""

import dataclasses
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import accountant
import dp_sgd
import train
from dp_sgd import (
    PrivacyPlan,
    clipped_gradient_sum,
    make_plan,
    noisy_gradient,
    per_example_gradients,
    poisson_sample,
    secure_generator,
)
from ldm import LatentDiffusion, load_checkpoint, save_checkpoint
from unet import UNet, private_parameter_names

TINY = train.Config(image_size=8, vae_channels=8, vae_mult=(1, 2), latent_channels=4, unet_channels=16,
                    unet_mult=(1, 2), attention_resolutions=(2,), num_heads=2, context_dim=8,
                    embedder_scale=7.0, device="cpu", sample_steps=1, chunk="3", engine="func")
NUM_CLASSES = 3
aten = torch.ops.aten

# What private_parameter_names should find in that model, written out by hand.
ATTENTION = ["unet.input_blocks.3.1", "unet.middle_block.1", "unet.output_blocks.0.1", "unet.output_blocks.1.1"]
TRANSFORMER = {"norm.weight", "norm.bias", "proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias"} | {
    "transformer_blocks.0." + name for name in (
        "norm1.weight", "norm1.bias", "attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight",
        "attn1.to_out.0.weight", "attn1.to_out.0.bias", "attn2.to_v.weight", "attn2.to_out.0.weight",
        "attn2.to_out.0.bias", "norm3.weight", "norm3.bias", "ff.net.0.proj.weight", "ff.net.0.proj.bias",
        "ff.net.2.weight", "ff.net.2.bias")}
WITHOUT_EFFECT = {"transformer_blocks.0." + name for name in (
    "attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")}
EMBEDDER = {"embedder.embedding.weight"}
SCALE = {"embedder.scale"}   # no parameter: the unit that the embedder is trained in


def parameters_of(modules: list[str], names: set[str]) -> set[str]:
    return {f"{module}.{name}" for module in modules for name in names}


# ---- helpers: a loss with a known gradient -----------------------------------------------------------

SHAPES = {"unet.a.weight": (3, 2), "unet.b.weight": (4,), "embedder.embedding.weight": (5,)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())


def linear_loss(parameters, *example):
    return sum((p * x).sum() for p, x in zip(parameters.values(), example))


def linear_parameters(dtype=torch.float64):
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def as_batch(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows [B, SIZE] -> the batch whose examples have these gradients."""
    parts = rows.split([math.prod(shape) for shape in SHAPES.values()], dim=1)
    return tuple(part.reshape(-1, *shape) for part, shape in zip(parts, SHAPES.values()))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def clipped_sum(rows: torch.Tensor, C: float, chunk: int = 4) -> torch.Tensor:
    return flat(clipped_gradient_sum(linear_loss, linear_parameters(rows.dtype), as_batch(rows), C, chunk))


def random_rows(count: int, norm=1.0, seed: int = 0) -> torch.Tensor:
    """Gradients [count, SIZE] in random directions, of the given norm or norms."""
    rows = torch.randn(count, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True) * torch.as_tensor(norm, dtype=torch.float64).reshape(-1, 1)


def make(sigma: float, C: float = 0.5, N: int = 100, expected_batch: float = 10, steps: int = 1) -> PrivacyPlan:
    return PrivacyPlan(N, expected_batch, steps, sigma, C, 1e-5)


# ---- helpers: the real model and its private step ------------------------------------------------------

def tiny_model(randomise: bool = True) -> LatentDiffusion:
    """Zero-initialised output layers hide all other gradients, so every parameter is randomised here."""
    torch.manual_seed(0)
    model = LatentDiffusion(TINY.architecture(NUM_CLASSES))
    if randomise:
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    return model.double()


def tiny_data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 4, 4, dtype=torch.float64, generator=g), torch.arange(count) % NUM_CLASSES


def seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def optimizer_steps():
    """The gradients seen at every step of any optimiser: a list of lists of tensors."""
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]))
    yield seen
    handle.remove()


@pytest.fixture
def private_calls(monkeypatch):
    """Records train.py's calls of noisy_gradient, which go through unless .stub is set (then: no gradient)."""
    class Calls(list):
        stub = False

        def __call__(self, loss_fn, parameters, batch, plan, chunk, rng):
            self.append((loss_fn, parameters, batch, plan))
            if self.stub:
                return {name: torch.zeros_like(p) for name, p in parameters.items()}
            return noisy_gradient(loss_fn, parameters, batch, plan, chunk, rng)

    calls = Calls()
    monkeypatch.setattr(train, "noisy_gradient", calls)
    return calls


def gradient_of_one(model, names, z_0, t, eps, condition) -> torch.Tensor:
    """The gradient of one draw by an ordinary backward pass through a batch of one, flattened.

    The embedder is trained in units of 1/embedder_scale, which multiplies its gradient, before any clipping.
    """
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    loss = model(z_0[None], t[None], eps[None], condition[None]).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    scales = [TINY.embedder_scale if name.startswith("embedder.") else 1.0 for name in names]
    return torch.cat([scale * g.flatten() for scale, g in zip(scales, gradients)])


def gradients_one_by_one(model, names, batch) -> torch.Tensor:
    """[B, number of parameters]: for each example the mean of its K draws' gradients, one backward pass each."""
    return torch.stack([torch.stack([gradient_of_one(model, names, *draw) for draw in zip(*example)]).mean(0)
                        for example in zip(*batch)])


# ---- gradients of single examples -----------------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 3])
def test_per_example_gradients_are_those_of_one_backward_pass_per_example(K, private_calls):
    model, names = tiny_model(), private_parameter_names(tiny_model())
    private_calls.stub = True
    train.train_private(model, *tiny_data(4), names, make(0.0, N=4, expected_batch=4),
                        dataclasses.replace(TINY, noise_draws=K))
    loss_fn, parameters, batch, _ = private_calls[0]
    assert all(x.shape[:2] == (4, K) for x in batch)
    ours = per_example_gradients(loss_fn, parameters, batch)
    ours = torch.cat([g.flatten(1) for g in ours.values()], dim=1)
    assert ours.abs().max() > 1e-3
    torch.testing.assert_close(ours, gradients_one_by_one(tiny_model(), names, batch), rtol=1e-10, atol=1e-10)


def test_no_layer_computes_statistics_over_the_batch():
    norms = {type(m) for m in tiny_model().modules() if "norm" in type(m).__name__.lower()}
    assert norms == {nn.GroupNorm, nn.LayerNorm}


def test_an_examples_gradient_does_not_depend_on_the_rest_of_its_batch():
    model = tiny_model()
    names = private_parameter_names(model)
    parameters = [p for name, p in model.named_parameters() if name in set(names)]
    z_0, labels = tiny_data(5)
    others = torch.cat([z_0[:1], 100 * z_0[1:].flip(0)]), torch.cat([labels[:1], 2 - labels[1:]])
    gradients = []
    for z, l in ((z_0, labels), others):
        seed_everything()
        draws = (x[:, 0] for x in train.noise_draws(model, z, l, 1, 0.1, np.random.default_rng(0)))
        gradients.append(torch.autograd.grad(model(*draws)[0], parameters))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_diffusion_noise_of_a_private_run_does_not_follow_the_global_seeds(private_calls):
    """Whoever knew the draws would see all those after an added example shift by one place."""
    for _ in range(2):
        seed_everything()
        train.train_private(tiny_model(), *tiny_data(4), [*EMBEDDER], make(1.0, N=4, expected_batch=4), TINY)
    one, other = (batch for _, _, batch, _ in private_calls)
    for place in (1, 2):   # t, eps
        assert not torch.equal(one[place], other[place])


def test_examples_and_draws_share_no_randomness():
    z_0, labels = tiny_data(1)
    same, t, eps, _ = train.noise_draws(tiny_model(), z_0.expand(4, -1, -1, -1), labels.expand(4), 3, 0.1,
                                        np.random.default_rng(0))
    # 4 equal examples with 3 draws each: 12 different draws
    assert len(eps.flatten(0, 1).flatten(1).unique(dim=0)) == 12 and (same == z_0).all()
    assert len(t.unique()) > 6   # of 1,000 time steps


@pytest.mark.parametrize("favoured, share", [((200, 300), 0.91), ((0, 1_000), 0.1), (None, 0.1)])
def test_nine_of_ten_time_steps_are_in_the_favoured_range(favoured, share):
    z_0, labels = tiny_data(1)
    t = train.noise_draws(tiny_model(), z_0, labels, 20_000, 0.1, np.random.default_rng(0), favoured)[1]
    assert ((t >= 200) & (t < 300)).float().mean() == pytest.approx(share, abs=0.01)
    assert len(t.unique()) == 1_000 or favoured == (200, 300)
    assert t.min() < 10 and t.max() >= 990   # the others are of any time step


@pytest.mark.parametrize("favoured, edges", [(None, [0, 250, 500, 750, 1_000]),
                                             ((200, 800), [0, 343, 500, 657, 1_000])])
def test_an_examples_draws_are_one_of_each_part_of_the_time_steps(favoured, edges):
    t = train.noise_draws(tiny_model(), *tiny_data(500), 4, 0.1, np.random.default_rng(0), favoured)[1]
    for k in range(4):   # a quarter of the draws, whose borders are time steps themselves
        assert ((t[:, k] >= edges[k]) & (t[:, k] <= edges[k + 1])).all()
        assert len(t[:, k].unique()) > 90
    assert len((t[:, 0] - t[:, 1]).unique()) > 90   # the same place in each quarter would be no better than one draw


def test_the_private_stage_draws_the_time_steps_it_is_told(monkeypatch):
    seen, draws = [], train.noise_draws

    def watch(*arguments):
        seen.append(draws(*arguments))
        return seen[-1]

    monkeypatch.setattr(train, "noise_draws", watch)
    config = dataclasses.replace(TINY, private_timesteps=(500, 501), noise_draws=4)
    model, plan = tiny_model(), make_plan(5, 5, 4, 1.0, 3.0, 1e-5)
    train.train_private(model, *tiny_data(5), train.private_parameter_names(model), plan, config)
    t = torch.cat([batch[1].flatten() for batch in seen])
    assert (t == 500).float().mean() > 0.6


# ---- clipping -------------------------------------------------------------------------------------------

def test_a_huge_gradient_contributes_exactly_C():
    huge = random_rows(1, norm=1000 * 0.5)
    torch.testing.assert_close(clipped_sum(huge, C=0.5), huge[0] / 1000, rtol=1e-12, atol=0)


def test_gradients_below_C_pass_unchanged():
    rows = random_rows(5, norm=[0.0, 1e-9, 0.01, 0.3, 0.4999])
    torch.testing.assert_close(clipped_sum(rows, C=0.5), rows.sum(0), rtol=1e-12, atol=1e-15)


def test_the_norm_is_taken_over_all_parameters_jointly():
    # Every tensor alone has norm 0.9 C, all three together sqrt(3) * 0.9 C.
    parts = [torch.ones(1, *shape, dtype=torch.float64) for shape in SHAPES.values()]
    row = torch.cat([(0.9 * part / part.norm()).flatten(1) for part in parts], dim=1)
    torch.testing.assert_close(clipped_sum(row, C=1.0), row[0] / row.norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_each_parameter_counts_in_the_joint_norm(name):
    # One tensor, the embedder included, holds nearly all of the gradient: it scales the others down with it.
    factors = torch.cat([torch.full((1, math.prod(s)), 1000.0 if n == name else 1.0, dtype=torch.float64)
                         for n, s in SHAPES.items()], dim=1)
    torch.testing.assert_close(clipped_sum(factors, C=1.0), factors[0] / factors.norm(), rtol=1e-12, atol=0)


def test_clipping_comes_before_the_sum():
    aligned = random_rows(1, norm=5.0).expand(10, -1)   # ten examples of norm 10 C add up to 10 C, not to C
    torch.testing.assert_close(clipped_sum(aligned, C=0.5), aligned[0], rtol=1e-12, atol=0)
    big, small = random_rows(2, norm=[500.0, 0.2])      # the outlier may not scale its neighbour down
    torch.testing.assert_close(clipped_sum(torch.stack([big, small]), C=0.5), big / 1000 + small, rtol=1e-12, atol=0)
    opposite = torch.stack([big, -big + small])         # large gradients that cancel are clipped all the same
    expected = big / 1000 + 0.5 * (-big + small) / (-big + small).norm()
    torch.testing.assert_close(clipped_sum(opposite, C=0.5), expected, rtol=1e-12, atol=1e-12)


def test_the_mean_over_the_draws_is_clipped_and_not_each_draw():
    # Two draws of norm 100 C that nearly cancel: their mean is below C and passes unchanged.
    big, small = random_rows(2, norm=[50.0, 0.2])
    draws = as_batch(torch.stack([big + small, -big + small]))
    batch = tuple(x[None] for x in draws)   # one example, K = 2

    def loss(parameters, *example):
        return torch.stack([linear_loss(parameters, *draw) for draw in zip(*example)]).mean()

    total = flat(clipped_gradient_sum(loss, linear_parameters(), batch, 0.5, 4))
    torch.testing.assert_close(total, small, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("megabytes, largest", [(4000, 64), (400, 16), (40, 2), (1, 1)])
def test_the_largest_chunk_fits_into_half_of_the_memory(monkeypatch, megabytes, largest):
    """Of 10 MB an example, above the 100 MB that were in use before; 64 is enough for 50 examples."""
    used = [100e6]

    def clipped_sum(loss_fn, parameters, batch, C, chunk):
        assert len(batch[0]) == chunk
        used.append(max(used[-1], 100e6 + 10e6 * chunk))

    monkeypatch.setattr(dp_sgd, "clipped_gradient_sum", clipped_sum)
    monkeypatch.setattr(dp_sgd.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=used[-1] / 1024))
    monkeypatch.setattr(dp_sgd.os, "sysconf", {"SC_PHYS_PAGES": megabytes * 1e6 / 4096, "SC_PAGE_SIZE": 4096}.get)
    assert dp_sgd.largest_chunk(linear_loss, {}, (torch.zeros(1, 4),), most=50) == largest
    assert used[-1] - 100e6 <= max(10e6, megabytes * 1e6 / 2)


def test_the_clipped_sum_does_not_depend_on_the_chunk_size():
    rows = random_rows(7, norm=[0.1, 0.2, 0.5, 1.0, 2.0, 10.0, 1e4])
    for chunk in (1, 2, 3, 7, 100):
        torch.testing.assert_close(clipped_sum(rows, 0.5, chunk), clipped_sum(rows, 0.5, 7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_differ_by_at_most_C(seed):
    C = 0.5
    base = random_rows(6, norm=10 ** torch.linspace(-3, 6, 6), seed=seed)
    total = clipped_sum(base, C)
    spike = torch.zeros(1, SIZE, dtype=torch.float64)
    spike[0, -1] = 1e10
    added = [*random_rows(4, norm=[1e-6, C, 1.0, 1e6], seed=100 + seed).split(1),
             spike, -1e3 * total[None], 1e3 * total[None], base[-1:], -base[-1:], torch.full_like(spike, 1e12)]
    for row in added:
        for place, chunk in ((0, 1), (3, 4), (6, 7)):
            neighbour = torch.cat([base[:place], row, base[place:]])
            assert (clipped_sum(neighbour, C, chunk) - total).norm() <= C * (1 + 1e-12)


def test_a_gradient_whose_square_overflows_contributes_at_most_C():
    row = torch.full((1, SIZE), 1e30, dtype=torch.float32)   # its squared norm is inf in float32
    assert clipped_sum(row, C=0.5).norm() <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_example_with_a_gradient_that_is_not_finite_contributes_nothing(value):
    rows = random_rows(3)
    broken = rows.clone()
    broken[1, 0] = value
    for chunk in (1, 2, 3):
        assert torch.allclose(clipped_sum(broken, 0.5, chunk), clipped_sum(rows[[0, 2]], 0.5, chunk=1), atol=1e-14)


class TensorCores(TorchDispatchMode):
    """Multiplies float32 matrices with the digits that the caller allows, as GPUs do: bfloat16's, if any fewer."""
    rounded = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        reduced = torch.get_float32_matmul_precision() != "highest"
        if reduced and operation.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.mv, aten.baddbmm):
            args = [x.bfloat16().float() if isinstance(x, torch.Tensor) else x for x in args]
            self.rounded += 1
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("engine", ["func", "ghost"])
@pytest.mark.parametrize("K", [1, 40])   # 1: factors and their Gram matrices; 40: explicit gradients too
def test_norms_and_sums_have_all_digits_where_the_caller_allows_fewer(engine, K):
    model = tiny_model().float().requires_grad_(False)
    parameters = {name: model.get_parameter(name) for name in private_parameter_names(model)}
    batch = train.noise_draws(model, *(x.float() if x.is_floating_point() else x for x in tiny_data(3)), K, 0.0,
                              np.random.default_rng(0))

    def loss(parameters, *draws):
        return functional_call(model, parameters, draws).mean()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for i in range(3):
            with TensorCores() as cores:
                one = clipped_gradient_sum(model if engine == "ghost" else loss, parameters,
                                           tuple(x[i:i + 1] for x in batch), 1e-3, 1)
            assert cores.rounded and torch.get_float32_matmul_precision() == "high"   # the U-Net's own stay fast
            # Rounding is counted against the example.
            assert 1e-3 * (1 - 2e-5) < flat(one).double().norm().item() < 1e-3 * (1 + 2e-6)
    finally:
        torch.set_float32_matmul_precision(before)


# ---- noise ------------------------------------------------------------------------------------------------

def wide_loss(parameters, x):
    return sum((p * x).sum() for p in parameters.values())


def wide_parameters() -> dict[str, torch.Tensor]:
    """Two tensors of one shape: enough coordinates to measure a standard deviation."""
    return {name: torch.zeros(100, 100, dtype=torch.float64) for name in ("unet.weight", "embedder.weight")}


def wide_noise(plan: PrivacyPlan, x: torch.Tensor, chunk: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What noisy_gradient adds to the sum of the clipped gradients, the divisor undone."""
    private = noisy_gradient(wide_loss, wide_parameters(), (x,), plan, chunk, np.random.default_rng(seed))
    exact = clipped_gradient_sum(wide_loss, wide_parameters(), (x,), plan.max_grad_norm, chunk)
    return {name: private[name] * (plan.expected_batch * plan.max_grad_norm) - exact[name] for name in exact}


def assert_normal(noise: torch.Tensor, std: float) -> None:
    """Mean, standard deviation and shape of independent N(0, std^2) numbers; fails by chance about once in 1e8."""
    x = noise.flatten().double().numpy() / std
    low, high = stats.chi2.ppf([1e-9, 1 - 1e-9], len(x)) / len(x)
    assert low < np.mean(x**2) < high
    assert abs(x.mean()) * len(x) ** 0.5 < 6
    assert stats.kstest(x, "norm").pvalue > 1e-9


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.flatten().double(), b.flatten().double()
    assert abs(a @ b / (a.norm() * b.norm())) * len(a) ** 0.5 < 6


def batch_of(kind: str) -> torch.Tensor:
    x = torch.randn(6, 100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return {"empty": x[:0], "zero": 0 * x, "small": 1e-4 * x, "huge": 1e6 * x}[kind]


@pytest.mark.parametrize("sigma, C", [(1.0, 1.0), (0.7, 0.1), (3.0, 2.0)])
def test_the_noise_on_the_sum_has_standard_deviation_sigma_times_C(sigma, C):
    plan = make(sigma, C)
    noise = wide_noise(plan, batch_of("small"), chunk=3)
    for tensor in noise.values():
        assert_normal(tensor, sigma * C)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_the_noise_is_added_once_whatever_the_chunk_size(chunk):
    for tensor in wide_noise(make(0.7), batch_of("small"), chunk).values():
        assert_normal(tensor, 0.7 * 0.5)


@pytest.mark.parametrize("kind", ["empty", "zero", "small", "huge"])
def test_the_noise_does_not_depend_on_the_batch(kind):
    for tensor in wide_noise(make(0.7), batch_of(kind), chunk=3).values():
        assert_normal(tensor, 0.7 * 0.5)


def test_the_noise_of_different_parameters_and_steps_is_independent():
    one, other = wide_noise(make(0.7), batch_of("zero"), 3, seed=0), wide_noise(make(0.7), batch_of("zero"), 3, seed=1)
    assert_uncorrelated(one["unet.weight"], one["embedder.weight"])
    assert_uncorrelated(one["unet.weight"], one["unet.weight"].roll(1))
    assert_uncorrelated(flat(one), flat(other))
    plan, rng, empty = make(0.7), np.random.default_rng(0), (batch_of("empty"),)
    steps = [flat(noisy_gradient(wide_loss, wide_parameters(), empty, plan, 3, rng)) for _ in range(2)]
    assert_uncorrelated(*steps)


def test_two_generators_differ_whatever_the_global_seeds():
    def first_numbers():
        seed_everything()
        return secure_generator().random(4)

    assert not np.array_equal(first_numbers(), first_numbers())


def test_the_noise_does_not_follow_the_global_seeds():
    def noise():
        seed_everything()
        plan, empty = make(0.7), (batch_of("empty"),)
        return flat(noisy_gradient(wide_loss, wide_parameters(), empty, plan, 3, secure_generator()))

    assert_uncorrelated(noise(), noise())


# ---- divisor and empty batches ------------------------------------------------------------------------------

def test_the_divisor_is_the_expected_batch_times_C_whatever_the_batch():
    plan = make(sigma=0.0, C=0.5, expected_batch=10)
    rows = random_rows(6, norm=[0.1, 0.2, 0.5, 1.0, 2.0, 10.0])
    for batch in (rows, rows.repeat(2, 1), rows[:2], rows[:1], rows[:0]):   # 6, 12, 2, 1 and 0 examples
        private = flat(noisy_gradient(linear_loss, linear_parameters(), as_batch(batch), plan, 4,
                                      np.random.default_rng(0)))
        torch.testing.assert_close(private, clipped_sum(batch, 0.5) / (10 * 0.5), rtol=1e-12, atol=1e-15)


def test_an_empty_batch_gives_pure_noise():
    private = noisy_gradient(wide_loss, wide_parameters(), (batch_of("empty"),), make(0.7, C=0.1, expected_batch=10),
                             3, np.random.default_rng(0))
    for tensor in private.values():   # sigma C / (expected batch * C)
        assert_normal(tensor, 0.7 / 10)


def test_a_private_run_of_empty_batches_takes_all_its_steps(private_calls, optimizer_steps):
    # expected_batch is no whole number here, so that every batch is empty (but for a chance of 1e-8).
    plan = make(sigma=0.7, N=8, expected_batch=1e-9, steps=7)
    model = tiny_model()
    train.train_private(model, *tiny_data(8), private_parameter_names(model), plan, TINY)
    assert len(optimizer_steps) == 7
    assert [len(batch[0]) for _, _, batch, _ in private_calls] == [0] * 7   # nobody is drawn to fill them
    noise = [torch.cat([g.flatten() for g in gradients]) for gradients in optimizer_steps]
    for step in noise:
        assert_normal(step, 0.7 / 1e-9)
    assert_uncorrelated(noise[0], noise[1])


# ---- Poisson sampling ----------------------------------------------------------------------------------------

def assert_poisson_sampled(included: np.ndarray, q: float) -> None:
    """included, bool [steps, N]: every entry is true independently with probability q."""
    steps, N = included.shape
    var = q * (1 - q)

    def assert_chi2(value, freedom):   # two-sided: shuffling makes counts too even
        low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], freedom)
        assert low < value < high

    def assert_mean_q(x):
        assert abs(x.mean() - q) < 6 * (var / x.size) ** 0.5

    assert_mean_q(included)
    centred = included - q
    assert_chi2((centred.sum(0) ** 2).sum() / (steps * var), N)       # how often each example was drawn
    assert_chi2((centred.sum(1) ** 2).sum() / (N * var), steps)       # batch sizes: variance N q (1 - q)
    for a, b in ((centred[:, 1:], centred[:, :-1]),                   # two examples in one batch
                 (centred[:, :1], centred[:, 1:2]),
                 (centred[1:], centred[:-1])):                        # one example in successive batches
        assert abs((a * b).sum()) / var < 6 * a.size ** 0.5


def included_by(plan: PrivacyPlan, draws: list) -> np.ndarray:
    included = np.zeros((len(draws), plan.num_examples), dtype=bool)
    for row, chosen in zip(included, draws):
        row[np.asarray(chosen, dtype=np.int64)] = True   # of this type even where empty
        assert row.sum() == len(chosen)   # no example twice
    return included


@pytest.mark.parametrize("N, expected_batch", [(200, 20), (50, 35), (1000, 1)])
def test_every_example_is_included_independently_with_probability_q(N, expected_batch):
    plan, rng = make(1.0, N=N, expected_batch=expected_batch), np.random.default_rng(0)
    draws = [poisson_sample(plan, rng) for _ in range(4000)]
    assert_poisson_sampled(included_by(plan, draws), expected_batch / N)


def test_sample_rate_one_includes_everyone():
    plan, rng = make(1.0, N=50, expected_batch=50), np.random.default_rng(0)
    assert all(sorted(poisson_sample(plan, rng).tolist()) == list(range(50)) for _ in range(100))


def batches_of_a_run(private_calls, plan: PrivacyPlan) -> list[list[int]]:
    """The indices of the examples in every batch of a private run (whose gradients are not computed)."""
    private_calls.stub = True
    private_calls.clear()
    seed_everything()
    z_0 = torch.arange(float(plan.num_examples)).reshape(-1, 1, 1, 1).expand(-1, 4, 4, 4)   # example i has latent i
    train.train_private(tiny_model(), z_0, torch.zeros(plan.num_examples, dtype=torch.long), [*EMBEDDER], plan,
                        dataclasses.replace(TINY, seed=0))
    return [batch[0][:, 0, 0, 0, 0].round().int().tolist() for _, _, batch, _ in private_calls]


def test_the_batches_of_a_private_run_are_poisson_samples(private_calls):
    plan = make(1.0, N=32, expected_batch=8, steps=400)
    batches = batches_of_a_run(private_calls, plan)
    assert len(batches) == 400
    assert_poisson_sampled(included_by(plan, batches), 0.25)


def test_the_batches_of_a_private_run_do_not_follow_the_seed(private_calls):
    plan = make(1.0, N=64, expected_batch=32, steps=3)
    assert batches_of_a_run(private_calls, plan) != batches_of_a_run(private_calls, plan)


# ---- the private run as a whole -------------------------------------------------------------------------------

@pytest.mark.parametrize("engine", ["func", "ghost"])
@pytest.mark.parametrize("K", [1, 3])
def test_a_private_step_without_noise_is_the_textbook_formula(K, engine, private_calls, optimizer_steps, monkeypatch):
    """sum_i clip(mean over K draws of the gradient) / (expected batch * C), by one backward pass per draw."""
    monkeypatch.setattr(train, "secure_generator", lambda seed: np.random.default_rng(0))   # the same draws at each C

    def step(C):
        private_calls.clear()
        optimizer_steps.clear()
        seed_everything()
        model, plan = tiny_model(), make(sigma=0.0, C=C, N=5, expected_batch=5)
        names = private_parameter_names(model)
        train.train_private(model, *tiny_data(5), names, plan, dataclasses.replace(TINY, noise_draws=K, engine=engine))
        _, _, batch, used_plan = private_calls[0]
        assert used_plan is plan
        assert batch[0].shape[:2] == (5, K)   # more draws are not more examples
        # The weights have moved since: take the gradients of an untouched model.
        return gradients_one_by_one(tiny_model(), names, batch)

    C = step(1.0).norm(dim=1).median().item()   # clips some examples and not others
    expected = step(C)
    norms = expected.norm(dim=1, keepdim=True)
    assert norms.min() < 0.99 * C and norms.max() > 1.01 * C
    expected = (expected * (C / norms).clamp(max=1)).sum(0) / (5 * C)
    actual = torch.cat([g.flatten() for g in optimizer_steps[0]])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_two_private_runs_with_equal_seeds_differ():
    def trained():
        model = tiny_model()
        seed_everything()
        # Everyone is in every batch and the diffusion noise is seeded: the difference is the private noise.
        plan = make(sigma=0.7, N=4, expected_batch=4)
        train.train_private(model, *tiny_data(4), [*EMBEDDER], plan, dataclasses.replace(TINY, seed=0))
        return model.embedder.embedding.weight

    assert not torch.equal(trained(), trained())


@pytest.mark.parametrize("blocks, modules", [("all", ATTENTION), ("last:1", ATTENTION[3:]), ("from:2", ATTENTION[2:])])
def test_exactly_the_chosen_parameters_change(blocks, modules):
    model = tiny_model(randomise=False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    names = private_parameter_names(model, blocks)
    train.train_private(model, *tiny_data(4), names, make(0.7, N=4, expected_batch=4, steps=2), TINY)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == parameters_of(modules, TRANSFORMER) | EMBEDDER | SCALE


def test_a_whole_private_run_follows_the_plan_that_it_reports(tmp_path, optimizer_steps):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "data" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    save_checkpoint(tmp_path / "public.pt", tiny_model(randomise=False).float(), classes=["a", "b", "c"],
                    config=dataclasses.asdict(TINY))
    config = dataclasses.replace(TINY, private_data=str(tmp_path / "data"), expected_batch=4, epochs=2.0, eps=3.0,
                                 delta=1e-3, max_grad_norm=0.3)
    train.run_private(config, tmp_path / "public.pt", tmp_path / "private.pt")
    public, private = load_checkpoint(tmp_path / "public.pt")[0], load_checkpoint(tmp_path / "private.pt")
    plan = PrivacyPlan(**private[1]["plan"])
    assert (plan.num_examples, plan.expected_batch, plan.max_grad_norm, plan.delta) == (12, 4, 0.3, 1e-3)
    assert len(optimizer_steps) == plan.steps == 6
    assert 0.999 * 3.0 <= plan.epsilon <= 3.0
    before, after = public.state_dict(), private[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == parameters_of(ATTENTION, TRANSFORMER) | EMBEDDER | SCALE


# ---- which parameters are trained ------------------------------------------------------------------------------

@pytest.mark.parametrize("blocks, modules", [
    ("all", ATTENTION), ("last:4", ATTENTION), ("from:0", ATTENTION), ("last:1", ATTENTION[3:]),
    ("last:3", ATTENTION[1:]), ("from:1", ATTENTION[1:]), ("from:3", ATTENTION[3:]), ("last:0", []), ("from:4", [])])
def test_attention_modules_and_embedder_are_trained(blocks, modules):
    model = tiny_model()
    one_token, two_tokens = (private_parameter_names(model, blocks, context_tokens=n) for n in (1, 2))
    assert len(one_token) == len(set(one_token)) and len(two_tokens) == len(set(two_tokens))
    assert set(one_token) == parameters_of(modules, TRANSFORMER) | EMBEDDER
    assert set(two_tokens) == parameters_of(modules, TRANSFORMER | WITHOUT_EFFECT) | EMBEDDER


def test_attention_blocks_of_an_unconditional_unet_are_trained_whole():
    unet = TINY.architecture(NUM_CLASSES)["unet"] | {"context_dim": None}
    names = private_parameter_names(nn.ModuleDict({"unet": UNet(**unet)}), "last:2")
    parts = {"norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "proj_out.weight", "proj_out.bias"}
    assert set(names) == parameters_of(ATTENTION[2:], parts)


@pytest.mark.parametrize("blocks", ["", "none", "ALL", "all:1", "last", "last:", "last:5", "from:5", "last:-1",
                                    "last:1.5", "from:two", "first:1", "3", "last:1:1"])
def test_nonsense_for_the_attention_blocks_is_refused(blocks):
    with pytest.raises(ValueError, match="attention blocks"):
        private_parameter_names(tiny_model(), blocks)


def test_with_one_context_token_the_parameters_left_out_have_no_effect():
    """Exactly the trained parameters of the attention modules have a gradient; the others' is exactly zero."""
    model = tiny_model()
    draws = train.noise_draws(model, *tiny_data(4), 1, 0.0, np.random.default_rng(0))
    model(*(x[:, 0] for x in draws)).sum().backward()
    candidates = private_parameter_names(model, context_tokens=2)
    gradients = {name: p.grad for name, p in model.named_parameters() if name in set(candidates)}
    assert {name for name, g in gradients.items() if g.any()} == set(private_parameter_names(model, context_tokens=1))


@pytest.mark.parametrize("tokens, effect", [(1, False), (2, True)])
def test_the_parameters_left_out_have_an_effect_from_two_context_tokens_on(tokens, effect):
    model = tiny_model()
    left_out = {*private_parameter_names(model, context_tokens=2)} - {*private_parameter_names(model, context_tokens=1)}
    assert left_out == parameters_of(ATTENTION, WITHOUT_EFFECT)
    g = torch.Generator().manual_seed(3)
    z_t = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=g)
    context = torch.randn(2, tokens, 8, dtype=torch.float64, generator=g)
    model.unet(z_t, torch.tensor([10, 500]), context).square().sum().backward()
    for name, p in model.named_parameters():
        if name in left_out:
            assert bool(p.grad.any()) == effect, name


# ---- the plan ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N, expected_batch, epochs, target, steps", [
    (20_000, 1_024, 4.0, 1.0, 78), (60_000, 600, 0.5, 10.0, 50), (1_000, 1_000, 3.0, 0.2, 3),
    (1_000, 900, 0.01, 5.0, 1)])
def test_the_plan_spends_the_budget_and_never_more(N, expected_batch, epochs, target, steps):
    plan = make_plan(N, expected_batch, epochs, 0.1, target, 1e-5)
    assert plan.sample_rate == expected_batch / N
    assert plan.steps == steps
    assert 0.999 * target <= plan.epsilon <= target
    assert plan.epsilon == accountant.epsilon(expected_batch / N, plan.noise_multiplier, steps, 1e-5)
    assert (plan.num_examples, plan.expected_batch, plan.max_grad_norm, plan.delta) == (N, expected_batch, 0.1, 1e-5)


def test_the_plan_cannot_be_changed_during_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(1.0).noise_multiplier = 0.0


@pytest.mark.parametrize("wrong, message", [
    *[(dict(expected_batch=v), "expected batch") for v in (101, 0, -5)],
    *[(dict(target_epsilon=v), "target_epsilon") for v in (0.0, -1.0, math.inf, math.nan)],
    *[(dict(delta=v), "delta") for v in (0.0, 1.0, -1e-5, 2.0, math.nan)],
    *[(dict(max_grad_norm=v), "max_grad_norm") for v in (0.0, -0.1, math.inf, math.nan)],
    *[(dict(epochs=v), "epochs") for v in (0.0, -1.0, math.inf, math.nan)]])
def test_a_plan_that_makes_no_sense_is_refused(wrong, message):
    right = dict(num_examples=100, expected_batch=10, epochs=1.0, max_grad_norm=0.1, target_epsilon=1.0, delta=1e-5)
    with pytest.raises(ValueError, match=message):
        make_plan(**{**right, **wrong})
