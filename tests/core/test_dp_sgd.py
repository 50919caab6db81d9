"""The rules that the privacy of the private stage rests on.

Most tests use a loss that is linear in its parameters: an example's gradient is the example itself,
so that norms are known exactly. Others send the tiny model through train.train_private.

Where a test takes the fixture `mechanism`, `pytest --mechanism NAME` puts a broken copy of audit.py
under it. docs/threat-model.md says which test must fail on which copy.
"""
# ruff: noqa: N802 - C is the clipping norm, also in the names of tests

import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import accountant
import dp_sgd
import train
from audit import Mechanism
from dp_sgd import (
    PrivacyPlan,
    Tensors,
    add_noise,
    in_chunks,
    make_plan,
    per_example_gradients,
    poisson_sample,
    private_parameter_names,
    secure_generator,
)
from ldm import LatentDiffusion, sample_t_and_noise
from tiny import (
    ATTENTION,
    EMBEDDER,
    SCALE,
    TRANSFORMER,
    WITHOUT_EFFECT,
    assert_poisson_sampled,
    configure,
    flat,
    included_by,
    parameters_of,
    seed_everything,
    tiny_data,
    tiny_model,
)
from variants import ghost

aten = torch.ops.aten
both_engines = pytest.mark.parametrize("engine", [dp_sgd, ghost], ids=["vmap", "ghost"])


# ---- a loss with known gradients ---------------------------------------------------------------

SHAPES = {"unet.a.weight": (3, 2), "unet.b.weight": (1, 4), "embedder.embedding.weight": (5, 1)}
WIDE = {"unet.weight": (100, 100), "embedder.weight": (100, 100)}   # enough to measure a deviation
SIZE = sum(math.prod(shape) for shape in SHAPES.values())


class LinearLoss(nn.Module):
    """The sum of <theta, x> over all parameters theta, which have the given names.

    forward(one x [K, *shape] per parameter) -> losses [K]. The parameters are weights of linear
    layers, so that either engine can be put under a test: a layer maps unit vectors to its weight.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]]):
        super().__init__()
        self.paths = [name.removesuffix(".weight") for name in shapes]
        for path, (outputs, inputs) in zip(self.paths, shapes.values()):
            parent, module = path.rpartition(".")[0], self
            if parent:
                module = getattr(self, parent, nn.Module())
                self.add_module(parent, module)
            layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
            module.add_module(path.rpartition(".")[2], layer)
        self.requires_grad_(False)

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        losses = 0
        for path, x in zip(self.paths, batch, strict=True):
            units = torch.eye(x.shape[2], dtype=x.dtype).expand(len(x), -1, -1)
            losses = losses + (self.get_submodule(path)(units) * x.mT).sum((1, 2))
        return losses


def zeros(shapes: dict[str, tuple[int, int]], dtype: torch.dtype = torch.float64) -> Tensors:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def as_batch(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows [B, K, SIZE], or [B, SIZE] with K = 1 -> the batch with these gradients."""
    rows = rows if rows.dim() == 3 else rows[:, None]
    parts = rows.split([math.prod(shape) for shape in SHAPES.values()], dim=2)
    return tuple(part.unflatten(2, shape) for part, shape in zip(parts, SHAPES.values()))


def random_rows(count: int, norm: object = 1.0, seed: int = 0) -> torch.Tensor:
    """Gradients [count, SIZE] in random directions, of the given norm or norms."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, SIZE, dtype=torch.float64, generator=generator)
    norm = torch.as_tensor(norm, dtype=torch.float64).reshape(-1, 1)
    return rows / rows.norm(dim=1, keepdim=True) * norm


def plan_with(sigma: float, C: float = 0.5, N: int = 100, expected_batch: float = 10,
              steps: int = 1) -> PrivacyPlan:
    return PrivacyPlan(N, expected_batch, steps, sigma, C, 1e-5)


@pytest.fixture
def clipped_sum(mechanism: Callable) -> Callable:
    """The mechanism's clipped sum of rows, flattened: a function (rows, C, chunk)."""
    def of_rows(rows: torch.Tensor, C: float, chunk: int = 4) -> torch.Tensor:
        batch, parameters = as_batch(rows), zeros(SHAPES, rows.dtype)
        return flat(mechanism(chunk).clipped_sum(LinearLoss(SHAPES), parameters, batch, C))
    return of_rows


# ---- the tiny model ----------------------------------------------------------------------------

