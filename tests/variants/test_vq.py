"""The VQ autoencoder: against the official code (CompVis/latent-diffusion a506df5), and by hand."""

import torch
from oracles.official import build, close, load_strictly, oracle, randn, randomised, shapes

from tiny import tiny_model
from vae import DiagonalGaussian
from variants.vq import AutoencoderVQ, VectorQuantizer

TINY = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], in_channels=1,
            resolution=8, z_channels=3, embed_dim=2, n_embed=5)


# ---- against the official code -----------------------------------------------------------------

@torch.no_grad()
def test_the_autoencoder_equals_the_official_one():
    case = oracle("vae_vq.pt")
    expected = case["outputs"]
    model = load_strictly(build(AutoencoderVQ, case["config"]), case["state_dict"])
    latents = DiagonalGaussian(model.encode(case["inputs"]["x"])).mean
    close(latents, expected["prequant"], 5e-5)
    indices = model.quantize.nearest(expected["prequant"])
    assert torch.equal(indices.flatten(), expected["indices"])
    close(model.quantize(expected["prequant"]), expected["quantised"], 5e-5)
    close(model.decode(expected["prequant"]), expected["decoded"], 5e-5)
    assert not torch.allclose(expected["decoded"], expected["decoded_not_quantised"], atol=1e-2)


def test_names_shapes_and_counts_are_the_official_ones():
    tables = oracle("architectures.json")
    with torch.device("meta"):   # nothing is allocated
        model = build(AutoencoderVQ, tables["autoencoders"]["vq-f4"])
    expected = tables["state_dict_shapes"]["autoencoder/vq-f4"]
    assert list(shapes(model).items()) == list(expected.items())   # in the same order, too
    total = sum(p.numel() for p in model.parameters())
    assert total == tables["autoencoders"]["vq-f4"]["total_params"]


# ---- the codebook ------------------------------------------------------------------------------

def test_the_nearest_code_by_hand():
    quantiser = VectorQuantizer(3, 2)
    quantiser.embedding.weight.data.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 3.0]]))
    # [1, 2, 1, 2]: the pixels (1, 1.4) and (5.1, 0)
    z = torch.tensor([[[1.0, 5.1]], [[1.4, 0.0]]])[None]
    assert quantiser.nearest(z).tolist() == [[[0, 1]]]
    assert quantiser(z)[0, :, 0].T.tolist() == [[0.0, 0.0], [10.0, 0.0]]
    assert quantiser.nearest(torch.tensor([0.1, 1.6]).reshape(1, 2, 1, 1)).item() == 2


def test_close_codes_far_from_the_origin_are_told_apart():
    quantiser = VectorQuantizer(64, 3)
    quantiser.embedding.weight.data = 100.0 + 0.01 * randn(64, 3)
    z = quantiser.embedding.weight.data.T.reshape(1, 3, 8, 8)
    assert quantiser.nearest(z).flatten().tolist() == list(range(64))


# ---- the autoencoder ---------------------------------------------------------------------------

def test_latents_have_the_shape_that_the_model_tells():
    model = AutoencoderVQ(**TINY)
    assert (model.resolution, model.latent_shape) == (8, (2, 4, 4))
    assert model.encode(randn(4, 1, 8, 8)).shape == (4, 2 * 2, 4, 4)   # mean and log variance
    assert model.decode(randn(4, *model.latent_shape)).shape == (4, 1, 8, 8)


@torch.no_grad()
def test_decoding_ignores_small_errors_of_the_latents():
    model = randomised(AutoencoderVQ(**TINY))
    z = model.quantize.embedding(torch.arange(32).reshape(2, 4, 4) % 5).movedim(-1, 1)
    nearby = z + 1e-3 * randn(*z.shape)
    assert torch.equal(model.decode(nearby), model.decode(z))
    assert not torch.equal(model.decode(z.roll(1, 2)), model.decode(z))


@torch.no_grad()
def test_diffusion_runs_on_latents_before_the_codebook():
    model = tiny_model("vae.n_embed=5").float()
    x = randn(4, 1, 8, 8)
    expected = model.vae.quant_conv(model.vae.encoder(x))
    assert torch.equal(model.encode(x), expected)
    assert not torch.allclose(model.vae.quantize(expected), expected, atol=0.1)
    assert model.generate(torch.arange(4) % 3, 2).shape == (4, 8, 8, 1)
