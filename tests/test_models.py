"""Autoencoder, U-Net, schedule, sampling, averaging and checkpoints.

The first half compares with numbers of the official LDM code (CompVis/latent-diffusion a506df5) and of the
authors' code (ParkLabML/DP-LDM fabfe10), read from ../shared/oracles beside the repository; these tests are
skipped where that folder is absent. The second half needs nothing but this repository.
"""

import copy
import inspect
import json
import math
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ldm
import unet
import vae
from ldm import (
    EMA,
    LatentDiffusion,
    ddim_sample,
    ddim_timesteps,
    load_checkpoint,
    make_alphas_cumprod,
    q_sample,
    replace_embedder,
    save_checkpoint,
)
from unet import UNet, private_parameter_names, timestep_embedding
from vae import AutoencoderKL, DiagonalGaussian, group_norm

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles"

# Two levels, 8x8 images, 4x4 latents; every width differs from the official ones and from 32.
ARCHITECTURE = dict(
    vae=dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4], in_channels=1, resolution=8,
             z_channels=3, embed_dim=3),
    unet=dict(in_channels=3, out_channels=3, model_channels=16, num_res_blocks=1, attention_resolutions=[1, 2],
              channel_mult=[1, 2], num_heads=2, context_dim=12),
    num_classes=3, linear_start=0.0015, linear_end=0.0195)


@cache
def oracle(name: str):
    path = ORACLES / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/oracles/{name}")
    return json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)


def arguments_of(constructor: type, config: dict) -> dict:
    """The official configuration without the keys that this code has no use for (image_size, double_z, ...)."""
    return {key: config[key] for key in inspect.signature(constructor).parameters if key in config}


def autoencoder(config: dict) -> AutoencoderKL:
    return AutoencoderKL(embed_dim=config["embed_dim"], **arguments_of(AutoencoderKL, config["ddconfig"]))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Redraws all parameters, so that the zero-initialised layers have an effect, too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return module.eval()


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prototype() -> LatentDiffusion:
    return randomised(LatentDiffusion(ARCHITECTURE))


@pytest.fixture
def model(prototype) -> LatentDiffusion:
    return copy.deepcopy(prototype)


class Function(nn.Module):
    """A module made of a function, to stand in for a part of LatentDiffusion."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


# ---- against the official code ---------------------------------------------------------------------

def close(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False)


def load_official(module: nn.Module, weights: dict) -> nn.Module:
    assert list(module.state_dict()) == list(weights)   # DP-LDM counts modules and optimizers count in this order
    module.load_state_dict(weights, strict=True)
    return module.eval()


@torch.no_grad()
def test_autoencoder_equals_official():
    case = oracle("vae_kl.pt")
    model, inputs, expected = autoencoder(case["config"]), case["inputs"], case["outputs"]
    load_official(model, case["state_dict"])
    moments = model.encode(inputs["x"])
    posterior = DiagonalGaussian(moments)
    close(moments, expected["moments"], 5e-5)
    for name in ("mean", "logvar", "std"):
        close(getattr(posterior, name), expected[name], 5e-5)
    close(posterior.kl(), expected["kl"], 5e-5, rtol=1e-5)
    close(posterior.sample(inputs["noise"]), expected["sample"], 5e-5)
    close(model.decode(inputs["z"]), expected["decoded"], 5e-5)
    close(model.decode(posterior.mean), expected["reconstruction"], 5e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet_cond", "unet_uncond", "unet_uncond_heads"])
def test_unet_equals_official(name):
    case = oracle(f"{name}.pt")
    model, inputs = UNet(**arguments_of(UNet, case["config"])), case["inputs"]
    load_official(model, case["state_dict"])
    embedding = timestep_embedding(inputs["timesteps"], case["config"]["model_channels"])
    close(embedding, case["outputs"]["timestep_embedding"], 5e-5)
    close(model(inputs["x"], inputs["timesteps"], inputs.get("context")), case["outputs"]["eps"], 5e-5)


# The shape table of an official model and the setting with that U-Net (cin256-v2's is celebahq256-class's).
UNET_TABLES = {"mnist": "mnist", "celeba64": "celeba64", "cin256-v2": "celebahq256-class",
               "text2img256": "text2img256"}


def shapes(module: nn.Module) -> list[tuple[str, list[int]]]:
    return [(name, list(tensor.shape)) for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("table, setting", UNET_TABLES.items(), ids=UNET_TABLES)
def test_unet_state_dict_is_the_official_one(table, setting):
    tables = oracle("architectures.json")
    with torch.device("meta"):   # nothing is allocated
        model = UNet(**arguments_of(UNet, tables["settings"][setting]["unet"]))
    assert shapes(model) == list(map(tuple, tables["state_dict_shapes"][f"unet/{table}"].items()))


@pytest.mark.parametrize("name", ["kl-f8", "kl-f4", "emnist_4x4x3"])
def test_autoencoder_state_dict_is_the_official_one(name):
    tables = oracle("architectures.json")
    with torch.device("meta"):
        model = autoencoder(tables["autoencoders"][name])
    assert shapes(model) == list(map(tuple, tables["state_dict_shapes"][f"autoencoder/{name}"].items()))


def count(model: nn.Module, blocks: str = "all", context_tokens: int = 2) -> int:
    parameters = dict(model.named_parameters())
    return sum(parameters[name].numel() for name in private_parameter_names(model, blocks, context_tokens))


@pytest.mark.parametrize("setting", ["mnist", "cifar10", "celeba32", "celeba64", "celebahq256-class"])
def test_trainable_counts_equal_the_authors(setting):
    case = oracle("architectures.json")["settings"][setting]
    with torch.device("meta"):
        model = nn.ModuleDict({"unet": UNet(**arguments_of(UNet, case["unet"]))})
    assert sum(p.numel() for p in model.parameters()) == case["unet"]["total_params"]
    # The authors train to_q, to_k and norm2 as well, as one must for more than one context token.
    expected = case["ablation"]["-1"]["unet_trainable"]
    assert count(model) == expected
    assert count(model, context_tokens=1) == expected - case["unet"].get("params_without_effect_if_context_length_1", 0)
    modules = [name for name, module in model["unet"].named_modules()
               if isinstance(module, unet.AttentionBlock | unet.SpatialTransformer)]
    assert modules == [name for name, _ in case["unet"]["attention_modules"]]
    if case["conditioning"]:
        params = case["conditioning"]["params"]
        # One row fewer, since this embedder adds the null class.
        model["embedder"] = ldm.ClassEmbedder(params["n_classes"] - 1, params["embed_dim"])
        assert count(model) == case["ablation"]["-1"]["optimizer_total"]


def test_from_k_equals_the_authors_ablation():
    case = oracle("architectures.json")["settings"]["cifar10"]
    with torch.device("meta"):
        model = nn.ModuleDict({"unet": UNet(**arguments_of(UNet, case["unet"]))})
    expected = case["ablation"]["9"]
    names = private_parameter_names(model, "from:8", context_tokens=2)   # the authors' 9 skips 8 of the 16 modules
    assert count(model, "from:8") == expected["unet_trainable"]
    assert names[0].startswith(f"unet.{expected['first_trained']}.")
    assert names == private_parameter_names(model, f"last:{expected['attention_modules_trained']}", context_tokens=2)


class LinearPredictor(nn.Module):
    """The noise predictor that the schedule's numbers were made with (its `model_formula`)."""

    def __init__(self, W, b, v, U):
        super().__init__()
        self.W, self.b, self.v, self.U = W, b, v, U

    def forward(self, x, t, context=None):
        per_channel = self.b + t[:, None] / 1000 * self.v
        if context is not None:
            per_channel = per_channel + context.mean(1) @ self.U.T
        return torch.einsum("oc,bchw->bohw", self.W, x) + per_channel[:, :, None, None]