def gradient_of_one(model: LatentDiffusion, names: list[str], draw: tuple[torch.Tensor, ...],
                    embedder_scale: float) -> torch.Tensor:
    """The gradient of one draw, flattened, by an ordinary backward pass."""
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    loss = model(*(x[None] for x in draw)).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    scales = [embedder_scale if name.startswith("embedder.") else 1.0 for name in names]
    return torch.cat([scale * g.flatten() for scale, g in zip(scales, gradients)])


def gradients_one_by_one(model: LatentDiffusion, names: list[str], batch: tuple[torch.Tensor, ...],
                         embedder_scale: float = 1.0) -> torch.Tensor:
    """[B, number of parameters]: the mean over each example's K draws, one pass for each draw."""
    return torch.stack([
        torch.stack([gradient_of_one(model, names, draw, embedder_scale) for draw in zip(*example)])
        .mean(0) for example in zip(*batch)])


def draws(model: LatentDiffusion, count: int, K: int) -> tuple[torch.Tensor, ...]:
    """What the model's loss takes, [count, K, ...], in the model's precision."""
    z_0, labels = tiny_data(count)
    batch = sample_t_and_noise(model, z_0, labels, K, 0.1, np.random.default_rng(0))
    return tuple(x.to(model.latent_scale.dtype) if x.is_floating_point() else x for x in batch)


def run(model: LatentDiffusion, names: list[str], plan: PrivacyPlan, rng: np.random.Generator,
        *settings: str, **parts: Callable) -> None:
    """train_private on tiny data. parts: sample, clipped_sum, add_noise, where they matter."""
    train.train_private(model, *tiny_data(plan.num_examples), names, plan, configure(*settings),
                        rng, **parts)


