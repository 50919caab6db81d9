"""The paper's presets, what --describe says of them, the VQ autoencoder, unconditional models.

Totals and settings come from ../shared/oracles/architectures.json (CompVis/latent-diffusion a506df5 and
ParkLabML/DP-LDM fabfe10, see there); where it is absent, only the comparisons of names and shapes are skipped.
"""

import re
import resource

import numpy as np
import pytest
import torch
from test_cli import TINY, few_glyphs, refuse  # noqa: F401  (few_glyphs runs by itself)
from test_models import close, load_official, oracle, randn, randomised, shapes
from torch import nn

import config
import sample
import train
from config import Config, parse_args
from ldm import LatentDiffusion, NoEmbedder, load_checkpoint, replace_embedder
from vae import AutoencoderKL, AutoencoderVQ, DiagonalGaussian, VectorQuantizer


def described(*arguments: str) -> str:
    return config.describe(parse_args([*arguments, "--describe"], ""))


def table(text: str) -> dict[str, tuple[int, int]]:
    """{part: (parameters, trained)} of a description."""
    rows = re.findall(r"^(\S.*?) {2,}([\d,]+) +([\d,]+) +[\d.]+%$", text, re.M)
    return {part: (int(total.replace(",", "")), int(trained.replace(",", ""))) for part, total, trained in rows}


def meta_model(preset: str) -> LatentDiffusion:
    settings = Config(**config.PRESETS[preset])
    with torch.device("meta"):
        return LatentDiffusion(settings.architecture(settings.num_classes))


# ---- sizes -----------------------------------------------------------------------------------------

# name in the oracle; its totals of autoencoder and U-Net; what the authors train of the U-Net; how much of that has no
# effect with one context token, and stays frozen here; rows and width of their embedder's table.
PAPER = {
    "mnist-paper": ("mnist", 102_553_535, 4_606_467, 1_578_304, 82_752, (26, 5)),
    "cifar10": ("cifar10", 14_639_807, 90_290_563, 9_275_520, 1_232_128, (1_001, 512)),
    "celeba32": ("celeba32", 14_639_807, 162_314_115, 17_887_104, 0, (0, 0)),
    "celeba64": ("celeba64", 29_935_359, 72_172_803, 7_959_808, 0, (0, 0)),
    "celebahq256": ("celebahq256-class", 55_322_782, 400_920_579, 169_550_400, 13_353_600, (2, 512)),
    "text256": ("text2img256", 83_653_863, 872_300_484, 280_018_880, 0, None),
}
TEXT_ENCODER = 581_994_042


@pytest.mark.parametrize("preset", PAPER)
def test_description_has_the_paper_s_totals(preset):
    _, vae, unet, authors, without_effect, embedder = PAPER[preset]
    text = described("--preset", preset)
    parts = list(table(text).items())
    classes = Config(**config.PRESETS[preset]).num_classes
    own = TEXT_ENCODER if embedder is None else (classes + 1) * embedder[1]   # one row per private class, and the null
    assert [numbers for _, numbers in parts] == [
        (vae, 0), (unet, authors - without_effect), (own, own), (unet + own, authors - without_effect + own)]
    assert parts[0][0] == f"autoencoder ({'VQ' if preset == 'celebahq256' else 'KL'})"
    assert parts[2][0].startswith("text encoder" if embedder is None else "class embedder" if own else "no embedder")
    assert (f"{without_effect:,} more in the trained modules have no effect" in text) == bool(without_effect)


@pytest.mark.parametrize("preset", PAPER)
def test_the_numbers_above_are_the_oracle_s(preset):
    name, vae, unet, authors, without_effect, embedder = PAPER[preset]
    case = oracle("architectures.json")["settings"][name]
    assert (case["autoencoder"]["total_params"], case["unet"]["total_params"]) == (vae, unet)
    assert case["trainable_own_ablation"] == authors
    if Config(**config.PRESETS[preset]).attention_blocks == "all":
        assert case["trainable_all_attention"] == authors
        if embedder:   # with captions there are many context tokens, and everything has an effect
            assert case["unet"].get("params_without_effect_if_context_length_1", 0) == without_effect
    rows = (case["conditioning"] or {"params_count": 0})["params_count"]
    assert rows == (TEXT_ENCODER if embedder is None else embedder[0] * embedder[1])
    # The authors train what has no effect, and keep the public table of classes; then both count the same.
    text = table(described("--preset", preset))
    ours = list(text.values())[3][1] - list(text.values())[2][1] + without_effect + rows
    assert ours == case["ablation"][str(case["ablation_blocks"])]["optimizer_total"]