@pytest.fixture
def scheduled() -> tuple[dict, LatentDiffusion]:
    """The schedule's numbers and a LatentDiffusion with their schedule and predictor, without context."""
    case = oracle("schedule.pt")
    model = LatentDiffusion({**ARCHITECTURE, **{k: case["config"][k] for k in ("linear_start", "linear_end")}})
    model.unet, model.embedder = LinearPredictor(**case["model"]), Function(lambda labels: None)
    return case, model


def test_schedule_equals_official(scheduled):
    case, model = scheduled
    close(model.alphas_cumprod, case["buffers"]["alphas_cumprod"], 1e-5, rtol=1e-5)
    # In float64 there is no rounding to forgive, not even for the last, tiny values.
    exact = make_alphas_cumprod(case["config"]["linear_start"], case["config"]["linear_end"])
    close(exact, (1.0 - case["betas_float64"]).cumprod(0), 0.0, rtol=1e-12)


def test_loss_equals_official(scheduled):
    case, model = scheduled
    q = case["q_sample"]
    close(q_sample(model.alphas_cumprod, q["x0"], q["t"], q["noise"]), q["x_t"], 1e-5, rtol=1e-5)
    losses = model(q["x0"], q["t"], q["noise"], torch.zeros(4, dtype=torch.long))
    close(losses, case["p_losses"]["per_sample"], 1e-5, rtol=1e-5)
    close(losses.mean(), case["p_losses"]["batch"], 1e-5, rtol=1e-5)


def test_ddim_timesteps_equal_official():
    case = oracle("schedule.pt")
    for run in case["ddim_schedules"] + case["ddim_runs"]:
        assert ddim_timesteps(run["steps_asked"]) == run["timesteps"].tolist()


@pytest.mark.parametrize("number", [0, 1], ids=["eta 0", "eta 1"])
def test_ddim_equals_official(scheduled, number):
    case, model = scheduled
    run, visited = case["ddim_runs"][number], []

    def predict_eps(z_t, t):
        visited.append(z_t)
        return model.unet(z_t, t)

    noise = iter(run["noises"]).__next__ if number else None
    z_0 = ddim_sample(predict_eps, model.alphas_cumprod, run["x_T"], run["steps_asked"], run["eta"], noise)
    close(torch.stack([*visited, z_0]), run["x_inter"], 1e-4)
    close(z_0, run["final"], 1e-4)


