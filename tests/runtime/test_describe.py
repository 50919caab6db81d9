"""What --summary says: parameters, trained ones, and the memory of a private step."""

import re
import resource

import pytest
import torch
from oracles.official import oracle
from torch import nn

import train
from runtime.config import parse_args
from runtime.describe import TEXT_ENCODER_PARAMETERS, kept_bytes, num_parameters, summary
from tiny import configure, tiny_model
from variants.lora import add_lora
from variants.trainable import private_parameter_names


def summarised(preset: str, *assignments: str) -> str:
    words = [word for text in assignments for word in ("--set", text)]
    return summary(parse_args(["--preset", preset, "--summary", *words], ""))


def table(text: str) -> dict[str, tuple[int, int]]:
    """{part: (parameters, trained)} of a summary."""
    rows = re.findall(r"^(\S.*?) {2,}([\d,]+) +([\d,]+) +[\d.]+%$", text, re.MULTILINE)
    return {part: (int(total.replace(",", "")), int(trained.replace(",", "")))
            for part, total, trained in rows}


def idle(text: str) -> int:
    """How many parameters stay frozen since they have no effect."""
    found = re.search(r"^([\d,]+) more in the trained modules have no effect", text, re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 0


# ---- parameters --------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, setting, latents, embedder", [
    ("mnist-paper", "mnist", "4x4x3", "class embedder, 10 + 1 rows"),
    ("cifar10", "cifar10", "16x16x3", "class embedder, 10 + 1 rows"),
    ("celeba32", "celeba32", "16x16x3", "no embedder"),
    ("celeba64", "celeba64", "32x32x3", "no embedder"),
    ("celebahq256", "celebahq256-class", "64x64x3", "class embedder, 2 + 1 rows"),
    ("text256", "text2img256", "32x32x4", "text encoder of txt2img-1p4B")])
def test_the_totals_are_the_authors(preset, setting, latents, embedder):
    case = oracle("architectures.json")["settings"][setting]
    text = summarised(preset)
    (vae, unet, embeds, both), parts = table(text).values(), [*table(text)]
    assert f"latents {latents}\n" in text and parts[2] == embedder
    assert parts[0] == f"autoencoder ({'VQ' if preset == 'celebahq256' else 'KL'})"
    assert vae == (case["autoencoder"]["total_params"], 0)
    assert unet == (case["unet"]["total_params"], case["trainable_own_ablation"] - idle(text))
    assert both == (unet[0] + embeds[0], unet[1] + embeds[1]) and embeds[0] == embeds[1]
    if "class" in embedder:   # the authors keep the public table; ours has a null class
        rows, width = (int(embedder.split()[2]) + 1, case["conditioning"]["params"]["embed_dim"])
        assert embeds[0] == rows * width
    else:
        assert embeds[0] == ("text" in embedder) * TEXT_ENCODER_PARAMETERS
        assert embeds[0] == (case["conditioning"] or {"params_count": 0})["params_count"]


# LDM's own models that DP-LDM does not use, as their config.yaml describes them.
LARGE = ["vae.z_channels=4", "vae.n_embed=16384", "vae.ch_mult=[1, 2, 2, 4]",
         "vae.attn_resolutions=[32]", "unet.model_channels=256", "unet.channel_mult=[1, 2, 4]",
         "unet.attention_resolutions=[4, 2, 1]", "unet.num_head_channels=32"]
OFFICIAL = {
    "configs/latent-diffusion/cin256-v2.yaml": ("celebahq256",),
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": ("text256",),
    "models/ldm/celeba256/config.yaml": (
        "celebahq256", "unet.context_dim=0", "unet.model_channels=224",
        "unet.channel_mult=[1, 2, 3, 4]", "unet.num_head_channels=32"),
    "models/ldm/text2img256/config.yaml": (
        "celebahq256", "unet.context_dim=640", "text.length=77", "unet.num_head_channels=32"),
    "models/ldm/cin256/config.yaml": ("celebahq256", *LARGE)}


