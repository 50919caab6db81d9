"""Ghost clipping gives the clipped sum of dp_sgd.py, which test_dp_sgd.py checks by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import dp_sgd
from ldm import sample_t_and_noise
from runtime import engines
from runtime.config import Config
from tiny import ATTENTION, flat, tiny_data, tiny_model
from variants import ghost
from variants.lora import add_lora
from variants.trainable import private_parameter_names


def clipped_sum(model: nn.Module, names: list[str], batch: tuple[torch.Tensor, ...], C: float,
                chunk: int = 3, engine: object = ghost) -> dp_sgd.Tensors:
    parameters = {name: model.get_parameter(name).detach() for name in names}
    engine_sum = dp_sgd.in_chunks(engine.clipped_gradient_sum, chunk)
    return engine_sum(model, parameters, batch, C)


def median_norm(model: nn.Module, names: list[str], batch: tuple[torch.Tensor, ...]) -> float:
    """A clipping norm that clips some examples and not others."""
    parameters = {name: model.get_parameter(name).detach() for name in names}
    gradients = dp_sgd.per_example_gradients(model, parameters, batch)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    assert norms.median() > 1e-6
    return norms.median().item()


def assert_equal_sums(model: nn.Module, names: list[str], batch: tuple[torch.Tensor, ...],
                      chunks: tuple[int, ...] = (3,)) -> None:
    """Both engines, in chunks of any size, agree to 1e-9, but for what ghost's norms are raised."""
    model.requires_grad_(False)
    C = median_norm(model, names, batch)
    textbook = clipped_sum(model, names, batch, C, len(batch[0]), engine=dp_sgd)
    for chunk in chunks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ghost, "LEAST_SHARE", 0.0)
            total = clipped_sum(model, names, batch, C, chunk)
        assert total.keys() == textbook.keys()
        for name in total:
            torch.testing.assert_close(total[name], textbook[name], rtol=1e-9, atol=1e-9,
                                       msg=lambda m, n=name: f"{n}: {m}")


# ---- the model ---------------------------------------------------------------------------------

def draws(model: nn.Module, count: int, K: int) -> tuple[torch.Tensor, ...]:
    batch = sample_t_and_noise(model, *tiny_data(count), K, 0.3, np.random.default_rng(0))
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


CHOICES = ["attention", *(f"{kind}:{k}" for kind in ("last", "from") for k in range(4))]


@pytest.mark.parametrize("trainable", CHOICES)
def test_it_equals_the_textbook_on_attention_modules(trainable):
    assert len(ATTENTION) == 4
    model = tiny_model()
    model.embedder.rescale(7.0)
    names = private_parameter_names(model, trainable=trainable)
    for K in (1, 4):
        assert_equal_sums(model, names, draws(model, 7, K), chunks=(1, 3, 7))


@pytest.mark.parametrize("trainable", ["attention", "last:1", "from:2"])
def test_it_equals_the_textbook_on_the_unconditional_unet(trainable):
    model = tiny_model("unet.context_dim=0")
    names = private_parameter_names(model, trainable=trainable)
    for K in (1, 4):
        assert_equal_sums(model, names, draws(model, 7, K), chunks=(1, 7))


@pytest.mark.parametrize("context_dim", [8, 0])
@pytest.mark.parametrize("trainable", ["attention", "lora", "resblocks", "all"])
def test_it_equals_the_textbook_whatever_is_trained(trainable, context_dim):
    resblock_updown = str(bool(context_dim)).lower()   # both ways of changing the size
    model = tiny_model(f"unet.context_dim={context_dim}",
                       f"unet.resblock_updown={resblock_updown}")
    add_lora(model.unet, rank=2)
    for p in model.unet.parameters():   # LoRA's second factors start at zero
        nn.init.normal_(p, std=0.3)
    model.double()
    names = private_parameter_names(model, trainable=trainable)
    assert any(".lora." in name for name in names) == (trainable != "resblocks")
    assert any(".emb_layers." in name for name in names) == (trainable in ("resblocks", "all"))
    assert_equal_sums(model, names, draws(model, 5, 2))