def test_guided_generation_equals_official(scheduled, monkeypatch):
    case, model = scheduled
    run = case["ddim_runs"][2]
    model.embedder = Function(lambda labels: run["uncond_context"] if labels[0] == 9 else run["context"])
    model.embedder.null_class = 9
    model.vae.decode = lambda z: z[:, :1]
    finals = []

    def from_x_T(predict_eps, alphas_cumprod, z_T, *args):   # the official run's start, the rest unchanged
        finals.append(ddim_sample(predict_eps, alphas_cumprod, run["x_T"], *args))
        return finals[0]

    monkeypatch.setattr(ldm, "ddim_sample", from_x_T)
    model.generate(torch.arange(4), run["steps_asked"], run["eta"], run["guidance_scale"])
    close(finals[0], run["final"], 1e-4)


def test_ema_equals_official():
    case = oracle("ema.pt")
    names = case["name_to_ema_name"]   # without the frozen parameters

    def agree(expected):
        for name, ema_name in names.items():
            close(ema.shadow[name], expected[ema_name], 1e-6)

    ema = EMA({name: case["parameters_initial"][name] for name in names}, case["config"]["decay"])
    agree(case["ema_initial"])
    for parameters, expected in zip(case["parameters_before_update"], case["ema_after_update"]):
        ema.update(parameters)
        agree(expected)


# ---- building blocks -------------------------------------------------------------------------------

# Parameter counts of the official code: of the U-Net, of its attention modules, and of those of the attention
# parameters that have no effect with a single context token. CompVis/latent-diffusion a506df5 built from
# DP-LDM's configs/finetuning/emnist32-dp-eps10.yaml and celeba64, and LDM's configs/latent-diffusion/cin256-v2.yaml.
UNET_COUNTS = {
    "mnist": (4_606_467, 1_578_304, 82_752, dict(
        in_channels=3, out_channels=3, model_channels=64, num_res_blocks=1, attention_resolutions=[1, 2],
        channel_mult=[1, 2], num_heads=4, context_dim=5, use_scale_shift_norm=True, resblock_updown=True)),
    "celeba64": (72_172_803, 7_959_808, 0, dict(
        in_channels=3, out_channels=3, model_channels=128, num_res_blocks=2, attention_resolutions=[4, 2, 1],
        channel_mult=[1, 2, 4], num_heads=8, use_scale_shift_norm=True, resblock_updown=True)),
    "cin256-v2": (400_920_579, 169_550_400, 13_353_600, dict(
        in_channels=3, out_channels=3, model_channels=192, num_res_blocks=2, attention_resolutions=[8, 4, 2],
        channel_mult=[1, 2, 3, 5], num_heads=1, context_dim=512)),
}


@pytest.mark.parametrize("name", UNET_COUNTS)
def test_unet_has_the_official_parameter_counts(name):
    total, attention, without_effect, config = UNET_COUNTS[name]
    with torch.device("meta"):
        model = nn.ModuleDict({"unet": UNet(**config)})
    assert sum(p.numel() for p in model.parameters()) == total
    assert count(model) == attention
    assert count(model, context_tokens=1) == attention - without_effect


def test_blocks_are_counted_from_the_input():
    with torch.device("meta"):
        model = nn.ModuleDict({"unet": UNet(**UNET_COUNTS["mnist"][-1])})
    sizes = [83_904, 331_648, 331_648, 331_648, 331_648, 83_904, 83_904]   # of its attention modules, same source
    for k in range(8):
        assert count(model, f"from:{k}") == sum(sizes[k:])
        assert count(model, f"last:{k}") == sum(sizes[7 - k:])


# LDM's models/first_stage_models/kl-f8 and kl-f4, DP-LDM's emnist_4x4x3; counted in the same code.
@pytest.mark.parametrize("total, ch_mult, attn_resolutions, resolution, z", [
    (83_653_863, [1, 2, 4, 4], [], 256, 4),
    (55_312_063, [1, 2, 4], [], 256, 3),
    (102_553_535, [1, 2, 3, 5], [32, 16, 8], 32, 3),
])
def test_autoencoder_has_the_official_parameter_count(total, ch_mult, attn_resolutions, resolution, z):
    with torch.device("meta"):
        model = AutoencoderKL(ch=128, ch_mult=ch_mult, num_res_blocks=2, attn_resolutions=attn_resolutions,
                              in_channels=3, resolution=resolution, z_channels=z, embed_dim=z)
    assert sum(p.numel() for p in model.parameters()) == total


def test_group_norm_is_official_or_has_groups_of_at_least_four():
    for channels in range(1, 400):
        groups = group_norm(channels, 1e-5).num_groups
        assert channels % groups == 0
        if channels % 32 == 0:
            assert groups == 32
        else:
            assert channels // groups >= min(4, channels)


