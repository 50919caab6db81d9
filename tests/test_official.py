"""`--init`: official checkpoints, imitated with random weights in exactly their layout, and files that are none."""

import copy
import re
import sys
import types

import numpy as np
import pytest
import torch
from test_cli import TINY, few_glyphs, refuse  # noqa: F401  (few_glyphs runs by itself)
from test_models import Malicious, oracle, randomised

import sample
import train
from config import Config, parse_args
from ldm import LatentDiffusion, load_checkpoint
from official import load_official

TINY_CONFIG = parse_args(TINY, "")
ARCHITECTURE = TINY_CONFIG.architecture(7)
UNCONDITIONAL = {**ARCHITECTURE, "unet": {**ARCHITECTURE["unet"], "context_dim": None}}
VQ = {**ARCHITECTURE, "vae": {**ARCHITECTURE["vae"], "n_embed": 16}}


def schedule(linear_end: float = 0.0195) -> dict[str, torch.Tensor]:
    """The twelve buffers of the official DDPM class, computed as Ho et al. 2020 define them."""
    betas = np.linspace(0.0015**0.5, linear_end**0.5, 1000) ** 2
    a = np.cumprod(1 - betas)
    before = np.append(1.0, a[:-1])
    variance = betas * (1 - before) / (1 - a)
    buffers = dict(
        betas=betas, alphas_cumprod=a, alphas_cumprod_prev=before, sqrt_alphas_cumprod=a**0.5,
        sqrt_one_minus_alphas_cumprod=(1 - a) ** 0.5, log_one_minus_alphas_cumprod=np.log(1 - a),
        sqrt_recip_alphas_cumprod=a**-0.5, sqrt_recipm1_alphas_cumprod=(1 / a - 1) ** 0.5,
        posterior_variance=variance, posterior_log_variance_clipped=np.log(np.maximum(variance, 1e-20)),
        posterior_mean_coef1=betas * before**0.5 / (1 - a),
        posterior_mean_coef2=(1 - before) * (1 - betas)**0.5 / (1 - a))
    return {name: torch.from_numpy(values).float() for name, values in buffers.items()}


def official_state(model: LatentDiffusion, rows: int = 7, ema: bool = True, scale: float | None = 0.25) -> dict:
    """`model` as the state_dict of the official LatentDiffusion, in its order; averages are the weights plus 1."""
    state = schedule()
    if scale is not None:
        state["scale_factor"] = torch.tensor(scale)
    unet = model.unet.state_dict()
    state |= {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    if ema:
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int)}
        state |= {f"model_ema.diffusion_model{name.replace('.', '')}": tensor + 1 for name, tensor in unet.items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in model.vae.state_dict().items()}
    if rows:
        state["cond_stage_model.embedding.weight"] = torch.randn(rows, 8, generator=torch.Generator().manual_seed(3))
    return copy.deepcopy(state)   # no tensor is a view of another


def write(path, state: dict, monkeypatch=None, **more):
    """A Lightning checkpoint. With monkeypatch, its callbacks are kept under their class, as old Lightning does."""
    content = {"epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": state,
               "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}}], "lr_schedulers": [],
               **more}
    if monkeypatch:
        name = "pytorch_lightning.callbacks.model_checkpoint"
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        callback = type("ModelCheckpoint", (), {"__module__": name})
        sys.modules[name].ModelCheckpoint = callback
        content["callbacks"] = {callback: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1),
                                           "a number of numpy": np.float64(0.123)}}
    torch.save(content, path)
    if monkeypatch:
        monkeypatch.undo()
        assert name not in sys.modules
    return path


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return randomised(LatentDiffusion(ARCHITECTURE))


def refusal(path, architecture=ARCHITECTURE) -> str:
    with pytest.raises(ValueError) as caught:
        load_official(path, architecture)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# ---- the layout ------------------------------------------------------------------------------------

GROUPS = re.compile(r"^(model\.diffusion_model|model_ema|first_stage_model|cond_stage_model)\.")


@pytest.mark.parametrize("setting, options", [
    ("mnist", dict(scale=None)), ("celeba32", dict(rows=0)), ("celeba64", dict(rows=0, ema=False, scale=None)),
    ("celebahq256-class", dict(ema=False, scale=None))])