# ---- single layers -----------------------------------------------------------------------------

class Layers(nn.Module):
    """Every kind of layer, called with T tokens, with T again, and with one.

    x [n, T, 6], words int [n, T] -> [n].
    """

    def __init__(self):
        super().__init__()
        self.words, self.wide = nn.Embedding(5, 6), nn.Linear(6, 6)
        self.norm, self.group = nn.LayerNorm(6), nn.GroupNorm(2, 6)
        self.narrow = nn.Linear(6, 2, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.patch = nn.Conv2d(6, 3, (3, 2), stride=(2, 1), padding=(1, 1))
        for p in self.double().parameters():
            nn.init.normal_(p)

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        x = self.wide(x + self.words(words)).tanh()
        x = self.wide(self.norm(x))
        x = self.conv1(self.group(x.mT)).tanh()
        y = self.conv2(x[..., None]).flatten(1).square().mean(1)
        y = y + self.patch(x[..., None]).flatten(1).cos().sum(1)
        x = x.mean(2)
        return y + self.narrow(x).square().sum(1) + self.wide(x).sin().sum(1)


@pytest.fixture
def layers() -> Layers:
    torch.manual_seed(0)
    return Layers()


def tokens(B: int, K: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, K, T, 6, dtype=torch.float64), torch.randint(5, (B, K, T))


def all_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("T", [1, 2, 5, 40])   # explicit gradients are larger, or smaller
@pytest.mark.parametrize("K", [1, 3])
def test_it_equals_the_textbook_on_every_kind_of_layer(layers, T, K, monkeypatch):
    monkeypatch.setattr(ghost, "COPIED", 64)   # so that few small examples are split too
    batch = tokens(5, K, T)
    assert_equal_sums(layers, all_names(layers), batch, chunks=(2,))
    for name in ("wide.weight", "words.weight", "norm.bias"):   # some parameters of a layer only
        assert_equal_sums(layers, [name], batch, chunks=(5,))


def test_a_layer_that_is_never_called_has_no_gradient(layers):
    layers.idle = nn.Linear(6, 6).double()
    assert_equal_sums(layers, ["idle.weight", "wide.weight"], tokens(2, 1, 3), chunks=(2,))


def test_an_outlier_contributes_exactly_the_clipping_norm(layers):
    total = clipped_sum(layers, all_names(layers), tokens(1, 1, 4), 1e-3)
    assert flat(total).norm().item() == pytest.approx(1e-3, rel=1e-6)


def test_an_example_that_is_not_finite_contributes_nothing(layers):
    names, (x, words) = all_names(layers), tokens(3, 1, 4)
    x[1, 0, 0, 0] = math.nan
    broken = clipped_sum(layers, names, (x, words), 1e-3)
    others = clipped_sum(layers, names, (x[[0, 2]], words[[0, 2]]), 1e-3)
    textbook = clipped_sum(layers, names, (x, words), 1e-3, engine=dp_sgd)
    for name in names:
        assert broken[name].any()
        torch.testing.assert_close(broken[name], others[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(broken[name], textbook[name], rtol=1e-9, atol=1e-12)


def test_an_empty_batch_sums_to_zero(layers):
    total = clipped_sum(layers, all_names(layers), tokens(0, 1, 4), 1.0)
    assert [*total] == all_names(layers) and not any(s.any() for s in total.values())


def test_no_hook_is_left_behind(layers):
    clipped_sum(layers, ["wide.weight"], tokens(2, 1, 3), 1.0)
    with pytest.raises(TypeError):   # nor after a mistake
        clipped_sum(layers, ["wide.weight"], tokens(2, 1, 3)[:1], 1.0)
    assert not any(layer._forward_hooks for layer in layers.modules())


# ---- rounding ----------------------------------------------------------------------------------

class Product(nn.Module):
    """The sum over tokens of <y_t, layer(x_t)>."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * y).sum((1, 2))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_example_contributes_nothing(value):
    model, x, y = Product(nn.Linear(4, 3)), torch.ones(3, 1, 1, 4), torch.ones(3, 1, 1, 3)
    y[1] = value
    total = clipped_sum(model, ["layer.weight"], (x, y), 1e-3)["layer.weight"]
    others = clipped_sum(model, ["layer.weight"], (x[:2], y[[0, 2]]), 1e-3)["layer.weight"]
    torch.testing.assert_close(total, others)


def cancelling_vectors() -> tuple[Product, torch.Tensor, torch.Tensor]:
    y, x = 30 * torch.randn(64), 30 * torch.randn(64)
    x = torch.stack([x, x + 4e-4 * torch.randn(64)])
    return Product(nn.Linear(64, 64, bias=False)), x[None, None], torch.stack([y, -y])[None, None]


def cancelling_words() -> tuple[Product, torch.Tensor, torch.Tensor]:
    y = 30 * torch.randn(512)
    y = torch.stack([y, -y + 1e-3 * torch.randn(512)])
    return Product(nn.Embedding(5, 512)), torch.tensor([[[1, 1]]]), y[None, None]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", [cancelling_vectors, cancelling_words])
@pytest.mark.parametrize("C", [1e-3, 1e-6])
def test_rounding_lets_no_example_pass_unclipped(case: Callable, C, seed):
    """Two tokens' gradients cancel but for a ten-thousandth: their norm is rounding in float32."""
    torch.manual_seed(seed)
    model, x, y = case()
    total = clipped_sum(model, ["layer.weight"], (x, y), C)
    assert total["layer.weight"].norm() <= C


def test_what_cancels_keeps_the_sum_s_rounding_below_its_bound():
    """Each example's 5,000 tokens cancel. Their float32 sum would be wrong by several C."""
    torch.manual_seed(0)
    x, g = torch.ones(4, 5000, 1), torch.randn(4, 2500, 1)
    g = torch.cat([g, -g + 1e-6], dim=1)
    weights = dp_sgd.clip_weights([ghost.ghost_norms([x, g])], 1, 1.0)
    assert (weights * g.abs().sum((1, 2)) <= 1 / ghost.LEAST_SHARE).all()
    total = ghost.weighted_grad_sum([x, g], weights, torch.Size([1, 1])).item()
    exact = math.fsum((weights[:, None] * g[..., 0].double()).flatten().tolist())
    assert abs(total - exact) <= 4 * 2.0**-28


def test_factors_in_bfloat16_are_multiplied_in_float32():
    x, g = torch.rand(2, 40, 3).bfloat16(), torch.rand(2, 40, 3).bfloat16()
    [product] = ghost.smaller_form(*ghost.per_example_layout(nn.Linear(3, 3), x, g, 2))
    exact = (g.double().mT @ x.double()).flatten(1)
    torch.testing.assert_close(product.double(), exact, rtol=1e-6, atol=0)


# ---- refusals ----------------------------------------------------------------------------------

@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2),
    nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding_mode="circular"),
    nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 1, groups=2), nn.BatchNorm2d(4), nn.LayerNorm((4, 4)),
    nn.Embedding(4, 4, padding_idx=0), nn.Bilinear(4, 4, 4)])
def test_a_layer_without_a_rule_is_refused_by_name(layer):
    model = nn.ModuleDict({"attention": nn.ModuleDict({"odd": layer})})
    message = r"no rule for the layer attention\.odd, "
    with pytest.raises(ValueError, match=message) as refused:
        ghost.layers_of(model, ["attention.odd.weight"])
    assert "--" not in str(refused.value)


class SequenceFirst(nn.Module):
    """Takes x [n, T, 6] and gives its layer [T, n, 6]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(0, 1)).square().sum((0, 2))


@pytest.mark.parametrize("B, T", [(2, 2), (3, 3), (4, 2)])   # by chance T is the batch
def test_a_layer_that_gets_tokens_first_is_refused(B, T):
    with pytest.raises(ValueError, match="examples in the first dimension: the layer layer gets"):
        clipped_sum(SequenceFirst(), ["layer.weight"], tokens(B, 1, T), 1.0)


def test_the_default_engine_is_the_one_tested_here():
    assert engines.ENGINES[Config().run.clipping] is ghost.clipped_gradient_sum