@pytest.mark.parametrize("ch", [8, 12, 16])
def test_autoencoder_shapes(ch):
    model = AutoencoderKL(ch, [1, 2, 3], 1, [4], in_channels=3, resolution=16, z_channels=5, embed_dim=2)
    moments = model.encode(randn(2, 3, 16, 16))
    assert moments.shape == (2, 4, 4, 4)
    assert DiagonalGaussian(moments).sample().shape == (2, 2, 4, 4)
    assert model.decode(randn(2, 2, 4, 4)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("ch", [8, 16])
@pytest.mark.parametrize("context_dim", [None, 6])
@pytest.mark.parametrize("variant", [{}, dict(use_scale_shift_norm=True, resblock_updown=True)])
def test_unet_shapes_and_zero_output_at_first(ch, context_dim, variant):
    model = UNet(4, 4, ch, 1, [1, 2], [1, 2, 3], num_heads=2, context_dim=context_dim, **variant)
    context = None if context_dim is None else randn(2, 3, context_dim)
    eps = model(randn(2, 4, 8, 8), torch.tensor([0, 999]), context)
    assert eps.shape == (2, 4, 8, 8)
    assert not eps.any()   # the last layer starts at zero


def test_unet_depends_on_every_input():
    model = randomised(UNet(**ARCHITECTURE["unet"]))
    z, t, context = randn(2, 3, 4, 4), torch.tensor([3, 700]), randn(2, 1, 12, seed=2)
    base = model(z, t, context)
    changed = [model(z + 0.1, t, context), model(z, t + 50, context), model(z, t, context + 1.0)]
    assert all((base - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3 for other in changed)
    # One example's context reaches that example only.
    context[1] += 1.0
    assert torch.equal(model(z, t, context)[0], base[0])


def test_timestep_embedding_by_hand():
    # dim 4: frequencies 10000^0 = 1 and 10000^(-1/2) = 0.01, the cosines before the sines.
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0],
                             [math.cos(2.0), math.cos(0.02), math.sin(2.0), math.sin(0.02)]])
    torch.testing.assert_close(timestep_embedding(torch.tensor([0, 2]), 4), expected)


def test_geglu_gates_the_first_half_by_the_exact_gelu_of_the_second():
    layer = unet.GEGLU(1, 1)
    layer.proj.weight.data, layer.proj.bias.data = torch.tensor([[0.0], [1.0]]), torch.tensor([3.0, 0.0])
    x = torch.tensor([[-2.0], [0.5], [2.0]])
    # x * Phi(x); the tanh approximation differs by 1e-4 and more.
    expected = [[3 * v * 0.5 * (1 + math.erf(v / math.sqrt(2)))] for v in (-2.0, 0.5, 2.0)]
    torch.testing.assert_close(layer(x), torch.tensor(expected), atol=1e-6, rtol=0)


def one_tap(conv: nn.Conv2d, row: int, column: int) -> None:
    """Makes a one-channel 3x3 convolution pick a single pixel of its window."""
    conv.weight.data.zero_()
    conv.weight.data[0, 0, row, column] = 1.0
    conv.bias.data.zero_()


def test_autoencoder_downsampling_pads_right_and_below():
    x, layer = randn(1, 1, 6, 6), vae.Downsample(1)
    one_tap(layer.conv, 0, 0)
    assert torch.equal(layer(x), x[..., ::2, ::2])       # the first window starts at the first pixel
    one_tap(layer.conv, 2, 2)
    assert torch.equal(layer(x), F.pad(x, (0, 2, 0, 2))[..., 2::2, 2::2])


def test_unet_downsampling_pads_all_around():
    x, layer = randn(1, 1, 6, 6), unet.Downsample(1)
    one_tap(layer.op, 1, 1)
    assert torch.equal(layer(x), x[..., ::2, ::2])       # the first window is centred on the first pixel


def test_upsampling_repeats_pixels():
    x, layer = randn(1, 1, 3, 3), vae.Upsample(1)
    one_tap(layer.conv, 1, 1)
    assert torch.equal(layer(x), x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_group_norm_epsilons_are_the_official_ones():
    # LDM: 1e-6 in the autoencoder and the SpatialTransformer (its attention.py, model.py), torch's 1e-5 elsewhere.
    model = nn.ModuleList([LatentDiffusion(ARCHITECTURE), UNet(4, 4, 8, 1, [1], [1])])
    for name, module in model.named_modules():
        for part in module.children():
            if isinstance(part, nn.GroupNorm):
                small = ".vae." in f".{name}." or isinstance(module, unet.SpatialTransformer)
                assert part.eps == (1e-6 if small else 1e-5), name


def test_cross_attention_splits_heads_into_consecutive_channels():
    layer = randomised(unet.CrossAttention(query_dim=6, context_dim=5, num_heads=3, dim_head=4))
    x, context = randn(2, 7, 6), randn(2, 3, 5, seed=2)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        weights = (torch.einsum("bid,bjd->bij", q[..., own], k[..., own]) / 2.0).softmax(-1)   # sqrt(4) = 2
        heads.append(torch.einsum("bij,bjd->bid", weights, v[..., own]))
    torch.testing.assert_close(layer(x, context), layer.to_out(torch.cat(heads, -1)))


def test_attention_block_splits_qkv_head_by_head():
    layer = randomised(unet.AttentionBlock(channels=8, num_heads=2))
    x = randn(2, 8, 3, 3)
    heads = []
    for part in layer.qkv(layer.norm(x).flatten(2)).chunk(2, dim=1):     # one head's q, k and v
        q, k, v = part.chunk(3, dim=1)
        weights = (torch.einsum("bdi,bdj->bij", q, k) / 2.0).softmax(-1)
        heads.append(torch.einsum("bij,bdj->bdi", weights, v))
    expected = x + layer.proj_out(torch.cat(heads, 1)).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_autoencoder_attention_by_hand():
    layer = randomised(vae.AttnBlock(16))
    x = randn(2, 16, 3, 3)
    q, k, v = (conv(layer.norm(x)).flatten(2) for conv in (layer.q, layer.k, layer.v))
    weights = (torch.einsum("bci,bcj->bij", q, k) / 4.0).softmax(-1)     # sqrt(16) = 4
    expected = x + layer.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected)