@pytest.mark.parametrize("preset", PAPER)
def test_presets_have_the_paper_s_settings(preset):
    case, ours = oracle("architectures.json")["settings"][PAPER[preset][0]], Config(**config.PRESETS[preset])
    dp = case["dp_config"]
    assert (ours.eps, ours.delta, ours.max_grad_norm) == (dp["epsilon"], dp["delta"], dp["max_grad_norm"])
    assert (ours.expected_batch, int(ours.chunk)) == (case["batch_size"], dp["max_batch_size"])
    assert (ours.linear_start, ours.linear_end) == (case["ldm"]["linear_start"], case["ldm"]["linear_end"])
    skipped = case["ldm"]["ablation_blocks"]   # the authors' K skips K - 1 modules
    assert ours.attention_blocks == ("all" if skipped == -1 else f"from:{skipped - 1}")
    architecture = ours.architecture(2)
    for part, theirs in (("unet", case["unet"]), ("vae", {**case["autoencoder"], **case["autoencoder"]["ddconfig"]})):
        for key, value in architecture[part].items():
            if not (key == "num_heads" and "num_head_channels" in theirs):
                assert value == theirs.get(key), key
    assert {"use_scale_shift_norm", "resblock_updown"} & set(architecture["unet"]) == {
        key for key in ("use_scale_shift_norm", "resblock_updown") if case["unet"].get(key)}
    channels, side = architecture["unet"]["in_channels"], case["ldm"]["image_size"]
    assert f"latents {side}x{side}x{channels}" in described("--preset", preset)


@pytest.mark.parametrize("listed, preset", [
    ("unet/mnist", "mnist-paper"), ("autoencoder/emnist_4x4x3", "mnist-paper"), ("unet/celeba64", "celeba64"),
    ("unet/cin256-v2", "celebahq256"), ("autoencoder/vq-f4", "celebahq256"), ("unet/text2img256", "text256"),
    ("autoencoder/kl-f8", "text256")])
def test_names_and_shapes_are_the_official_ones(listed, preset):
    model = meta_model(preset)
    part = model.unet if listed.startswith("unet") else model.vae
    assert shapes(part) == list(map(tuple, oracle("architectures.json")["state_dict_shapes"][listed].items()))


