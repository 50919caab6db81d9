"""The U-Net: against the official code (CompVis/latent-diffusion a506df5), and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles.official import build, close, load_strictly, oracle, randn, randomised, shapes
from torch import nn

import unet
from unet import UNet, timestep_embedding

# ---- against the official code -----------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("name", ["unet_cond", "unet_uncond"])
def test_the_unet_equals_the_official_one(name):
    case = oracle(f"{name}.pt")
    x, timesteps, context = (case["inputs"].get(key) for key in ("x", "timesteps", "context"))
    model = load_strictly(build(UNet, case["config"]), case["state_dict"])
    close(model(x, timesteps, context), case["outputs"]["eps"], 5e-5)
    embedding = timestep_embedding(timesteps, case["config"]["model_channels"])
    close(embedding, case["outputs"]["timestep_embedding"], 5e-5)


# The shape table of an official model, and DP-LDM's setting with that U-Net.
@pytest.mark.parametrize("table, setting", [
    ("mnist", "mnist"), ("celeba64", "celeba64"), ("cin256-v2", "celebahq256-class"),
    ("text2img256", "text2img256")])
def test_names_shapes_and_counts_are_the_official_ones(table, setting):
    tables = oracle("architectures.json")
    config = tables["settings"][setting]["unet"]
    with torch.device("meta"):   # nothing is allocated
        model = build(UNet, config)
    expected = tables["state_dict_shapes"][f"unet/{table}"]
    assert list(shapes(model).items()) == list(expected.items())   # in the same order, too
    assert sum(p.numel() for p in model.parameters()) == config["total_params"]


# ---- the whole ---------------------------------------------------------------------------------

@pytest.mark.parametrize("ch", [8, 16])
@pytest.mark.parametrize("context_dim", [None, 6])
@pytest.mark.parametrize("variant", [{}, dict(use_scale_shift_norm=True, resblock_updown=True)])
def test_the_output_has_the_input_s_shape_and_starts_at_zero(ch, context_dim, variant):
    model = UNet(4, 4, ch, 1, [1, 2], [1, 2, 3], num_heads=2, context_dim=context_dim, **variant)
    context = None if context_dim is None else randn(2, 3, context_dim)
    eps = model(randn(2, 4, 8, 8), torch.tensor([0, 999]), context)
    assert eps.shape == (2, 4, 8, 8)
    assert not eps.any()


def test_the_output_depends_on_every_input():
    model = randomised(UNet(3, 3, 16, 1, [1, 2], [1, 2], num_heads=2, context_dim=12))
    z, t, context = randn(2, 3, 4, 4), torch.tensor([3, 700]), randn(2, 1, 12, seed=2)
    base = model(z, t, context)
    for changed in (model(z + 0.1, t, context), model(z, t + 50, context),
                    model(z, t, context + 1.0)):
        assert (base - changed).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    context[1] += 1.0   # one example's context reaches that example only
    assert torch.equal(model(z, t, context)[0], base[0])


def heads_of(layer: nn.Module) -> tuple[int, int]:
    """Width of an attention layer's queries, and the number of heads."""
    if isinstance(layer, unet.AttentionBlock):
        return layer.qkv.in_channels, layer.num_heads
    return layer.to_q.out_features, layer.num_heads


@pytest.mark.parametrize("context_dim", [None, 6])
def test_heads_are_given_by_number_or_width(context_dim):
    def heads(**arguments: int) -> set[tuple[int, int]]:
        model = UNet(4, 4, 8, 1, [1, 2], [1, 2], context_dim=context_dim, **arguments)
        return {heads_of(layer) for layer in model.modules() if hasattr(layer, "num_heads")}

    assert heads(num_heads=2) == {(8, 2), (16, 2)}
    assert heads(num_heads=2, num_head_channels=4) == {(8, 2), (16, 4)}


# ---- layers by hand ----------------------------------------------------------------------------

def test_the_timestep_embedding_by_hand():
    # dim 4: frequencies 10000^0 = 1 and 10000^(-1/2) = 0.01, the cosines before the sines.
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0],
                             [math.cos(2.0), math.cos(0.02), math.sin(2.0), math.sin(0.02)]])
    torch.testing.assert_close(timestep_embedding(torch.tensor([0, 2]), 4), expected)