def test_scale_shift_takes_the_scale_first():
    block = randomised(unet.ResBlock(8, 4, 8, scale_shift=True))
    block.emb_layers[1].weight.data.zero_()
    block.emb_layers[1].bias.data = torch.tensor([0.5] * 8 + [-0.25] * 8)
    x = randn(2, 8, 4, 4)
    h = block.out_layers[0](block.in_layers(x))
    expected = x + block.out_layers[3](F.silu(h * 1.5 - 0.25))
    torch.testing.assert_close(block(x, randn(2, 4)), expected)


def test_posterior_by_hand():
    # Two latent numbers: N(1, 1) has KL 1/2, N(0, e^2) has KL (e^2 - 1 - 2) / 2.
    posterior = DiagonalGaussian(torch.tensor([1.0, 0.0, 0.0, 2.0]).reshape(1, 4, 1, 1))
    torch.testing.assert_close(posterior.kl(), torch.tensor([0.5 + (math.exp(2.0) - 3.0) / 2]))
    torch.testing.assert_close(posterior.sample(torch.ones(1, 2, 1, 1)).flatten(), torch.tensor([2.0, math.e]))
    extreme = DiagonalGaussian(torch.tensor([0.0, 0.0, -1e9, 1e9]).reshape(1, 4, 1, 1))
    assert extreme.logvar.flatten().tolist() == [-30.0, 20.0]


def test_autoencoder_loss_by_hand():
    model = AutoencoderKL(**ARCHITECTURE["vae"])
    x = randn(2, 1, 8, 8)
    model.encode = lambda x: torch.cat([torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)], 1)   # KL 1/2 per number
    model.decode = lambda z: x + 2.0
    assert model.loss(x, kl_weight=0.1).item() == pytest.approx(2.0 + 4.0 + 0.1 * 0.5, rel=1e-5)


# ---- schedule and loss -----------------------------------------------------------------------------

def test_schedule_ends():
    alphas_cumprod = make_alphas_cumprod(0.0015, 0.0195)
    assert alphas_cumprod.dtype == torch.float64 and len(alphas_cumprod) == 1000
    assert alphas_cumprod[0].item() == pytest.approx(1 - 0.0015, rel=1e-12)
    assert (alphas_cumprod[-1] / alphas_cumprod[-2]).item() == pytest.approx(1 - 0.0195, rel=1e-12)
    assert alphas_cumprod[-1].item() == pytest.approx(1.4230e-4, rel=1e-4)   # buffer of the official code
    # Linear in sqrt(beta): the middle betas are below the mean of the ends.
    beta = 1 - (alphas_cumprod[500] / alphas_cumprod[499]).item()
    assert beta == pytest.approx((0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * 500 / 999) ** 2, rel=1e-9)


def test_q_sample_by_hand():
    z_0, eps = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), -1.0)
    z_t = q_sample(torch.tensor([1.0, 0.64]), z_0, torch.tensor([0, 1]), eps)
    torch.testing.assert_close(z_t.flatten(), torch.tensor([2.0, 0.8 * 2.0 - 0.6]))


def loss_arguments() -> tuple[torch.Tensor, ...]:
    return randn(4, 3, 4, 4), torch.tensor([0, 10, 500, 999]), randn(4, 3, 4, 4, seed=2), torch.tensor([0, 1, 2, 3])


def test_loss_of_a_zero_predictor_is_the_mean_square_of_the_noise():
    z_0, t, eps, labels = loss_arguments()
    losses = LatentDiffusion(ARCHITECTURE)(z_0, t, eps, labels)
    torch.testing.assert_close(losses, eps.square().mean(dim=(1, 2, 3)))


def test_loss_is_per_example(prototype):
    batch = loss_arguments()
    one_by_one = torch.cat([prototype(*(x[i:i + 1] for x in batch)) for i in range(4)])
    torch.testing.assert_close(prototype(*batch), one_by_one)