@pytest.mark.parametrize("name", OFFICIAL)
def test_settings_reach_ldm_s_own_models(name):
    case, text = oracle("architectures.json")["official_models"][name], summarised(*OFFICIAL[name])
    vae, unet, *_ = table(text).values()
    assert (vae[0], unet[0]) == (case["ae"], case["unet_params"])
    assert unet[1] + idle(text) == case["attention_params"]


@pytest.mark.parametrize("assignments, kind", [
    (["text.length=7", "text.layers=2"], "text encoder, 2 layers"),
    (["private.trainable=lora", "private.lora_rank=3"], "class embedder, 10 + 1 rows"),
    (["private.trainable=all"], "class embedder, 10 + 1 rows"),
    (["private.trainable=last:1"], "class embedder, 10 + 1 rows")])
def test_it_counts_what_a_run_would_train(assignments, kind):
    config, model = configure(*assignments), tiny_model(*assignments)
    if config.private.trainable == "lora":
        add_lora(model.unet, config.private.lora_rank)
    found = table(summary(config))
    trained = num_parameters(map(model.get_parameter, private_parameter_names(
        model, config.context_tokens, config.private.trainable)))
    embedder = num_parameters(model.embedder.parameters())
    classes = (10 - 3) * config.unet.context_dim if "class" in kind else 0   # tiny_model has 3
    assert found[kind] == (embedder + classes, embedder + classes)
    assert found["U-Net and embedder"][1] == trained + classes


# ---- memory ------------------------------------------------------------------------------------

def gigabytes(*assignments: str) -> tuple[list[float], float]:
    """(GiB of weights, of trained numbers, of examples; MiB of one example) of celebahq256."""
    text = summarised("celebahq256", *assignments)
    total = float(re.search(r"needs about ([\d.]+) GiB", text)[1])
    parts = [float(x) for x in re.findall(r"^ +([\d.]+) GiB", text, re.MULTILINE)]
    assert total == pytest.approx(sum(parts), abs=0.02)
    return parts, float(re.search(r"([\d.,]+) MiB each", text)[1].replace(",", ""))


def test_memory_by_hand():
    (weights, numbers, examples), each = gigabytes("run.physical_batch=4")
    trained = 169_550_400 - 13_353_600 + 3 * 512
    assert weights == pytest.approx(4 * (55_322_782 + 400_920_579 + 3 * 512) / 2**30, abs=0.006)
    assert numbers == pytest.approx(7 * 4 * trained / 2**30, abs=0.006)
    assert examples == pytest.approx(4 * each / 2**10, abs=0.006)
    several = gigabytes("run.physical_batch=4", "private.noise_multiplicity=2")[1]
    assert several == pytest.approx(2 * each, rel=1e-3)
    own = gigabytes("run.physical_batch=4", "run.clipping=vmap")[0][2]   # a gradient each
    assert own - examples == pytest.approx(4 * 4 * trained / 2**30, abs=0.01)
    assert gigabytes("run.physical_batch=auto")[0][2] == pytest.approx(each / 2**10, abs=0.006)


def test_kept_bytes_by_hand():
    """What the backward pass to the named parameters needs: each tensor once, and no weights."""
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, z_t, t, context):
            return self.second(self.first(z_t).sigmoid())

    with torch.device("meta"):
        tiny = Tiny().requires_grad_(False)
    size = 5 * 3 * 7 * 7 * 4
    # The loss keeps eps_hat. The last weight needs its input, the first one sigmoid's output too.
    assert kept_bytes(tiny, ["second.weight"], (5, 3, 7, 7), 1, 0) == 2 * size
    assert kept_bytes(tiny, ["first.weight"], (5, 3, 7, 7), 1, 0) == 3 * size


def test_a_summary_allocates_nothing():
    summarised("glyphs")   # what torch loads for the first pass on the meta device
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summarised("text256")   # 3.8 GB of weights
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000   # KiB


def test_the_program_prints_it_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "celeba64", "--summary", "--out", "out"])
    assert capsys.readouterr().out == summarised("celeba64") + "\n"
    assert not list(tmp_path.iterdir())