# Models of LDM itself that DP-LDM does not use, as their config.yaml describes them: flags of a preset, the totals of
# U-Net, attention modules, and autoencoder.
OFFICIAL = {
    "configs/latent-diffusion/cin256-v2.yaml": (400_920_579, 169_550_400, 55_322_782, "celebahq256", ""),
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": (872_300_484, 280_018_880, 83_653_863, "text256", ""),
    "models/ldm/celeba256/config.yaml": (
        274_056_163, 32_379_200, 55_322_782, "celebahq256",
        "--context-dim 0 --unet-channels 224 --unet-mult 1 2 3 4 --num-head-channels 32"),
    "models/ldm/text2img256/config.yaml": (
        403_623_939, 172_253_760, 55_322_782, "celebahq256",
        "--context-dim 640 --context-tokens 77 --num-head-channels 32"),
    "models/ldm/cin256/config.yaml": (
        394_984_196, 169_030_400, 67_717_295, "celebahq256",
        "--latent-channels 4 --codebook 16384 --vae-mult 1 2 2 4 --vae-attention 32 --unet-channels 256 "
        "--unet-mult 1 2 4 --attention-resolutions 4 2 1 --num-head-channels 32"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_flags_reach_ldm_s_own_models(name):
    unet, attention, vae, preset, flags = OFFICIAL[name]
    text = described("--preset", preset, *flags.split())
    parts = list(table(text).values())
    idle = re.search(r"^([\d,]+) more", text, re.M)
    trained = parts[1][1] + (int(idle[1].replace(",", "")) if idle else 0)
    assert (parts[1][0], trained, parts[0][0]) == (unet, attention, vae)


@pytest.mark.parametrize("name", OFFICIAL)
def test_their_totals_are_the_oracle_s(name):
    case = oracle("architectures.json")["official_models"][name]
    assert (case["unet_params"], case["attention_params"], case["ae"]) == OFFICIAL[name][:3]


# ---- memory ----------------------------------------------------------------------------------------

def test_describing_allocates_nothing():
    described()   # what torch loads for the first forward pass on the meta device
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    described("--preset", "text256")   # 3.8 GB of weights
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000   # KiB


def test_the_command_prints_the_description_and_touches_no_file(tmp_path, capsys):
    train.main(["--preset", "celebahq256", "--describe", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == described("--preset", "celebahq256") + "\n"
    assert not list(tmp_path.iterdir())


def test_memory_by_hand():
    """Weights once, seven more of each trained number, and --chunk times what an example keeps."""
    def gigabytes(*flags):
        text = described("--preset", "celebahq256", *flags)
        total = float(re.search(r"needs about ([\d.]+) GiB", text)[1])
        parts = [float(x) for x in re.findall(r"^ +([\d.]+) GiB", text, re.M)]
        assert total == pytest.approx(sum(parts), abs=0.02)
        return parts, float(re.search(r"([\d.,]+) MiB each", text)[1].replace(",", ""))

    parts, each = gigabytes("--chunk", "4")
    trained = 169_550_400 - 13_353_600 + 3 * 512
    assert parts[0] == pytest.approx(4 * (55_322_782 + 400_920_579 + 3 * 512) / 2**30, abs=0.006)
    assert parts[1] == pytest.approx(7 * 4 * trained / 2**30, abs=0.006)
    assert parts[2] == pytest.approx(4 * each / 2**10, abs=0.006)
    assert gigabytes("--chunk", "1")[0][2] == pytest.approx(parts[2] / 4, abs=0.006)
    assert gigabytes("--chunk", "4", "--noise-draws", "2")[1] == pytest.approx(2 * each, rel=1e-3)
    func = gigabytes("--chunk", "4", "--engine", "func")[0]   # a gradient for each example
    assert func[2] - parts[2] == pytest.approx(4 * 4 * trained / 2**30, abs=0.01)


def test_kept_bytes_by_hand():
    """Only what the backward pass to the named parameters needs, each tensor once, and no weights."""
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, z_t, t, context):
            return self.second(self.first(z_t).sigmoid())

    with torch.device("meta"):
        tiny = Tiny().requires_grad_(False)
    size = 5 * 3 * 7 * 7 * 4
    # The loss keeps eps_hat. The last layer's weight needs its input; the first one's too, and sigmoid its output.
    assert config.kept_bytes(tiny, ["second.weight"], (5, 3, 7, 7), 1, 0) == 2 * size
    assert config.kept_bytes(tiny, ["first.weight"], (5, 3, 7, 7), 1, 0) == 3 * size


# ---- presets in training ---------------------------------------------------------------------------

def test_captions_are_described_but_not_trained_on(tmp_path, capsys):
    for stage in ("public", "private"):
        message = refuse(capsys, train, ["--preset", "text256", "--stage", stage, "--out", tmp_path / "out"])
        assert "captions" in message
    assert not list(tmp_path.iterdir())


def test_a_preset_s_missing_images_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "data/celeba" in refuse(capsys, train, ["--preset", "celeba64"])


def test_a_codebook_is_not_trained(tmp_path, capsys):
    message = refuse(capsys, train, ["--stage", "public", "--codebook", "16", "--out", tmp_path / "out", *TINY])
    assert "--init" in message and not (tmp_path / "out").exists()


def test_flags_that_are_off_leave_no_trace_in_the_architecture():
    architecture = Config().architecture(10)   # so that checkpoints from before these flags still match
    assert set(architecture["vae"]) == {"ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels",
                                        "resolution", "z_channels", "embed_dim"}
    assert set(architecture["unet"]) == {"in_channels", "out_channels", "model_channels", "num_res_blocks",
                                         "attention_resolutions", "channel_mult", "num_heads", "context_dim"}


def test_the_flags_of_the_paper_s_unets_work_end_to_end(tmp_path):
    """mnist-paper in small: grey in three channels, attention in the autoencoder, scale-shift, heads by width."""
    train.main(["--out", str(tmp_path), *TINY, "--channels", "3", "--vae-attention", "8", "--vae-res-blocks", "2",
                "--use-scale-shift-norm", "--resblock-updown", "--num-head-channels", "4"])
    model, _ = load_checkpoint(tmp_path / "private-eps1.pt")
    assert model.unet.input_blocks[1][1].transformer_blocks[0].attn1.num_heads == 4   # 16 channels by 4
    images = sample.sample(model, np.arange(3), 2, 0.0, 1, 1.5, 0)
    assert images.shape == (3, 32, 32, 3)


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
def test_vq_latents_are_not_quantised():
    architecture = dict(vae=VQ, num_classes=3, linear_start=0.0015, linear_end=0.0195, unet=dict(
        in_channels=2, out_channels=2, model_channels=16, num_res_blocks=1, attention_resolutions=[1],
        channel_mult=[1], num_heads=2, context_dim=12))
    model, x = randomised(LatentDiffusion(architecture)), randn(4, 1, 8, 8)
    assert model.vae.encode(x).shape == (4, 4, 4, 4)
    expected = model.vae.quant_conv(model.vae.encoder(x))
    assert torch.equal(model.encode(x), expected)
    assert not torch.allclose(model.vae.quantize(expected), expected, atol=0.1)
    labels = torch.arange(4) % 3
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