def test_the_imitation_has_the_official_layout(model, setting, options):
    groups = oracle("architectures.json")["checkpoint_groups"][setting]
    state = official_state(model, **options)
    own = {GROUPS.sub(r"\1.*", key) if GROUPS.match(key) and "*" not in key else key for key in state}
    own = {re.sub(r"\*.*", "*", key) for key in own}
    assert own == {key for key in groups if " " not in key}
    for key, shape in groups.items():
        if key in state:
            assert [*state[key].shape] == shape
    averages, weights = (sum(key.startswith(p) for key in state) for p in ("model_ema.", "model.diffusion_model."))
    assert not averages or averages == weights + 2
    if "model_ema example" in groups:
        assert set(groups["model_ema example"]) <= set(state)


def test_the_imitation_s_schedule_is_the_official_one():
    expected = oracle("schedule.pt")["buffers"]
    for name, values in schedule().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)


# ---- what is read ----------------------------------------------------------------------------------

def test_every_weight_arrives_in_its_place(model, tmp_path, monkeypatch, capsys):
    state = official_state(model)
    loaded, facts = load_official(write(tmp_path / "a.ckpt", state, monkeypatch), ARCHITECTURE)
    for name, tensor in model.unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[name], tensor + 1, msg=name)   # the moving average
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], tensor), name
    assert loaded.latent_scale == 0.25 and not loaded.training
    assert loaded.architecture == ARCHITECTURE
    assert facts == {"classes": [], "config": {"public_data": str(tmp_path / "a.ckpt")}}
    printed = capsys.readouterr().out
    assert "missing" not in printed and "unexpected" not in printed
    assert f"({len(model.unet.state_dict())} moving averages)" in printed


def test_without_moving_averages_the_weights_themselves_are_taken(model, tmp_path):
    loaded, _ = load_official(write(tmp_path / "a.ckpt", official_state(model, ema=False, scale=None)), ARCHITECTURE)
    assert all(torch.equal(loaded.unet.state_dict()[name], t) for name, t in model.unet.state_dict().items())
    assert loaded.latent_scale == 1.0   # LDM's default


def test_moving_averages_of_some_weights_only(model, tmp_path):
    """The official average leaves out what was frozen: there the weights themselves count."""
    state = official_state(model)
    frozen = {key for key in state if key.startswith("model_ema.diffusion_modelinput_blocks")}
    loaded, _ = load_official(write(tmp_path / "a.ckpt", {k: v for k, v in state.items() if k not in frozen}),
                              ARCHITECTURE)
    for name, tensor in model.unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[name], tensor + (not name.startswith("input_blocks")))


def test_half_precision_becomes_single(model, tmp_path):
    state = {name: tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor
             for name, tensor in official_state(model).items()}
    loaded, _ = load_official(write(tmp_path / "a.ckpt", state), ARCHITECTURE)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


@pytest.mark.parametrize("rows", [7, 1000, 1001])
def test_class_embeddings_get_the_null_class_last(model, tmp_path, rows):
    """LDM's table for ImageNet has 1001 rows, the last for no class; others have none, and start at the mean."""
    state = official_state(model, rows)
    loaded, _ = load_official(write(tmp_path / "a.ckpt", state), ARCHITECTURE)
    table, own = state["cond_stage_model.embedding.weight"], loaded.embedder.embedding.weight
    classes = 1000 if rows == 1001 else rows
    assert loaded.embedder.null_class == loaded.architecture["num_classes"] == classes
    assert torch.equal(own[:classes], table[:classes])
    torch.testing.assert_close(own[-1], table[-1] if rows == 1001 else table.mean(0))
    assert torch.equal(loaded.embedder(torch.tensor([2]))[0, 0], table[2])


def test_unconditional_files(model, tmp_path, capsys):
    source = randomised(LatentDiffusion(UNCONDITIONAL))
    loaded, _ = load_official(write(tmp_path / "a.ckpt", official_state(source, rows=0, ema=False)), UNCONDITIONAL)
    assert all(torch.equal(loaded.unet.state_dict()[name], t) for name, t in source.unet.state_dict().items())
    assert "missing" not in capsys.readouterr().out


