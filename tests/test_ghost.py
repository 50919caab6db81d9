"""The ghost engine gives the clipped sum of the torch.func engine, which tests/test_dp_sgd.py checks by hand."""

import math

import pytest
import torch
from test_cli import refuse
from test_dp_sgd import ATTENTION, TINY, tiny_data, tiny_model
from torch import nn
from torch.func import functional_call

import dp_sgd
import train
from ldm import noise_draws, q_sample
from unet import PRIVATE_PARTS, UNet, private_parameter_names


def both_sums(model, names, batch, C, chunk) -> tuple[dict, dict]:
    """The clipped sum by either engine; C None: the median norm, so that some examples are clipped."""
    def loss(parameters, *draws):
        return functional_call(model, parameters, draws).mean()

    model.requires_grad_(False)
    parameters = {name: model.get_parameter(name) for name in names}
    if C is None:
        gradients = dp_sgd.per_example_gradients(loss, parameters, batch)
        C = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0).median().item()
        assert C > 1e-6
    return tuple(dp_sgd.clipped_gradient_sum(f, parameters, batch, C, chunk) for f in (loss, model))


def assert_equal_sums(*arguments) -> None:
    func, ghost = both_sums(*arguments)
    assert func.keys() == ghost.keys()
    for name in func:
        torch.testing.assert_close(ghost[name], func[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


class Unconditional(nn.Module):
    """The loss of an unconditional U-Net, called as LatentDiffusion is."""

    def __init__(self):
        super().__init__()
        self.unet = UNet(**TINY.architecture(3)["unet"] | {"context_dim": None}).double()
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, z_0, t, eps, condition):
        z_t = q_sample(torch.linspace(0.99, 0.01, 1000, dtype=z_0.dtype), z_0, t, eps)
        return (self.unet(z_t, t) - eps).square().flatten(1).mean(1)


def draws(count: int, K: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in
                 noise_draws(tiny_model(), *tiny_data(count), K, 0.3, dp_sgd.secure_generator(0)))


class Linear(nn.Module):
    """One example's loss: sum_t y_t . W x_t."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)

    def forward(self, x, y):
        return (self.layer(x) * y).sum((1, 2))


class Table(nn.Module):
    """One example's loss: sum_t y_t . (row x_t)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(5, 512)

    def forward(self, x, y):
        return (self.layer(x) * y).sum((1, 2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("model", [Linear, Table])
@pytest.mark.parametrize("C", [1e-3, 1e-6])
def test_rounding_lets_no_example_pass_unclipped(model, C, seed):
    """Two tokens whose gradients cancel but for a ten-thousandth: in float32 their norm's square is all rounding."""
    torch.manual_seed(seed)
    model = model().requires_grad_(False)
    y, x = 30 * torch.randn(model.layer.weight.shape[1]), 30 * torch.randn(64)
    y = torch.stack([y, -y + 1e-3 * torch.randn_like(y)] if isinstance(model, Table) else [y, -y])[None, None]
    x = torch.tensor([[[1, 1]]]) if isinstance(model, Table) else torch.stack(
        [x, x + 4e-4 * torch.randn(64)])[None, None]
    total = dp_sgd.clipped_gradient_sum(model, {"layer.weight": model.layer.weight.clone()}, (x, y), C, 8)
    assert total["layer.weight"].norm() <= C * (1 + 1e-4)


CHOICES = ["all", *(f"{kind}:{k}" for kind in ("last", "from") for k in range(len(ATTENTION)))]


@pytest.mark.parametrize("blocks", CHOICES)
@pytest.mark.parametrize("K, chunk", [(1, 1), (1, 3), (1, 7), (4, 1), (4, 3), (4, 7)])
def test_it_equals_torch_func_on_the_conditional_unet(blocks, K, chunk):
    model = tiny_model()
    model.embedder.rescale(7.0)
    assert_equal_sums(model, private_parameter_names(model, blocks), draws(7, K), None, chunk)


@pytest.mark.parametrize("blocks", ["all", "last:1", "from:2"])
@pytest.mark.parametrize("K, chunk", [(1, 3), (4, 1), (4, 7)])
def test_it_equals_torch_func_on_the_unconditional_unet(blocks, K, chunk):
    torch.manual_seed(0)
    model = Unconditional()
    assert_equal_sums(model, private_parameter_names(model, blocks), draws(7, K), None, chunk)


@pytest.mark.parametrize("parts", PRIVATE_PARTS)
@pytest.mark.parametrize("conditional", [True, False])
def test_it_equals_torch_func_whatever_is_trained(parts, conditional):
    torch.manual_seed(0)
    model = (tiny_model() if conditional else Unconditional())
    model.unet = UNet(**TINY.architecture(3)["unet"] | {"context_dim": 8 if conditional else None, "lora_rank": 2,
                                                        "resblock_updown": conditional}).double()
    for p in model.unet.parameters():
        nn.init.normal_(p, std=0.3)
    names = private_parameter_names(model, "all", parts=parts)
    assert any(".lora." in name for name in names) == (parts != "resblocks")
    assert any(".emb_layers." in name for name in names) == (parts in ("resblocks", "all"))
    assert_equal_sums(model, names, draws(5, 2), None, 3)


def test_layers_in_bfloat16_are_clipped_as_exactly_as_others():
    """Norms and sums of float32: each example, clipped to C, has the norm C to five digits. bfloat16 has three."""
    model = tiny_model().float()
    names = private_parameter_names(model, "all")
    batch = tuple(x.float() if x.is_floating_point() else x for x in draws(5, 2))
    C = 1e-3
    parameters = {name: model.get_parameter(name) for name in names}
    exact = dp_sgd.clipped_gradient_sum(model.requires_grad_(False), parameters, batch, C, 5)
    model.bf16 = True
    rough = dp_sgd.clipped_gradient_sum(model, parameters, batch, C, 5)
    distance, size = (torch.cat([v.flatten() for v in s.values()]).norm().item() for s in (
        {n: rough[n] - exact[n] for n in names}, exact))
    assert 1e-4 < distance / size < 0.05   # it was bfloat16, and it was right
    for i in range(5):
        one = dp_sgd.clipped_gradient_sum(model, parameters, tuple(x[i:i + 1] for x in batch), C, 1)
        norm = torch.cat([v.flatten() for v in one.values()]).double().norm().item()
        assert C * (1 - 2e-5) < norm < C * (1 + 2e-6)   # rounding is counted against the example


class Layers(nn.Module):
    """Every kind of layer, few and many tokens; one of them has T, T again and one. x [n, T, 6], words int [n, T]."""

    def __init__(self):
        super().__init__()
        self.words, self.wide = nn.Embedding(5, 6), nn.Linear(6, 6)
        self.norm, self.group, self.narrow = nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Linear(6, 2, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.patch = nn.Conv2d(6, 3, (3, 2), stride=(2, 1), padding=(1, 1))
        for p in self.double().parameters():
            nn.init.normal_(p)

    def forward(self, x, words):
        x = self.wide(x + self.words(words)).tanh()
        x = self.wide(self.norm(x))
        x = self.conv1(self.group(x.mT)).tanh()
        y = self.conv2(x[..., None]).flatten(1).square().mean(1) + self.patch(x[..., None]).flatten(1).cos().sum(1)
        return y + self.narrow(x.mean(2)).square().sum(1) + self.wide(x.mean(2)).sin().sum(1)


@pytest.mark.parametrize("T", [1, 2, 5, 40])   # T (inputs + outputs) on either side of inputs * outputs
@pytest.mark.parametrize("K", [1, 3])
def test_every_kind_of_layer_with_few_and_many_tokens(T, K):
    torch.manual_seed(0)
    batch = torch.randn(5, K, T, 6, dtype=torch.float64), torch.randint(5, (5, K, T))
    model = Layers()
    assert_equal_sums(model, [name for name, _ in model.named_parameters()], batch, None, 2)
    for name in ("wide.weight", "words.weight", "norm.bias"):   # some of a layer's parameters only
        assert_equal_sums(model, [name], batch, None, 5)


def test_an_outlier_contributes_C_and_an_example_that_is_not_finite_nothing():
    model, (x, words) = Layers(), (torch.randn(3, 1, 4, 6, dtype=torch.float64), torch.randint(5, (3, 1, 4)))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    (one,) = (dp_sgd.clipped_gradient_sum(model, parameters, (x[:1], words[:1]), 1e-3, 3),)
    assert torch.cat([s.flatten() for s in one.values()]).norm().item() == pytest.approx(1e-3, rel=1e-9)
    x[1, 0, 0, 0] = math.nan
    broken = dp_sgd.clipped_gradient_sum(model, parameters, (x, words), 1e-3, 3)
    others = dp_sgd.clipped_gradient_sum(model, parameters, (x[[0, 2]], words[[0, 2]]), 1e-3, 3)
    for name in broken:
        torch.testing.assert_close(broken[name], others[name], rtol=1e-9, atol=1e-12)
        assert broken[name].any()


def test_an_empty_batch_sums_to_zero():
    model = Layers()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    empty = torch.zeros(0, 1, 4, 6), torch.zeros(0, 1, 4, dtype=torch.long)
    assert not any(s.any() for s in dp_sgd.clipped_gradient_sum(model, parameters, empty, 1.0, 3).values())


def test_no_hook_is_left_behind():
    model = Layers()
    both_sums(model, ["wide.weight"], (torch.randn(2, 1, 3, 6).double(), torch.randint(5, (2, 1, 3))), 1.0, 2)
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same"),
    nn.Conv2d(4, 4, 3, padding_mode="circular"), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 1, groups=2), nn.BatchNorm2d(4),
    nn.LayerNorm((4, 4)), nn.Embedding(4, 4, padding_idx=0), nn.Bilinear(4, 4, 4)])
def test_a_layer_without_a_rule_is_refused_by_name(layer):
    model = nn.ModuleDict({"attention": nn.ModuleDict({"odd": layer})})
    with pytest.raises(ValueError, match=r"no rule for the layer attention\.odd, .*--engine func"):
        dp_sgd.ghost_layers(model, ["attention.odd.weight"])


def test_a_layer_that_is_never_called_has_no_gradient():
    model = Layers()
    model.idle = nn.Linear(6, 6).double()
    batch = torch.randn(2, 1, 3, 6).double(), torch.randint(5, (2, 1, 3))
    assert_equal_sums(model, ["idle.weight", "wide.weight"], batch, None, 2)


def test_the_private_run_refuses_such_a_layer_before_it_trains(tmp_path, capsys, monkeypatch):
    """It is asked before the first step, and --engine func goes through."""
    from test_ledger import arguments, write_images
    write_images(tmp_path / "public-images", [6, 6], seed=0)
    write_images(tmp_path / "private-images", [12, 12], seed=1)
    train.main(["--stage", "public", *arguments(tmp_path, tmp_path)])
    monkeypatch.setattr(train, "private_parameter_names", lambda model, *blocks, **parts: ["unet.out.2.weight"])
    replace_embedder = train.replace_embedder

    def with_grouped_convolution(*arguments):
        model = replace_embedder(*arguments)
        before, after = model.unet.out[2].in_channels, model.unet.out[2].out_channels
        model.unet.out[2] = nn.Conv2d(before, after, 3, padding=1, groups=math.gcd(before, after))
        return model

    monkeypatch.setattr(train, "replace_embedder", with_grouped_convolution)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert "no rule for the layer unet.out.2" in refuse(capsys, train, arguments(tmp_path, tmp_path))
    assert sorted(tmp_path.iterdir()) == before
    train.main([*arguments(tmp_path, tmp_path), "--engine", "func"])


def test_the_default_engine_is_the_one_that_was_tested():
    assert train.Config.engine == "ghost"
