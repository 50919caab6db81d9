"""The VQ autoencoder, unconditional models."""

import re

import numpy as np
import pytest
import torch
from test_cli import TINY, few_glyphs  # noqa: F401  (few_glyphs runs by itself)
from test_models import close, load_official, oracle, randn, randomised

import ldm
import sample
import train
from ldm import LatentDiffusion, NoEmbedder, load_checkpoint, replace_embedder
from vae import AutoencoderKL, AutoencoderVQ, DiagonalGaussian, VectorQuantizer

# ---- VQ autoencoder --------------------------------------------------------------------------------

VQ = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], in_channels=1, resolution=8, z_channels=3,
          embed_dim=2, n_embed=5)


@torch.no_grad()
def test_vq_autoencoder_equals_official():
    case = oracle("vae_vq.pt")
    settings, expected = case["config"], case["outputs"]
    names = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels", "resolution", "z_channels")
    model = AutoencoderVQ(**{name: settings["ddconfig"][name] for name in names}, embed_dim=settings["embed_dim"],
                          n_embed=settings["n_embed"])
    load_official(model, case["state_dict"])
    latents = DiagonalGaussian(model.encode(case["inputs"]["x"])).mean
    close(latents, expected["prequant"], 5e-5)
    assert torch.equal(model.quantize.nearest(expected["prequant"]).flatten(), expected["indices"])
    close(model.quantize(expected["prequant"]), expected["quantised"], 5e-5)
    close(model.decode(expected["prequant"]), expected["decoded"], 5e-5)
    assert not torch.allclose(expected["decoded"], expected["decoded_not_quantised"], atol=1e-2)


def test_the_nearest_code_by_hand():
    quantiser = VectorQuantizer(3, 2)
    quantiser.embedding.weight.data.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 3.0]]))
    z = torch.tensor([[[1.0, 5.1]], [[1.4, 0.0]]])[None]   # [1, 2, 1, 2]: the pixels (1, 1.4) and (5.1, 0)
    assert quantiser.nearest(z).tolist() == [[[0, 1]]]
    assert quantiser(z)[0, :, 0].T.tolist() == [[0.0, 0.0], [10.0, 0.0]]
    # (6, 0) points as (10, 0) does, but is as near to it as to (2, 0): the distance counts, not the angle.
    z = torch.tensor([0.1, 1.6]).reshape(1, 2, 1, 1)
    assert quantiser.nearest(z).item() == 2


def test_the_nearest_of_close_codes_far_from_the_origin():
    quantiser = VectorQuantizer(64, 3)
    quantiser.embedding.weight.data = 100.0 + 0.01 * randn(64, 3)
    z = quantiser.embedding.weight.data.T.reshape(1, 3, 8, 8)
    assert quantiser.nearest(z).flatten().tolist() == list(range(64))


@torch.no_grad()
def test_vq_decoding_ignores_small_errors_of_the_latents():
    model = randomised(AutoencoderVQ(**VQ))
    z = model.quantize.embedding(torch.arange(32).reshape(2, 4, 4) % 5).movedim(-1, 1)
    nearby = z + 1e-3 * randn(*z.shape)
    assert torch.equal(model.decode(nearby), model.decode(z))
    assert not torch.equal(model.decode(z.roll(1, 2)), model.decode(z))


@torch.no_grad()
def test_vq_latents_have_no_noise_and_are_not_quantised():
    architecture = dict(vae=VQ, num_classes=3, linear_start=0.0015, linear_end=0.0195, unet=dict(
        in_channels=2, out_channels=2, model_channels=16, num_res_blocks=1, attention_resolutions=[1],
        channel_mult=[1], num_heads=2, context_dim=12))
    model, x = randomised(LatentDiffusion(architecture)), randn(4, 1, 8, 8)
    moments = model.vae.encode(x)
    assert moments.shape == (4, 4, 4, 4)
    expected = model.vae.quant_conv(model.vae.encoder(x))
    torch.testing.assert_close(model.latents(moments), expected, atol=2e-6, rtol=0)
    assert not torch.allclose(model.vae.quantize(expected), expected, atol=0.1)
    labels = torch.arange(4) % 3
    z_0, *_ = ldm.noise_draws(model, moments, labels, 2, 0.1, np.random.default_rng(0))
    torch.testing.assert_close(z_0, expected[:, None].expand(-1, 2, -1, -1, -1), atol=2e-6, rtol=0)
    assert model.generate(labels, 2).shape == (4, 8, 8, 1)


def test_kl_autoencoders_are_what_they_were():
    arguments = {key: value for key, value in VQ.items() if key != "n_embed"}
    assert AutoencoderKL(**arguments).encoder.conv_out.out_channels == 6
    assert AutoencoderVQ(**VQ).encoder.conv_out.out_channels == 3


# ---- unconditional models --------------------------------------------------------------------------

UNCONDITIONAL = dict(
    vae=dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], in_channels=1, resolution=8, z_channels=3,
             embed_dim=3),
    unet=dict(in_channels=3, out_channels=3, model_channels=16, num_res_blocks=1, attention_resolutions=[1, 2],
              channel_mult=[1, 2], num_heads=2, context_dim=None),
    num_classes=1, linear_start=0.0015, linear_end=0.0195)


def test_an_unconditional_model_has_no_embedder_and_ignores_labels():
    model = randomised(LatentDiffusion(UNCONDITIONAL))
    assert isinstance(model.embedder, NoEmbedder) and not any("embedder" in name for name in model.state_dict())
    z, t, eps = randn(2, 3, 4, 4), torch.tensor([3, 900]), randn(2, 3, 4, 4, seed=2)
    zero, one = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    assert torch.equal(model(z, t, eps, zero), model(z, t, eps, one))
    assert replace_embedder(model, None, 7).architecture["num_classes"] == 7


def test_unconditional_guidance_is_one():
    model, calls = randomised(LatentDiffusion(UNCONDITIONAL)), []
    forward = model.unet.forward
    model.unet.forward = lambda *arguments: calls.append(1) or forward(*arguments)
    labels = torch.zeros(2, dtype=torch.long)
    images = [model.generate(labels, 3, guidance=w, generator=torch.Generator().manual_seed(0)) for w in (1.0, 4.0)]
    assert torch.equal(*images) and len(calls) == 6


@pytest.mark.parametrize("engine", ["ghost", "func"])
def test_an_unconditional_model_is_trained_and_sampled_end_to_end(tmp_path, engine):
    flags = [*TINY, "--context-dim", "0"]
    train.main(["--stage", "public", "--out", str(tmp_path), *flags])
    train.main(["--eps", "3", "--engine", engine, "--out", str(tmp_path), *flags])
    (public, _), (private, facts) = (load_checkpoint(tmp_path / f"{n}.pt") for n in ("public", "private-eps3"))
    after = private.state_dict()
    changed = {name for name, tensor in public.state_dict().items() if not torch.equal(tensor, after[name])}
    assert facts["classes"] == ["all"] and changed
    assert all(re.search(r"^unet.*\.(norm|qkv|proj_out)\.", name) for name in changed)
    sample.main([str(tmp_path / "private-eps3.pt"), "--npz", str(tmp_path / "s.npz"), "--count", "6", "--steps", "2",
                 "--grid", str(tmp_path / "g.png")])
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["images"].shape == (6, 32, 32, 1) and not arrays["labels"].any()
    assert (tmp_path / "g.png").exists()