# ---- gradients of single examples --------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 3])
def test_per_example_gradients_equal_one_pass_each(K):
    model = tiny_model()
    names, batch = private_parameter_names(model), draws(model, 4, K)
    ours = per_example_gradients(model, {n: model.get_parameter(n).detach() for n in names}, batch)
    ours = torch.cat([g.flatten(1) for g in ours.values()], dim=1)
    assert ours.abs().max() > 1e-3
    expected = gradients_one_by_one(model, names, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_no_layer_computes_statistics_over_the_batch():
    norms = {type(m) for m in tiny_model().modules() if "norm" in type(m).__name__.lower()}
    assert norms == {nn.GroupNorm, nn.LayerNorm}


# ---- clipping ----------------------------------------------------------------------------------

def test_a_huge_gradient_contributes_exactly_C(clipped_sum):
    huge = random_rows(1, norm=1000 * 0.5)
    torch.testing.assert_close(clipped_sum(huge, C=0.5), huge[0] / 1000, rtol=1e-12, atol=0)


def test_gradients_below_C_pass_unchanged(clipped_sum):
    rows = random_rows(5, norm=[0.0, 1e-9, 0.01, 0.3, 0.4999])
    torch.testing.assert_close(clipped_sum(rows, C=0.5), rows.sum(0), rtol=1e-12, atol=1e-15)


def test_the_norm_is_taken_over_all_parameters_jointly(clipped_sum):
    # Every tensor alone has norm 0.9 C, all three together sqrt(3) * 0.9 C.
    parts = [torch.ones(1, math.prod(shape), dtype=torch.float64) for shape in SHAPES.values()]
    row = torch.cat([0.9 * part / part.norm() for part in parts], dim=1)
    torch.testing.assert_close(clipped_sum(row, C=1.0), row[0] / row.norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_each_parameter_counts_in_the_joint_norm(name, clipped_sum):
    # One tensor holds nearly all of the gradient. It scales the others down with it.
    row = torch.cat([torch.full((1, math.prod(shape)), 1000.0 if other == name else 1.0)
                     for other, shape in SHAPES.items()], dim=1).double()
    torch.testing.assert_close(clipped_sum(row, C=1.0), row[0] / row.norm(), rtol=1e-12, atol=0)


def test_clipping_comes_before_the_sum(clipped_sum):
    def assert_sum(rows: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(clipped_sum(rows, C=0.5), expected, rtol=1e-12, atol=1e-12)

    aligned = random_rows(1, norm=5.0).expand(10, -1)
    assert_sum(aligned, aligned[0])   # ten examples of norm 10 C add up to 10 C, not to C
    big, small = random_rows(2, norm=[500.0, 0.2])
    assert_sum(torch.stack([big, small]), big / 1000 + small)   # an outlier scales only itself down
    other = small - big
    assert_sum(torch.stack([big, other]), big / 1000 + 0.5 * other / other.norm())   # they cancel


def test_the_mean_over_the_draws_is_clipped(clipped_sum):
    # Two draws of norm 100 C that nearly cancel: their mean is below C and passes unchanged.
    big, small = random_rows(2, norm=[50.0, 0.2])
    one_example = torch.stack([big + small, small - big])[None]   # K = 2
    torch.testing.assert_close(clipped_sum(one_example, C=0.5), small, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_differ_by_at_most_C(seed, clipped_sum):
    C = 0.5
    base = random_rows(6, norm=10 ** torch.linspace(-3, 6, 6), seed=seed)
    total = clipped_sum(base, C)
    spike = torch.zeros(1, SIZE, dtype=torch.float64)
    spike[0, -1] = 1e10
    added = [*random_rows(4, norm=[1e-6, C, 1.0, 1e6], seed=100 + seed).split(1), spike,
             -1e3 * total[None], 1e3 * total[None], base[-1:], -base[-1:],
             torch.full_like(spike, 1e12)]
    for row in added:
        for place, chunk in ((0, 1), (3, 4), (6, 7)):
            neighbour = torch.cat([base[:place], row, base[place:]])
            assert (clipped_sum(neighbour, C, chunk) - total).norm() <= C * (1 + 1e-12)


def test_a_gradient_whose_square_overflows_contributes_C(clipped_sum):
    row = torch.full((1, SIZE), 1e30)   # its squared norm is inf in float32
    assert clipped_sum(row, C=0.5).norm().item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_contributes_nothing(value, clipped_sum):
    rows = random_rows(3)
    broken = rows.clone()
    broken[1, 0] = value
    expected = clipped_sum(rows[[0, 2]], 0.5)
    for chunk in (1, 2, 3):
        torch.testing.assert_close(clipped_sum(broken, 0.5, chunk), expected, rtol=0, atol=1e-14)


class TensorCores(TorchDispatchMode):
    """Multiplies float32 matrices as GPUs do: with bfloat16's digits where the caller allows it."""
    rounded = 0

    def __torch_dispatch__(self, operation: object, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        products = aten.mm, aten.bmm, aten.addmm, aten.mv, aten.baddbmm
        reduced = torch.get_float32_matmul_precision() != "highest"
        if reduced and operation.overloadpacket in products:
            single = [isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in args]
            args = [x.bfloat16().float() if is_single else x
                    for x, is_single in zip(args, single)]
            self.rounded += any(single)
        return operation(*args, **kwargs or {})


@pytest.fixture
def fewer_digits() -> object:
    """The caller allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@both_engines
@pytest.mark.parametrize("K", [1, 40])   # 40: ghost clipping takes explicit gradients too
def test_norms_and_sums_have_all_digits(K, engine, fewer_digits):
    model = tiny_model().float().requires_grad_(False)
    parameters = {name: model.get_parameter(name) for name in private_parameter_names(model)}
    batch = draws(model, 3, K)
    for i in range(3):
        one = tuple(x[i:i + 1] for x in batch)
        with TensorCores() as cores:
            total = engine.clipped_gradient_sum(model, parameters, one, 1e-3)
        # Rounding is counted against the example.
        assert 1e-3 * (1 - 2e-5) < flat(total).norm().item() <= 1e-3
        assert cores.rounded   # the networks' own products stay fast


class Product(nn.Module):
    """The sum over tokens of <y_t, W x_t>: a product of x_t and y_t is a gradient of W."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * y).sum((1, 2))


def product_sum(engine: object, x: torch.Tensor, y: torch.Tensor, C: float,
                chunk: int = 256) -> torch.Tensor:
    """The clipped sum for W, of x [B, T, inputs] and y [B, T, outputs]."""
    model = Product(x.shape[2], y.shape[2])
    engine_sum = in_chunks(engine.clipped_gradient_sum, chunk)
    return flat(engine_sum(model, dict(model.named_parameters()), (x[:, None], y[:, None]), C))


@both_engines
def test_the_norm_of_a_large_layer_is_not_low(engine):
    """A norm of 7 million squares, in float32, is low by 2e-4."""
    torch.manual_seed(0)
    x, y = torch.randn(1, 1024, 960), torch.randn(1, 1024, 7680)
    assert 1 - 1e-3 < product_sum(engine, x, y, C=1.0).norm() <= 1


@both_engines
@pytest.mark.parametrize("k", [9, 11, 12])
@pytest.mark.parametrize("chunk", [256, 10_000])
def test_rounding_moves_no_sum_by_more_than_C(engine, k, chunk):
    """After 2^k ones a float32 sum rounds all the small gradients up, or all of them down."""
    ones, small = torch.ones(2**k - 1, 1, 1), torch.full((2**k, 1, 1), 2.0**(k - 24) * (1 + 2**-20))
    rows = torch.cat([ones, small])
    one, other = (product_sum(engine, x, torch.ones_like(x), 1.0, chunk)
                  for x in (rows, torch.cat([ones[:1], rows])))
    assert (one - other).norm() <= 1 + 1e-12


@both_engines
@pytest.mark.parametrize("chunk", [5, 100])
def test_sums_have_the_digits_of_float64(engine, chunk):
    torch.manual_seed(0)
    x = torch.randn(100, 1, 3)
    total = product_sum(engine, x, torch.ones(100, 1, 2), math.inf, chunk)
    torch.testing.assert_close(total, x.double().sum(0).repeat(1, 2)[0], rtol=1e-13, atol=0)


@both_engines
def test_no_product_of_tiny_numbers_is_lost(engine):
    """The squares of y's numbers are 0 in float32."""
    x, y = torch.full((1, 1, 4), 1e18), torch.full((1, 1, 3), 1e-23)
    assert product_sum(engine, x, y, C=1e-6).norm().item() == pytest.approx(1e-6, rel=1e-6)


def test_what_is_clipped_to_leaves_room_for_rounding():
    plan = plan_with(1.0, C=0.5, N=60_000)
    assert plan.clip_to * (1 + 60_000 / 2**27) == pytest.approx(0.5, rel=1e-15)
    assert plan.max_grad_norm == 0.5


# ---- chunks ------------------------------------------------------------------------------------

def test_the_clipped_sum_does_not_depend_on_the_chunks(clipped_sum):
    rows = random_rows(7, norm=[0.1, 0.2, 0.5, 1.0, 2.0, 10.0, 1e4])
    expected = clipped_sum(rows, 0.5, 7)
    for chunk in (1, 2, 3, 100):
        total = clipped_sum(rows, 0.5, chunk)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_no_chunk_is_larger_than_told(recorded):
    recorded.stub = True
    in_chunks(recorded, 3)(None, zeros(SHAPES), as_batch(random_rows(8)), 0.5)
    assert [len(batch[0]) for _, _, batch, _ in recorded] == [3, 3, 2]
    assert {C for *_, C in recorded} == {0.5}


def test_an_empty_batch_sums_to_zero_without_a_call(recorded):
    parameters = {name: p + 1 for name, p in zeros(SHAPES, torch.float32).items()}
    total = in_chunks(recorded, 3)(None, parameters, as_batch(random_rows(8)[:0]), 0.5)
    assert total.keys() == parameters.keys() and not recorded
    for name, s in total.items():
        assert torch.equal(s, 0 * parameters[name].double())


# ---- noise -------------------------------------------------------------------------------------

def batch_of(kind: str) -> tuple[torch.Tensor, ...]:
    """A batch for WIDE."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 1, 100, 100, dtype=torch.float64, generator=generator)
    x = {"empty": x[:0], "zero": 0 * x, "small": 1e-4 * x, "huge": 1e6 * x}[kind]
    return x, x


def noise_of(mechanism: Mechanism, plan: PrivacyPlan, batch: tuple[torch.Tensor, ...],
             rng: np.random.Generator | None = None) -> Tensors:
    """What the mechanism adds to the sum of the clipped gradients, the divisor undone."""
    model, rng = LinearLoss(WIDE), rng or np.random.default_rng(0)
    private = mechanism.step(model, zeros(WIDE), batch, plan, rng)
    exact = mechanism.clipped_sum(model, zeros(WIDE), batch, plan.max_grad_norm)
    divisor = plan.expected_batch * plan.max_grad_norm
    return {name: private[name] * divisor - exact[name] for name in exact}


def assert_normal(noise: torch.Tensor, std: float) -> None:
    """Independent N(0, std^2) numbers fail here by chance about once in 1e8."""
    x = noise.flatten().double().numpy() / std
    low, high = stats.chi2.ppf([1e-9, 1 - 1e-9], len(x)) / len(x)
    assert low < np.mean(x**2) < high
    assert abs(x.mean()) * len(x) ** 0.5 < 6
    assert stats.kstest(x, "norm").pvalue > 1e-9


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.flatten().double(), b.flatten().double()
    assert abs(a @ b / (a.norm() * b.norm())) * len(a) ** 0.5 < 6


@pytest.mark.parametrize("sigma, C", [(1.0, 1.0), (0.7, 0.1), (3.0, 2.0)])
def test_the_noise_on_the_sum_has_standard_deviation_sigma_times_C(sigma, C, mechanism):
    for tensor in noise_of(mechanism(3), plan_with(sigma, C), batch_of("small")).values():
        assert_normal(tensor, sigma * C)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_the_noise_is_added_once_whatever_the_chunk_size(chunk, mechanism):
    for tensor in noise_of(mechanism(chunk), plan_with(0.7), batch_of("small")).values():
        assert_normal(tensor, 0.7 * 0.5)


@pytest.mark.parametrize("kind", ["empty", "zero", "huge"])
def test_the_noise_does_not_depend_on_the_batch(kind, mechanism):
    for tensor in noise_of(mechanism(3), plan_with(0.7), batch_of(kind)).values():
        assert_normal(tensor, 0.7 * 0.5)


def test_the_noise_of_parameters_and_steps_is_independent(mechanism):
    rng, step = np.random.default_rng(0), mechanism(3)
    one, other = (noise_of(step, plan_with(0.7), batch_of("zero"), rng) for _ in range(2))
    assert_uncorrelated(one["unet.weight"], one["embedder.weight"])
    assert_uncorrelated(one["unet.weight"], one["unet.weight"].roll(1))
    assert_uncorrelated(flat(one), flat(other))


def test_the_noise_does_not_follow_the_global_seeds(mechanism, new_generator):
    def noise() -> torch.Tensor:
        seed_everything()
        return flat(noise_of(mechanism(3), plan_with(0.7), batch_of("empty"), new_generator()))

    assert_uncorrelated(noise(), noise())


def test_tensors_of_all_dimensions_have_noise():
    total = {str(shape): torch.zeros(shape, dtype=torch.float64)
             for shape in ((5000,), (50, 100), (50, 10, 10, 1))}
    noisy = add_noise(total, plan_with(0.7, expected_batch=1), np.random.default_rng(0))
    for tensor in noisy.values():
        assert_normal(tensor, 0.7)


def test_the_low_bits_of_the_noisy_sum_are_gone():
    """Where noise and sum have their own last bits, these give the sum away (Mironov 2012)."""
    total = {"": 1e-3 * torch.rand(1000, dtype=torch.float64)}
    plan = plan_with(sigma=0.7, C=0.5, expected_batch=8)   # 8 C is a power of two: exact
    noisy = add_noise(total, plan, np.random.default_rng(0))[""] * 8 * 0.5
    grid = 2.0**-22   # the power of two next to 2^-20 sigma C
    assert torch.equal(noisy, (noisy / grid).round() * grid)
    assert not torch.equal(noisy, (noisy / grid / 2).round() * grid * 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_noisy_sum_that_is_not_finite_is_refused(value):
    total = zeros(SHAPES)
    total["unet.b.weight"][0, 2] = value
    with pytest.raises(ValueError, match="not finite: .* diverged"):
        add_noise(total, plan_with(0.7), np.random.default_rng(0))


# ---- divisor and empty batches -----------------------------------------------------------------

def test_the_divisor_is_the_expected_batch_times_C_whatever_the_batch(mechanism, clipped_sum):
    plan, rng = plan_with(sigma=0.0, C=0.5, expected_batch=10), np.random.default_rng(0)
    rows = random_rows(6, norm=[0.1, 0.2, 0.5, 1.0, 2.0, 10.0])
    for batch in (rows, rows.repeat(2, 1), rows[:2], rows[:1], rows[:0]):
        private = mechanism(4).step(LinearLoss(SHAPES), zeros(SHAPES), as_batch(batch), plan, rng)
        expected = clipped_sum(batch, plan.clip_to) / (10 * 0.5)
        torch.testing.assert_close(flat(private), expected, rtol=0, atol=2**-20 / 10)   # rounded


def test_an_empty_batch_gives_pure_noise(mechanism):
    plan = plan_with(0.7, C=0.1, expected_batch=10)
    private = mechanism(3).step(LinearLoss(WIDE), zeros(WIDE), batch_of("empty"), plan,
                                np.random.default_rng(0))
    for tensor in private.values():   # sigma C / (expected batch * C)
        assert_normal(tensor, 0.7 / 10)


def test_a_run_of_empty_batches_takes_all_its_steps(mechanism, recorded, optimizer_steps):
    # With this expected batch every batch is empty, but for a chance of 1e-8.
    plan, model = plan_with(sigma=0.7, N=8, expected_batch=1e-9, steps=7), tiny_model()
    step = mechanism(3)
    recorded.clipped_sum = step.clipped_sum
    run(model, private_parameter_names(model), plan, np.random.default_rng(0),
        **vars(step) | {"clipped_sum": recorded})
    assert len(optimizer_steps) == 7
    assert [len(batch[0]) for _, _, batch, _ in recorded] == [0] * 7   # nobody fills them
    noise = [torch.cat([g.flatten() for g in gradients]) for gradients in optimizer_steps]
    for step in noise:
        assert_normal(step, 0.7 / 1e-9)
    assert_uncorrelated(noise[0], noise[1])


# ---- the generator and Poisson sampling --------------------------------------------------------

@pytest.fixture
def system_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Let the operating system's generator return these 64-bit numbers again and again.

    Returns a list that grows by the number of bytes of each request.
    """
    def replaced(*numbers: int) -> list[int]:
        requests, source = [], b"".join(number.to_bytes(8, "little") for number in numbers)

        def urandom(count: int) -> bytes:
            requests.append(count)
            return (source * count)[:count]

        monkeypatch.setattr(os, "urandom", urandom)
        return requests
    return replaced


def test_every_number_takes_64_bits_of_the_system_s(system_bytes):
    requests, rng = system_bytes(12345), secure_generator()
    assert rng.random(4).shape == (4,) and rng.random((2, 3)).shape == (2, 3)
    assert rng.standard_normal((2, 3)).dtype == np.float64
    assert rng.standard_normal([2, 3], dtype=np.float32).dtype == np.float32
    assert requests == [8 * count for count in (4, 6, 6, 6)]


def test_uniform_numbers_are_multiples_of_2_to_the_minus_53(system_bytes):
    system_bytes(0, 2**64 - 1, 2**63, 2**11)
    assert secure_generator().random(4).tolist() == [0.0, 1 - 2.0**-53, 0.5, 2.0**-53]


def test_normal_numbers_reach_as_far_as_63_bits(system_bytes):
    system_bytes(0, 1, 2**64 - 1, 2**63)
    high, low, middle, quarter = secure_generator().standard_normal(4)
    assert high == -low == pytest.approx(-stats.norm.ppf(2.0**-65), rel=1e-12)   # 9.2
    assert abs(middle) < 1e-15 and quarter == pytest.approx(-stats.norm.ppf(0.25), rel=1e-12)


def test_the_system_s_numbers_are_uniform_and_normal():
    rng = secure_generator()
    assert stats.kstest(rng.random(20_000), "uniform").pvalue > 1e-9
    for dtype in (np.float32, np.float64):
        assert_normal(torch.from_numpy(rng.standard_normal((100, 200), dtype)), 1.0)


def test_generators_differ_whatever_the_global_seeds():
    def first_numbers() -> np.ndarray:
        seed_everything()
        return secure_generator().random(4)

    assert not np.array_equal(first_numbers(), first_numbers())


def test_only_an_insecure_seed_repeats_the_numbers():
    one, again, other = (secure_generator(seed).random(4) for seed in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.parametrize("N, expected_batch", [(200, 20), (50, 35), (1000, 1)])
def test_every_example_is_included_with_probability_q(N, expected_batch):
    plan, rng = plan_with(1.0, N=N, expected_batch=expected_batch), np.random.default_rng(0)
    batches = [poisson_sample(plan, rng) for _ in range(4000)]
    assert_poisson_sampled(included_by(plan, batches), expected_batch / N)


def test_sample_rate_one_includes_everyone():
    plan, rng = plan_with(1.0, N=50, expected_batch=50), np.random.default_rng(0)
    everyone = list(range(50))
    assert all(sorted(poisson_sample(plan, rng).tolist()) == everyone for _ in range(100))


@pytest.fixture
def batches_of_a_run(mechanism: Callable, recorded: list, new_generator: Callable) -> Callable:
    """The examples in every batch of a private run, whose gradients are not computed."""
    def of_plan(plan: PrivacyPlan) -> list[list[int]]:
        recorded.stub = True
        recorded.clear()
        seed_everything()
        N = plan.num_examples
        z_0 = torch.arange(float(N)).reshape(-1, 1, 1, 1).expand(-1, 4, 4, 4)   # i has latent i
        train.train_private(tiny_model(), z_0, torch.zeros(N, dtype=torch.long), [*EMBEDDER], plan,
                            configure(), new_generator(), sample=mechanism(3).sample,
                            clipped_sum=recorded)
        return [batch[0][:, 0, 0, 0, 0].round().int().tolist() for _, _, batch, _ in recorded]
    return of_plan


def test_the_batches_of_a_private_run_are_poisson_samples(batches_of_a_run):
    plan = plan_with(1.0, N=32, expected_batch=8, steps=400)
    batches = batches_of_a_run(plan)
    assert len(batches) == 400
    assert_poisson_sampled(included_by(plan, batches), 0.25)


def test_the_batches_do_not_follow_the_global_seeds(batches_of_a_run):
    plan = plan_with(1.0, N=64, expected_batch=32, steps=3)
    assert batches_of_a_run(plan) != batches_of_a_run(plan)


# ---- the private loop --------------------------------------------------------------------------

@both_engines
@pytest.mark.parametrize("K", [1, 3])
def test_a_step_without_noise_is_the_textbook_formula(K, engine, recorded, optimizer_steps):
    """The sum of clip(mean over K draws of the gradient) / (expected batch * C)."""
    recorded.clipped_sum = in_chunks(engine.clipped_gradient_sum, 3)

    def gradients(C: float) -> torch.Tensor:
        recorded.clear()
        optimizer_steps.clear()
        model, plan = tiny_model(), plan_with(sigma=0.0, C=C, N=5, expected_batch=5)
        names = private_parameter_names(model)
        run(model, names, plan, np.random.default_rng(0), f"private.noise_multiplicity={K}",
            clipped_sum=recorded)
        [(_, _, batch, used)] = recorded
        assert used == plan.clip_to
        assert all(x.shape[:2] == (5, K) for x in batch)   # more draws are not more examples
        # The weights have moved since: take the gradients of an untouched model.
        return gradients_one_by_one(tiny_model(), names, batch, embedder_scale=7.0)

    C = gradients(1.0).norm(dim=1).median().item()   # clips some examples and not others
    expected = gradients(C)
    norms = expected.norm(dim=1, keepdim=True)
    assert norms.min() < 0.99 * C and norms.max() > 1.01 * C
    expected = (expected * (C / norms).clamp(max=1)).sum(0) / (5 * C)
    actual = torch.cat([g.flatten() for g in optimizer_steps[0]])
    # The sum is C times this, rounded to multiples of about 2^-20 C: without noise C is the unit.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2**-20 / 5)


def test_a_private_run_draws_the_time_steps_it_is_told(recorded):
    recorded.stub = True
    run(tiny_model(), [*EMBEDDER], plan_with(1.0, N=5, expected_batch=5, steps=4),
        np.random.default_rng(0), "private.timesteps=[500, 501]", "private.noise_multiplicity=4",
        clipped_sum=recorded)
    t = torch.cat([batch[1].flatten() for _, _, batch, _ in recorded])
    assert (t == 500).float().mean() > 0.6


def test_the_draws_do_not_follow_the_global_seeds(recorded, new_generator):
    """Whoever knew the draws would see all that follow an added example shift by one place."""
    recorded.stub = True
    for _ in range(2):
        seed_everything()
        run(tiny_model(), [*EMBEDDER], plan_with(1.0, N=4, expected_batch=4), new_generator(),
            clipped_sum=recorded)
    one, other = (batch for _, _, batch, _ in recorded)
    for place in (1, 2):   # t, eps
        assert not torch.equal(one[place], other[place])


def test_two_private_runs_with_equal_seeds_differ(mechanism, new_generator):
    def trained() -> torch.Tensor:
        model = tiny_model()
        seed_everything()
        run(model, [*EMBEDDER], plan_with(sigma=0.7, N=4, expected_batch=4), new_generator(),
            **vars(mechanism(3)))
        return model.embedder.embedding.weight

    assert not torch.equal(trained(), trained())


def test_only_attention_and_embedder_change(mechanism):
    model = tiny_model(randomise=False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    run(model, private_parameter_names(model), plan_with(0.7, N=4, expected_batch=4, steps=2),
        np.random.default_rng(0), **vars(mechanism(3)))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == parameters_of(ATTENTION, TRANSFORMER) | EMBEDDER | SCALE


# ---- which parameters are private --------------------------------------------------------------

@pytest.mark.parametrize("tokens, names", [(1, TRANSFORMER), (2, TRANSFORMER | WITHOUT_EFFECT)])
def test_attention_and_embedder_are_private(tokens, names):
    found = private_parameter_names(tiny_model(), tokens)
    assert {*found} == parameters_of(ATTENTION, names) | EMBEDDER and len(found) == len({*found})


def test_with_one_token_just_the_private_ones_have_gradients():
    """The gradient of the others in the attention modules is exactly zero."""
    model = tiny_model()
    model(*(x[:, 0] for x in draws(model, 4, 1))).sum().backward()
    candidates = {*private_parameter_names(model, context_tokens=2)}
    having = {name for name in candidates if model.get_parameter(name).grad.any()}
    assert having == {*private_parameter_names(model, context_tokens=1)}


@pytest.mark.parametrize("tokens, effect", [(1, False), (2, True)])
def test_what_is_left_out_has_an_effect_from_two_tokens_on(tokens, effect):
    model, generator = tiny_model(), torch.Generator().manual_seed(3)
    z_t, context = (torch.randn(2, *shape, dtype=torch.float64, generator=generator)
                    for shape in ((4, 4, 4), (tokens, 8)))
    model.unet(z_t, torch.tensor([10, 500]), context).square().sum().backward()
    for name in parameters_of(ATTENTION, WITHOUT_EFFECT):
        assert bool(model.get_parameter(name).grad.any()) == effect, name


# ---- the plan ----------------------------------------------------------------------------------

@pytest.mark.parametrize("N, expected_batch, epochs, epsilon, steps", [
    (20_000, 1_024, 4.0, 1.0, 78), (60_000, 600, 0.5, 10.0, 50), (1_000, 1_000, 3.0, 0.2, 3),
    (1_000, 900, 0.01, 5.0, 1)])
def test_the_plan_spends_the_budget_and_never_more(N, expected_batch, epochs, epsilon, steps):
    plan = make_plan(N, expected_batch, epochs, 0.1, epsilon, 1e-5)
    assert plan.sample_rate == expected_batch / N
    assert 0.999 * epsilon <= plan.epsilon <= epsilon
    assert plan.epsilon == accountant.epsilon(expected_batch / N, plan.noise_multiplier, steps,
                                              1e-5)
    expected = PrivacyPlan(N, expected_batch, steps, plan.noise_multiplier, 0.1, 1e-5)
    assert plan == expected


def test_the_plan_and_what_was_spent_stay_within_the_budget():
    spent = [(0.05, 1.5, 20), (0.01, 2.0, 7)]
    plan = make_plan(1_000, 100, 2.0, 0.1, 3.0, 1e-5, spent=spent)
    own = plan.sample_rate, plan.noise_multiplier, plan.steps
    assert 0.999 * 3.0 <= accountant.total_epsilon([*spent, own], 1e-5) <= 3.0
    alone = make_plan(1_000, 100, 2.0, 0.1, 3.0, 1e-5)
    assert plan.noise_multiplier > alone.noise_multiplier and plan.epsilon < alone.epsilon


def test_the_plan_cannot_be_changed_during_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_with(1.0).noise_multiplier = 0.0


@pytest.mark.parametrize("wrong, message", [
    *[(dict(expected_batch=v), "expected batch") for v in (101, 0, -5)],
    *[(dict(epsilon=v), "epsilon") for v in (0.0, -1.0, math.inf, math.nan)],
    *[(dict(delta=v), "delta") for v in (0.0, 1.0, -1e-5, 2.0, math.nan)],
    *[(dict(max_grad_norm=v), "max_grad_norm") for v in (0.0, -0.1, 1e-13, math.inf, math.nan)],
    *[(dict(epochs=v), "epochs") for v in (0.0, -1.0, 1e9, math.inf, math.nan)],
    (dict(spent=[(0.1, 1.0, 1000)]), "have spent epsilon .* epsilon 0 remains")])
def test_a_plan_that_makes_no_sense_is_refused(wrong, message):
    right = dict(num_examples=100, expected_batch=10, epochs=1.0, max_grad_norm=0.1, epsilon=1.0,
                 delta=1e-5)
    with pytest.raises(ValueError, match=message) as refused:
        make_plan(**right | wrong)
    assert "--" not in str(refused.value)