def test_geglu_gates_one_half_by_the_other_s_gelu():
    layer = unet.GEGLU(1, 1)
    layer.proj.weight.data = torch.tensor([[0.0], [1.0]])
    layer.proj.bias.data = torch.tensor([3.0, 0.0])
    x = torch.tensor([[-2.0], [0.5], [2.0]])
    # x * Phi(x); the tanh approximation differs by 1e-4 and more.
    expected = [[3 * v * 0.5 * (1 + math.erf(v / math.sqrt(2)))] for v in (-2.0, 0.5, 2.0)]
    torch.testing.assert_close(layer(x), torch.tensor(expected), atol=1e-6, rtol=0)


def test_downsampling_pads_all_around():
    x, layer = randn(1, 1, 6, 6), unet.downsample(1)
    layer.op.weight.data.zero_()
    layer.op.weight.data[0, 0, 1, 1] = 1.0
    layer.op.bias.data.zero_()
    assert torch.equal(layer(x), x[..., ::2, ::2])   # the first window has its middle there


def test_every_group_norm_has_the_official_epsilon():
    # In LDM 1e-6 in the SpatialTransformer (its attention.py), torch's 1e-5 elsewhere.
    for model in (UNet(4, 4, 8, 1, [1], [1], context_dim=6), UNet(4, 4, 8, 1, [1], [1])):
        for name, module in model.named_modules():
            for norm in module.children():
                if isinstance(norm, nn.GroupNorm):
                    is_transformer = isinstance(module, unet.SpatialTransformer)
                    assert norm.eps == (1e-6 if is_transformer else 1e-5), name


def test_cross_attention_splits_heads_into_consecutive_channels():
    layer = randomised(unet.CrossAttention(query_dim=6, context_dim=5, num_heads=3, dim_head=4))
    x, context = randn(2, 7, 6), randn(2, 3, 5, seed=2)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        scores = torch.einsum("bid,bjd->bij", q[..., own], k[..., own]) / 2.0   # sqrt(4) = 2
        heads.append(torch.einsum("bij,bjd->bid", scores.softmax(-1), v[..., own]))
    torch.testing.assert_close(layer(x, context), layer.to_out(torch.cat(heads, -1)))


def test_the_attention_block_splits_qkv_head_by_head():
    layer = randomised(unet.AttentionBlock(channels=8, num_heads=2))
    x = randn(2, 8, 3, 3)
    heads = []
    for part in layer.qkv(layer.norm(x).flatten(2)).chunk(2, dim=1):   # one head's q, k and v
        q, k, v = part.chunk(3, dim=1)
        weights = (torch.einsum("bdi,bdj->bij", q, k) / 2.0).softmax(-1)
        heads.append(torch.einsum("bij,bdj->bdi", weights, v))
    expected = x + layer.proj_out(torch.cat(heads, 1)).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_the_time_embedding_scales_before_it_shifts():
    block = randomised(unet.ResBlock(8, 8, emb_channels=4, scale_shift=True))
    block.emb_layers[1].weight.data.zero_()
    block.emb_layers[1].bias.data = torch.tensor([0.5] * 8 + [-0.25] * 8)
    x = randn(2, 8, 4, 4)
    h = block.out_layers[0](block.in_layers(x))
    expected = x + block.out_layers[3](F.silu(h * 1.5 - 0.25))
    torch.testing.assert_close(block(x, randn(2, 4)), expected)


@pytest.mark.parametrize("resample, size", [("up", 8), ("down", 2), (None, 4)])
def test_a_residual_block_changes_the_size_without_weights(resample, size):
    block = unet.ResBlock(8, 8, emb_channels=4, resample=resample)   # its branch starts at zero
    x = randn(2, 8, 4, 4)
    y = block(x, randn(2, 4))
    assert y.shape == (2, 8, size, size)
    assert shapes(block) == shapes(unet.ResBlock(8, 8, emb_channels=4))
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)))   # pixels repeated, or averaged