def test_loss_is_pure(model):
    model.train()
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first, second = model(*loss_arguments()), model(*loss_arguments())
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loss_depends_on_the_class(prototype):
    z_0, t, eps, _ = (x[:1].expand(4, *x.shape[1:]) for x in loss_arguments())
    assert len(prototype(z_0, t, eps, torch.arange(4)).unique()) == 4   # three classes and the null class


# ---- sampling --------------------------------------------------------------------------------------

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
def test_ddim_timesteps_refuse(steps):
    with pytest.raises(ValueError, match="from 1 to 1000"):
        ddim_timesteps(steps)


ALPHAS_CUMPROD = make_alphas_cumprod(0.0015, 0.0195)


def gaussian_predictor(mean, std: float):
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
    z_0 = ddim_sample(gaussian_predictor(point, 0.0), ALPHAS_CUMPROD, z_T, steps, eta,
                      lambda: torch.randn(z_T.shape, generator=generator, dtype=torch.float64))
    # The last step ends at the noise level of step 0: sqrt(a_0) z_0 + sqrt(1 - a_0) eps.
    a = ALPHAS_CUMPROD[0]
    eps = (z_0 - a.sqrt() * point) / (1 - a).sqrt()
    if eta == 0.0:   # eps does not change on the way
        last = ALPHAS_CUMPROD[ddim_timesteps(steps)[-1]]
        torch.testing.assert_close(eps, (z_T - last.sqrt() * point) / (1 - last).sqrt())
    assert 0.7 < eps.square().mean().sqrt() < 1.3   # 96 numbers: 1 with a standard deviation of 0.07


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_recovers_a_gaussian(eta):
    z_T, generator = randn(1000, 1, 4, 4), torch.Generator().manual_seed(0)
    z_0 = ddim_sample(gaussian_predictor(0.7, 0.5), ALPHAS_CUMPROD, z_T, 250, eta,
                      lambda: torch.randn(z_T.shape, generator=generator))
    assert z_0.mean().item() == pytest.approx(0.7, abs=0.02)    # standard error 0.004
    assert z_0.std().item() == pytest.approx(0.5, abs=0.02)     # standard error 0.003


def test_ddim_noise_by_hand():
    # Two steps visit t = 501 and 1. Only the first noise is not zero, and the network predicts zero.
    noise = iter([torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)]).__next__
    z_0 = ddim_sample(lambda z, t: torch.zeros_like(z), ALPHAS_CUMPROD, torch.zeros(1, 1, 1, 1), 2, 0.5, noise)
    a_501, a_1, a_0 = ALPHAS_CUMPROD[[501, 1, 0]].tolist()
    sigma = 0.5 * math.sqrt((1 - a_1) / (1 - a_501)) * math.sqrt(1 - a_501 / a_1)   # Song et al. 2021, eq. 16
    assert z_0.item() == pytest.approx(sigma * math.sqrt(a_0 / a_1), rel=1e-6)


def gaussian_flow(z_T, steps: int, order: int, mean=0.7, std=1.0) -> torch.Tensor:
    """Errors of the sampler where the exact solution is known: along the flow (z_t - mean_t) / std_t is constant."""
    z = ddim_sample(gaussian_predictor(mean, std), ALPHAS_CUMPROD, z_T, steps, order=order)
    first, last = ALPHAS_CUMPROD[ddim_timesteps(steps)[-1]], ALPHAS_CUMPROD[0]
    constant = (z_T - first.sqrt() * mean) / (first * std**2 + 1 - first).sqrt()
    return z - (last.sqrt() * mean + (last * std**2 + 1 - last).sqrt() * constant)


def test_the_second_order_needs_fewer_steps():
    z_T = randn(100, 1, 4, 4).double()
    errors = {(steps, order): gaussian_flow(z_T, steps, order).abs().mean().item()
              for steps in (12, 25, 50, 200) for order in (1, 2)}
    assert errors[12, 2] < errors[25, 1] and errors[25, 2] < errors[50, 1] / 1.5
    assert errors[200, 1] < 0.01 and errors[200, 2] < 0.001


def test_the_second_order_step_by_hand():
    """As algorithm 2 of Lu et al. 2022 writes it, with a predictor that depends on t only."""
    z_T, (t_2, t_1, t_0) = randn(2, 1, 2, 2).double(), (501, 251, 1)   # of 4 steps the first is 751

    def predicted(t):   # the network's z_0
        return 1.0 + t / 1000

    def predict_eps(z_t, t):
        a = ALPHAS_CUMPROD[t][:, None, None, None]
        return (z_t - a.sqrt() * predicted(t)[:, None, None, None].double()) / (1 - a).sqrt()

    alpha, sigma = ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()
    lam = (alpha / sigma).log()

    def step(x, s, t, D):
        return sigma[t] / sigma[s] * x - alpha[t] * torch.expm1(lam[s] - lam[t]) * D

    x = step(z_T, 751, t_2, predicted(751))
    r = (lam[t_2] - lam[751]) / (lam[t_1] - lam[t_2])
    x = step(x, t_2, t_1, (1 + 1 / (2 * r)) * predicted(t_2) - 1 / (2 * r) * predicted(751))
    x = step(step(x, t_1, t_0, predicted(t_1)), t_0, 0, predicted(t_0))   # the last two without extrapolation
    torch.testing.assert_close(ddim_sample(predict_eps, ALPHAS_CUMPROD, z_T, 4, order=2), x)