def test_vq_files(tmp_path):
    source = randomised(LatentDiffusion(VQ))
    loaded, _ = load_official(write(tmp_path / "a.ckpt", official_state(source, scale=None)), VQ)
    assert torch.equal(loaded.vae.quantize.embedding.weight, source.vae.quantize.embedding.weight)
    assert loaded.latent_scale == 1.0


def test_a_text_encoder_is_left_behind_by_name(model, tmp_path, capsys):
    state = official_state(model, rows=0) | {"cond_stage_model.transformer.norm.weight": torch.ones(8)}
    loaded, _ = load_official(write(tmp_path / "a.ckpt", state), ARCHITECTURE)
    assert loaded.architecture["num_classes"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["missing: cond_stage_model.embedding.weight",
                         "unexpected: cond_stage_model.transformer.norm.weight"] and len(lines) == 3


def test_losses_of_the_autoencoder_are_counted_and_strangers_named(model, tmp_path, capsys):
    more = {f"first_stage_model.loss.discriminator.main.{i}.weight": torch.zeros(2) for i in range(4)}
    path = write(tmp_path / "a.ckpt", official_state(model) | more | {"logvar": torch.zeros(1000)})
    load_official(path, ARCHITECTURE)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["unexpected: logvar"]
    assert "left out 4 of the autoencoder's loss" in last


# ---- what is refused -------------------------------------------------------------------------------

def test_every_missing_and_unexpected_key_is_reported(model, tmp_path, capsys):
    state = official_state(model, ema=False)
    gone = ["model.diffusion_model.time_embed.0.weight", "first_stage_model.decoder.conv_in.bias"]
    for key in gone:
        del state[key]
    state["model.diffusion_model.label_emb.0.weight"] = torch.zeros(3)
    message = refusal(write(tmp_path / "a.ckpt", state))
    assert "3 differences" in message
    reported = set(capsys.readouterr().out.splitlines())
    assert reported == {*(f"missing: {key}" for key in gone), "unexpected: model.diffusion_model.label_emb.0.weight"}


@pytest.mark.parametrize("key", ["model.diffusion_model.out.2.weight", "first_stage_model.post_quant_conv.weight",
                                 "model_ema.diffusion_modelout2weight", "cond_stage_model.embedding.weight",
                                 "scale_factor"])
def test_another_shape_is_refused(model, tmp_path, key):
    state = official_state(model, ema="ema" in key)
    state[key] = torch.zeros(2, 3)
    assert "another architecture" in refusal(write(tmp_path / "a.ckpt", state))


def test_one_weight_too_many_is_refused(model, tmp_path):
    state = official_state(model) | {"model.diffusion_model.input_blocks.9.0.weight": torch.zeros(2)}
    assert "input_blocks.9.0.weight is unexpected" in refusal(write(tmp_path / "a.ckpt", state))


def test_another_noise_schedule_is_refused(model, tmp_path):
    message = refusal(write(tmp_path / "a.ckpt", official_state(model) | schedule(linear_end=0.0155)))
    assert "0.0015 to 0.0155" in message and "--linear-end say" in message
    short = {name: values[:500] for name, values in schedule().items()}
    assert "500 steps" in refusal(write(tmp_path / "b.ckpt", official_state(model) | short))


@pytest.mark.parametrize("place", ["beside the weights", "among the weights", "as a callback"])
def test_code_in_a_file_is_not_run(model, tmp_path, capsys, place):
    target, state = tmp_path / "owned", official_state(model)
    evil = Malicious(target)
    more = {"hyper_parameters": evil} if place == "beside the weights" else {}
    if place == "among the weights":
        state["model.diffusion_model.out.2.bias"] = evil
    if place == "as a callback":
        more = {"callbacks": {"pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": {"state": evil}}}
    path = write(tmp_path / "a.ckpt", state, **more)
    message = refuse(capsys, train, ["--init", path, "--out", tmp_path / "out", *TINY])
    assert not target.exists() and not (tmp_path / "out").exists()
    assert "is refused: it asks for" in message and "open" in message
    torch.load(path, weights_only=False)   # the payload is a real one
    assert target.exists()


def test_names_that_are_not_on_the_list_are_refused(model, tmp_path):
    path = write(tmp_path / "a.ckpt", official_state(model), hyper_parameters=Config())
    assert "config.Config" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04", b"\x80\x02."])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert "is refused: it is damaged" in refusal(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": None}, {"state_dict": {"a": 1}}])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    assert "no state_dict" in refusal(tmp_path / "a.ckpt")


