"""The KL autoencoder: against the official code (CompVis/latent-diffusion a506df5), and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles.official import build, close, load_strictly, oracle, randn, randomised, shapes
from torch import nn

import vae
from vae import AutoencoderKL, DiagonalGaussian, group_norm

TINY = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4], in_channels=1,
            resolution=8, z_channels=3, embed_dim=3)


# ---- against the official code -----------------------------------------------------------------

@torch.no_grad()
def test_the_autoencoder_equals_the_official_one():
    case = oracle("vae_kl.pt")
    inputs, expected = case["inputs"], case["outputs"]
    model = load_strictly(build(AutoencoderKL, case["config"]), case["state_dict"])
    moments = model.encode(inputs["x"])
    posterior = DiagonalGaussian(moments)
    close(moments, expected["moments"], 5e-5)
    for name in ("mean", "logvar", "std"):
        close(getattr(posterior, name), expected[name], 5e-5)
    close(posterior.kl(), expected["kl"], 5e-5, rtol=1e-5)
    close(posterior.sample(inputs["noise"]), expected["sample"], 5e-5)
    close(model.decode(inputs["z"]), expected["decoded"], 5e-5)
    close(model.decode(posterior.mean), expected["reconstruction"], 5e-5)


@pytest.mark.parametrize("name", ["kl-f8", "kl-f4", "emnist_4x4x3"])
def test_names_shapes_and_counts_are_the_official_ones(name):
    tables = oracle("architectures.json")
    with torch.device("meta"):   # nothing is allocated
        model = build(AutoencoderKL, tables["autoencoders"][name])
    expected = tables["state_dict_shapes"][f"autoencoder/{name}"]
    assert list(shapes(model).items()) == list(expected.items())   # in the same order, too
    total = sum(p.numel() for p in model.parameters())
    assert total == tables["autoencoders"][name]["total_params"]


# ---- shapes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("ch", [8, 12, 16])
def test_latents_have_the_shape_that_the_model_tells(ch):
    model = AutoencoderKL(ch, [1, 2, 3], 1, [4], in_channels=3, resolution=16, z_channels=5,
                          embed_dim=2)
    moments = model.encode(randn(2, 3, 16, 16))
    assert (model.resolution, model.latent_shape) == (16, (2, 4, 4))
    assert moments.shape == (2, 4, 4, 4)   # mean and log variance
    assert DiagonalGaussian(moments).sample().shape == (2, *model.latent_shape)
    assert model.decode(randn(2, 2, 4, 4)).shape == (2, 3, 16, 16)


def test_the_default_model_has_the_shapes_of_the_header():
    model, seen = AutoencoderKL(8, [1, 1, 3, 6], 1, [], 1, 32, z_channels=8, embed_dim=8), []
    for layer in (model.encoder.conv_in, *model.encoder.down, model.encoder.mid):
        layer = layer.block[-1] if hasattr(layer, "block") else layer   # before the downsampling
        layer.register_forward_hook(lambda layer, x, y: seen.append(tuple(y.shape[1:])))
    assert model.encode(randn(1, 1, 32, 32)).shape == (1, 16, 4, 4)
    assert seen == [(8, 32, 32), (8, 32, 32), (8, 16, 16), (24, 8, 8), (48, 4, 4), (48, 4, 4)]
    assert model.latent_shape == (8, 4, 4)


# ---- layers by hand ----------------------------------------------------------------------------

def test_groups_are_the_official_32_or_at_least_four_wide():
    for channels in range(1, 400):
        groups = group_norm(channels, 1e-5).num_groups
        assert channels % groups == 0
        if channels % 32 == 0:
            assert groups == 32
        else:
            assert channels // groups >= min(4, channels)


def test_every_group_norm_has_the_official_epsilon():
    norms = [m for m in AutoencoderKL(**TINY).modules() if isinstance(m, nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}


def one_tap(conv: nn.Conv2d, row: int, column: int) -> None:
    """Makes a one-channel 3x3 convolution pick a single pixel of its window."""
    conv.weight.data.zero_()
    conv.weight.data[0, 0, row, column] = 1.0
    conv.bias.data.zero_()


def test_downsampling_pads_right_and_below():
    x, layer = randn(1, 1, 6, 6), vae.downsample(1)
    one_tap(layer.conv, 0, 0)
    assert torch.equal(layer(x), x[..., ::2, ::2])   # the first window starts at the first pixel
    one_tap(layer.conv, 2, 2)
    assert torch.equal(layer(x), F.pad(x, (0, 2, 0, 2))[..., 2::2, 2::2])


def test_upsampling_repeats_pixels():
    x, layer = randn(1, 1, 3, 3), vae.upsample(1)
    one_tap(layer.conv, 1, 1)
    assert torch.equal(layer(x), x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_attention_by_hand():
    layer = randomised(vae.AttnBlock(16))
    x = randn(2, 16, 3, 3)
    q, k, v = (conv(layer.norm(x)).flatten(2) for conv in (layer.q, layer.k, layer.v))
    weights = (torch.einsum("bci,bcj->bij", q, k) / 4.0).softmax(-1)   # sqrt(16) = 4
    h = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(layer(x), x + layer.proj_out(h))


# ---- posterior and loss ------------------------------------------------------------------------

def test_the_posterior_by_hand():
    # Two latent numbers: N(1, 1) has KL 1/2, N(0, e^2) has KL (e^2 - 1 - 2) / 2.
    posterior = DiagonalGaussian(torch.tensor([1.0, 0.0, 0.0, 2.0]).reshape(1, 4, 1, 1))
    torch.testing.assert_close(posterior.kl(), torch.tensor([0.5 + (math.exp(2.0) - 3.0) / 2]))
    sample = posterior.sample(torch.ones(1, 2, 1, 1))
    torch.testing.assert_close(sample.flatten(), torch.tensor([2.0, math.e]))


def test_the_log_variance_is_bounded():
    extreme = DiagonalGaussian(torch.tensor([0.0, 0.0, -1e9, 1e9]).reshape(1, 4, 1, 1))
    assert extreme.logvar.flatten().tolist() == [-30.0, 20.0]


def test_the_loss_by_hand():
    model, x = AutoencoderKL(**TINY), randn(2, 1, 8, 8)
    moments = torch.cat([torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)], 1)   # KL 1/2 a number
    model.encode, model.decode = (lambda x: moments), (lambda z: x + 2.0)
    assert model.loss(x, kl_weight=0.1).item() == pytest.approx(2.0 + 4.0 + 0.1 * 0.5, rel=1e-5)