def test_ddim_draws_noise_only_with_eta():
    def run(eta):
        draws = []
        ddim_sample(lambda z, t: z, ALPHAS_CUMPROD, torch.ones(1, 1, 2, 2), 10, eta,
                    lambda: draws.append(1) or torch.zeros(1, 1, 2, 2))
        return len(draws)
    assert (run(0.0), run(1.0)) == (0, 10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_generation_follows_the_seed(prototype, eta):
    def images(seed):
        return prototype.generate(torch.tensor([0, 1]), 4, eta, 2.0, torch.Generator().manual_seed(seed))
    first = images(0)
    assert first.shape == (2, 8, 8, 1) and first.dtype == torch.uint8
    assert torch.equal(first, images(0))
    assert not torch.equal(first, images(1))


def captured_prediction(model, monkeypatch, guidance: float):
    """What `generate` hands to ddim_sample as predict_eps, for the classes 0 and 2."""
    seen = []
    monkeypatch.setattr(ldm, "ddim_sample", lambda predict_eps, alphas, z_T, *args: seen.append(predict_eps) or z_T)
    model.generate(torch.tensor([0, 2]), 1, guidance=guidance)
    return seen[0]


@torch.inference_mode()
def test_guidance_extrapolates_from_the_null_class(model, monkeypatch):
    z, t = randn(2, 3, 4, 4), torch.tensor([300, 300])
    eps_class = model.unet(z, t, model.embedder(torch.tensor([0, 2])))
    eps_null = model.unet(z, t, model.embedder(torch.tensor([3, 3])))
    assert (eps_class - eps_null).abs().max() > 1e-3
    for guidance in (0.0, 1.0, 2.0):
        expected = eps_null + guidance * (eps_class - eps_null)
        torch.testing.assert_close(captured_prediction(model, monkeypatch, guidance)(z, t), expected)


@torch.inference_mode()
def test_guidance_one_costs_one_network_evaluation(model, monkeypatch):
    calls, network = [], model.unet
    model.unet = Function(lambda *args: calls.append(1) or network(*args))
    for guidance, expected in ((1.0, 1), (2.0, 2)):
        calls.clear()
        captured_prediction(model, monkeypatch, guidance)(randn(2, 3, 4, 4), torch.tensor([3, 3]))
        assert len(calls) == expected


def test_latents_are_posterior_means_times_the_scale(model):
    model.latent_scale.fill_(5.0)
    mean, images = randn(2, 3, 4, 4), randn(2, 1, 8, 8)
    model.vae.encode = lambda x: torch.cat([mean, torch.zeros_like(mean)], 1)   # whose spread, 1, no latent has
    assert torch.equal(model.encode(images), 5.0 * mean)


def test_generation_undoes_the_scale(model, monkeypatch):
    model.latent_scale.fill_(5.0)
    decoded = []
    monkeypatch.setattr(ldm, "ddim_sample", lambda predict_eps, alphas, z_T, *args: torch.full_like(z_T, 10.0))
    model.vae.decode = lambda z: decoded.append(z) or torch.zeros(2, 1, 8, 8)
    model.generate(torch.tensor([0, 1]), 1)
    assert (decoded[0] == 2.0).all()


def test_generated_pixels_are_rounded_and_clamped(model):
    values = torch.tensor([-3.0, -1.0, -0.995, 0.5, 1.0, 3.0])   # (x + 1) * 127.5 = ..., 0.64, 191.25, ...
    model.vae.decode = lambda z: values.reshape(1, 2, 1, 3)      # [B, C, H, W]
    images = model.generate(torch.tensor([0]), 1)
    assert images.tolist() == [[[[0, 191], [0, 255], [1, 255]]]]   # [B, H, W, C]


# ---- averaging, classes ----------------------------------------------------------------------------

def test_ema_by_hand():
    weight = nn.Parameter(torch.zeros(1))
    ema = EMA({"w": weight}, decay=0.2)
    weight.data.fill_(1.0)
    assert ema.shadow["w"].item() == 0.0       # a copy
    ema.update({"w": weight})                  # decay min(0.2, 2/11)
    assert ema.shadow["w"].item() == pytest.approx(9 / 11)
    ema.update({"w": weight})                  # decay min(0.2, 3/12)
    assert ema.shadow["w"].item() == pytest.approx(1 - 2 / 11 * 0.2)


def test_new_classes_start_as_chosen_public_ones(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = replace_embedder(model, [2, 0, 0, 1, 2], 5)
    rows, old = new.embedder.embedding.weight, model.embedder.embedding.weight
    assert torch.equal(rows, old[[2, 0, 0, 1, 2, 3]])   # the null class stays last
    assert new.embedder.null_class == 5 and new.architecture["num_classes"] == 5
    rows.data.zero_()
    new.unet.out[2].weight.data.zero_()
    assert model.architecture["num_classes"] == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rescaling_the_embedder_changes_its_gradient_and_not_what_it_embeds(model):
    labels = torch.tensor([2, 0, 2])
    tokens = model.embedder(labels)
    (gradient,) = torch.autograd.grad(tokens.square().sum(), model.embedder.embedding.weight)
    for scale in (30.0, 4.0):
        model.embedder.rescale(scale)
        again = model.embedder(labels)
        torch.testing.assert_close(again, tokens)
        (scaled,) = torch.autograd.grad(again.square().sum(), model.embedder.embedding.weight)
        torch.testing.assert_close(scaled, scale * gradient)
    new = ldm.replace_embedder(model, [1, 1], 2)
    torch.testing.assert_close(new.embedder(torch.tensor([0])), model.embedder(torch.tensor([1])))


def test_new_classes_start_as_the_mean_without_a_choice(model):
    rows = replace_embedder(model, None, 2).embedder.embedding.weight
    old = model.embedder.embedding.weight
    mean = (old[0] + old[1] + old[2]) / 3   # without the null class
    torch.testing.assert_close(rows, torch.stack([mean, mean, old[3]]))


def test_new_classes_change_nothing_else(model):
    new = replace_embedder(model, [1], 1)
    z_0, t, eps, _ = loss_arguments()
    ones, zeros = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    assert torch.equal(new(z_0, t, eps, zeros), model(z_0, t, eps, ones))


# ---- checkpoints -----------------------------------------------------------------------------------

def test_checkpoint_round_trip(model, tmp_path):
    model.latent_scale.fill_(0.7)
    path = tmp_path / "runs" / "public.pt"
    save_checkpoint(path, model.train(), classes=["a", "b", "c"], config={}, spent=1.5)
    loaded, content = load_checkpoint(path)
    assert content["classes"] == ["a", "b", "c"] and content["spent"] == 1.5
    assert loaded.architecture == ARCHITECTURE and not loaded.training
    saved = model.state_dict()
    assert list(loaded.state_dict()) == list(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())

    def images(m):
        return m.generate(torch.tensor([0, 2]), 3, 1.0, 2.0, torch.Generator().manual_seed(0))
    assert torch.equal(images(loaded), images(model.eval()))
    assert [p.name for p in path.parent.iterdir()] == ["public.pt"]


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_checkpoint_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pt")
    assert "does not exist" in refusal(tmp_path)   # a folder


def test_truncated_checkpoint_is_refused(prototype, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, prototype, classes=[], config={})
    content = path.read_bytes()
    for size in (0, 1, 10, 1000, 20_000, len(content) - 300, len(content) - 1):
        path.write_bytes(content[:size])
        refusal(path)


def test_damaged_checkpoint_is_refused(prototype, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, prototype, classes=[], config={})
    content = bytearray(path.read_bytes())
    start = content.index(b"architecture")
    content[start:start + 400] = bytes(400)
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("content", [b"not a checkpoint\n", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b'{"model": 1}'])
def test_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("content", [
    {}, {"state_dict": {"w": torch.zeros(2)}}, {"model": {}}, {"architecture": ARCHITECTURE},
    {"architecture": ARCHITECTURE, "model": {"w": torch.zeros(2)}}, {"architecture": {"dim": 4}, "model": {}},
    {"architecture": ARCHITECTURE, "model": None}, {"architecture": "unet", "model": {}}, [1, 2], None,
], ids=["empty", "other keys", "no architecture", "no weights", "other weights", "other architecture",
        "weights None", "architecture a string", "list", "None"])
def test_checkpoint_of_another_program_is_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    refusal(path)


def test_checkpoint_that_is_a_bare_tensor_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.zeros(3), path)
    refusal(path)


def test_checkpoint_that_is_a_broken_pickle_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02.")   # stops with nothing on the stack
    refusal(path)


def test_checkpoint_with_other_sizes_is_refused(model, tmp_path):
    model.architecture = {**ARCHITECTURE, "num_classes": 4}
    save_checkpoint(tmp_path / "model.pt", model, classes=[], config={})
    refusal(tmp_path / "model.pt")


class Malicious:
    """Unpickling it creates a file, as any code could."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))],
                         ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(prototype, tmp_path, write):
    path, target = tmp_path / "model.pt", tmp_path / "owned"
    write({"architecture": ARCHITECTURE, "model": prototype.state_dict(), "extra": Malicious(target)}, path)
    try:
        refusal(path)
    finally:
        assert not target.exists()


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_failed_save_keeps_the_old_checkpoint(prototype, tmp_path, monkeypatch, error):
    path = tmp_path / "model.pt"
    save_checkpoint(path, prototype, classes=[], config={}, spent=1)
    old = path.read_bytes()

    def stop_halfway(content, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", stop_halfway)
    with pytest.raises(type(error)):
        save_checkpoint(path, prototype, classes=[], config={}, spent=2)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_unsavable_fact_leaves_no_file(prototype, tmp_path):
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "model.pt", prototype, fact=lambda: None)
    assert not list(tmp_path.iterdir())