def test_missing_and_truncated_files_are_refused(model, tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.ckpt")
    path = write(tmp_path / "a.ckpt", official_state(model))
    path.write_bytes(path.read_bytes()[:5000])
    refusal(path)


# ---- train.py --------------------------------------------------------------------------------------

@pytest.fixture
def file(model, tmp_path, monkeypatch):
    return write(tmp_path / "official.ckpt", official_state(model), monkeypatch)


def test_private_training_starts_from_the_file_without_a_public_stage(model, file, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(["--init", str(file), "--eps", "3", "--out", str(out), *TINY])
    printed = capsys.readouterr().out
    assert f"a model that knows {file}" in printed and "running the public stage" not in printed
    assert {p.name for p in out.iterdir()} == {"private-eps3.pt", "private-eps3.png", "private-eps3.privacy.json"}
    private, facts = load_checkpoint(out / "private-eps3.pt")
    assert facts["public_config"] == {"public_data": str(file)} and private.embedder.null_class == 10
    frozen = private.unet.input_blocks[0][0].weight
    torch.testing.assert_close(frozen, model.unet.input_blocks[0][0].weight + 1)
    assert torch.equal(private.vae.decoder.conv_in.weight, model.vae.decoder.conv_in.weight)
    assert sample.sample(private, np.arange(3), 2, 0.0, 1, 1.5, 0).shape == (3, 32, 32, 1)


def test_the_private_classes_start_as_the_mean_of_the_file_s(model, file, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(train, "train_private", lambda model, *rest: starts.append(copy.deepcopy(model)))
    train.main(["--init", str(file), "--out", str(tmp_path / "out"), *TINY])
    table = official_state(model)["cond_stage_model.embedding.weight"]
    torch.testing.assert_close(starts[0].embedder.embedding.weight, table.mean(0).expand(11, -1))


def test_public_training_goes_on_from_the_file_with_its_autoencoder_and_scale(model, file, tmp_path):
    out = tmp_path / "out"
    train.main(["--stage", "public", "--init", str(file), "--out", str(out), *TINY])
    public, facts = load_checkpoint(out / "public.pt")
    assert {p.name for p in out.iterdir()} == {"public.pt", "public.png"}
    assert torch.equal(public.vae.decoder.conv_in.weight, model.vae.decoder.conv_in.weight)
    assert public.latent_scale == 0.25 and public.embedder.null_class == 52 == len(facts["classes"])
    weight = public.unet.input_blocks[0][0].weight
    assert not torch.equal(weight, model.unet.input_blocks[0][0].weight + 1)
    torch.testing.assert_close(weight, model.unet.input_blocks[0][0].weight + 1, atol=0.02, rtol=0)   # three steps
    train.main(["--eps", "3", "--out", str(out), *TINY])   # and the private stage from there


def test_two_public_models_are_one_too_many(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--public-checkpoint both" in refuse(
        capsys, train, ["--init", file, "--public-checkpoint", file, "--out", out, *TINY])
    out.mkdir()
    (out / "public.pt").write_bytes(file.read_bytes())
    assert "two public models" in refuse(capsys, train, ["--init", file, "--out", out, *TINY])
    assert [p.name for p in out.iterdir()] == ["public.pt"]


def test_a_file_of_another_architecture_writes_nothing(file, tmp_path, capsys):
    for flags in (["--unet-channels", "32"], ["--codebook", "16"], ["--linear-end", "0.0155"]):
        refuse(capsys, train, ["--init", file, "--out", tmp_path / "out", *TINY, *flags])
        assert not (tmp_path / "out").exists()


def test_a_vq_file_is_fine_tuned_privately(tmp_path):
    path = write(tmp_path / "a.ckpt", official_state(randomised(LatentDiffusion(VQ)), scale=None))
    train.main(["--init", str(path), "--codebook", "16", "--eps", "3", "--out", str(tmp_path / "out"), *TINY])
    private, _ = load_checkpoint(tmp_path / "out" / "private-eps3.pt")
    assert sample.sample(private, np.arange(3), 2, 0.0, 1, 1.5, 0).shape == (3, 32, 32, 1)
