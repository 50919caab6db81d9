"""Official checkpoints, imitated with random weights in exactly their layout, and other files."""

import copy
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.official import oracle, randomised

from ldm import LatentDiffusion
from runtime.checkpoints import build_model, load_pretrained
from runtime.config import Config
from tiny import configure
from variants.official import fill_official

ARCHITECTURE = configure().architecture(7)
UNCONDITIONAL = configure("unet.context_dim=0").architecture(1)
VQ = configure("vae.n_embed=16").architecture(7)

State = dict[str, torch.Tensor]


# ---- the imitation -----------------------------------------------------------------------------

def schedule(linear_end: float = 0.0195) -> State:
    """The twelve buffers of the official DDPM class, computed as Ho et al. 2020 define them."""
    betas = np.linspace(0.0015**0.5, linear_end**0.5, 1000) ** 2
    a = np.cumprod(1 - betas)
    before = np.append(1.0, a[:-1])
    variance = betas * (1 - before) / (1 - a)
    buffers = dict(
        betas=betas, alphas_cumprod=a, alphas_cumprod_prev=before, sqrt_alphas_cumprod=a**0.5,
        sqrt_one_minus_alphas_cumprod=(1 - a) ** 0.5, log_one_minus_alphas_cumprod=np.log(1 - a),
        sqrt_recip_alphas_cumprod=a**-0.5, sqrt_recipm1_alphas_cumprod=(1 / a - 1) ** 0.5,
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(np.maximum(variance, 1e-20)),
        posterior_mean_coef1=betas * before**0.5 / (1 - a),
        posterior_mean_coef2=(1 - before) * (1 - betas)**0.5 / (1 - a))
    return {name: torch.from_numpy(values).float() for name, values in buffers.items()}


def official_state(model: LatentDiffusion, rows: int = 7, ema: bool = True,
                   scale: float | None = 0.25) -> State:
    """`model` as the state_dict of the official LatentDiffusion, in its order.

    The averages are the weights plus 1.
    """
    state, unet = schedule(), model.unet.state_dict()
    if scale is not None:
        state["scale_factor"] = torch.tensor(scale)
    state |= {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    if ema:
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(5, dtype=torch.int)
        state |= {f"model_ema.diffusion_model{name.replace('.', '')}": tensor + 1
                  for name, tensor in unet.items()}
    state |= {f"first_stage_model.{k}": tensor for k, tensor in model.vae.state_dict().items()}
    if rows:
        generator = torch.Generator().manual_seed(3)
        state["cond_stage_model.embedding.weight"] = torch.randn(rows, 8, generator=generator)
    return copy.deepcopy(state)   # no tensor is a view of another


def write(path: Path, state: State, **more: object) -> Path:
    """A Lightning checkpoint."""
    content = {"epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2",
               "state_dict": state, "lr_schedulers": [],
               "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}}], **more}
    torch.save(content, path)
    return path


@pytest.fixture
def old_callbacks(monkeypatch) -> dict:
    """Callbacks under their class, as old Lightning keeps them. monkeypatch.undo removes it."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = callback
    return {callback: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1),
                       "a number of numpy": np.float64(0.123)}}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return randomised(build_model(ARCHITECTURE))


def load(path: Path, architecture: dict = ARCHITECTURE) -> LatentDiffusion:
    return load_pretrained(path, architecture)[0]


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and "--" not in message
    return message


GROUPS = re.compile(r"^(model\.diffusion_model|model_ema|first_stage_model|cond_stage_model)\..*")


@pytest.mark.parametrize("setting, options", [
    ("mnist", dict(scale=None)), ("celeba32", dict(rows=0)),
    ("celeba64", dict(rows=0, ema=False, scale=None)),
    ("celebahq256-class", dict(ema=False, scale=None))])
def test_the_imitation_has_the_official_layout(model, setting, options):
    groups = oracle("architectures.json")["checkpoint_groups"][setting]
    state = official_state(model, **options)
    assert {GROUPS.sub(r"\1.*", key) for key in state} == {key for key in groups if " " not in key}
    for key in groups.keys() & state.keys():
        assert [*state[key].shape] == groups[key]
    averages, weights = (sum(key.startswith(prefix) for key in state)
                         for prefix in ("model_ema.", "model.diffusion_model."))
    assert not averages or averages == weights + 2
    assert {*groups.get("model_ema example", [])} <= state.keys()


def test_the_imitation_s_schedule_is_the_official_one():
    expected = oracle("schedule.pt")["buffers"]
    for name, values in schedule().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)


# ---- what is read ------------------------------------------------------------------------------

def test_every_weight_arrives_in_its_place(model, tmp_path, capsys):
    path = write(tmp_path / "a.ckpt", official_state(model))
    loaded, metadata = load_pretrained(path, ARCHITECTURE)
    assert metadata == {"classes": [], "config": {"data": {"public": str(path)}}}
    assert not loaded.training
    for name, tensor in model.unet.state_dict().items():   # the moving average
        torch.testing.assert_close(loaded.unet.state_dict()[name], tensor + 1, msg=name)
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], tensor), name
    assert loaded.latent_scale == 0.25 and loaded.architecture == ARCHITECTURE
    printed = capsys.readouterr().out
    assert "missing" not in printed and "unexpected" not in printed
    assert f"({len(model.unet.state_dict())} moving averages)" in printed


def test_a_file_of_old_lightning_is_read_without_it(model, tmp_path, old_callbacks, monkeypatch):
    path = write(tmp_path / "a.ckpt", official_state(model), callbacks=old_callbacks)
    monkeypatch.undo()
    assert "pytorch_lightning" not in sys.modules
    assert load(path).latent_scale == 0.25


def test_without_moving_averages_the_weights_are_taken(model, tmp_path):
    loaded = load(write(tmp_path / "a.ckpt", official_state(model, ema=False, scale=None)))
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor)
    assert loaded.latent_scale == 1.0   # LDM's default


def test_what_was_frozen_has_no_average(model, tmp_path):
    state = official_state(model)
    for key in [key for key in state if key.startswith("model_ema.diffusion_modelinput_blocks")]:
        del state[key]
    loaded = load(write(tmp_path / "a.ckpt", state))
    for name, tensor in model.unet.state_dict().items():
        expected = tensor + (not name.startswith("input_blocks"))
        torch.testing.assert_close(loaded.unet.state_dict()[name], expected)


def test_half_precision_becomes_single(model, tmp_path):
    def half(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor

    state = {name: half(tensor) for name, tensor in official_state(model).items()}
    loaded = load(write(tmp_path / "a.ckpt", state))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


@pytest.mark.parametrize("rows", [7, 1000, 1001])
def test_class_embeddings_get_the_null_class_last(model, tmp_path, rows):
    """ImageNet's table has 1001 rows, the last for no class; in others it starts at the mean."""
    state = official_state(model, rows)
    loaded = load(write(tmp_path / "a.ckpt", state))
    table, own = state["cond_stage_model.embedding.weight"], loaded.embedder.embedding.weight
    classes = 1000 if rows == 1001 else rows
    assert loaded.embedder.null_class == loaded.architecture["num_classes"] == classes
    assert torch.equal(own[:classes], table[:classes])
    torch.testing.assert_close(own[-1], table[-1] if rows == 1001 else table.mean(0))
    assert torch.equal(loaded.embedder(torch.tensor([2]))[0, 0], table[2])


def test_unconditional_files(tmp_path, capsys):
    source = randomised(build_model(UNCONDITIONAL))
    path = write(tmp_path / "a.ckpt", official_state(source, rows=0, ema=False))
    loaded = load(path, UNCONDITIONAL)
    for name, tensor in source.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor)
    assert "missing" not in capsys.readouterr().out


def test_vq_files(tmp_path):
    source = randomised(build_model(VQ))
    loaded = load(write(tmp_path / "a.ckpt", official_state(source, scale=None)), VQ)
    assert torch.equal(loaded.vae.quantize.embedding.weight, source.vae.quantize.embedding.weight)
    assert loaded.latent_scale == 1.0


def test_a_text_encoder_is_left_behind_by_name(model, tmp_path, capsys):
    state = official_state(model, rows=0)
    state["cond_stage_model.transformer.norm.weight"] = torch.ones(8)
    assert load(write(tmp_path / "a.ckpt", state)).embedder.null_class == 1
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "missing: cond_stage_model.embedding.weight",
        "unexpected: cond_stage_model.transformer.norm.weight"]


def test_losses_are_counted_and_strangers_named(model, tmp_path, capsys):
    state = official_state(model) | {"logvar": torch.zeros(1000)}
    state |= {f"first_stage_model.loss.main.{i}.weight": torch.zeros(2) for i in range(4)}
    load(write(tmp_path / "a.ckpt", state))
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["unexpected: logvar"]
    assert "left out 4 of the autoencoder's loss" in last


# ---- what is refused ---------------------------------------------------------------------------

def test_every_missing_and_unexpected_key_is_reported(model, tmp_path, capsys):
    state = official_state(model, ema=False)
    gone = ["model.diffusion_model.time_embed.0.weight", "first_stage_model.decoder.conv_in.bias"]
    for key in gone:
        del state[key]
    state["model.diffusion_model.label_emb.0.weight"] = torch.zeros(3)
    assert "3 differences" in refusal(write(tmp_path / "a.ckpt", state))
    assert {*capsys.readouterr().out.splitlines()} == {
        *(f"missing: {key}" for key in gone),
        "unexpected: model.diffusion_model.label_emb.0.weight"}


@pytest.mark.parametrize("key", [
    "model.diffusion_model.out.2.weight", "first_stage_model.post_quant_conv.weight",
    "model_ema.diffusion_modelout2weight", "cond_stage_model.embedding.weight", "scale_factor"])
def test_another_shape_is_refused(model, tmp_path, key):
    state = official_state(model, ema="ema" in key)
    state[key] = torch.zeros(2, 3)
    assert "its architecture is not the model's" in refusal(write(tmp_path / "a.ckpt", state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["scale_factor", "first_stage_model.decoder.conv_in.bias",
                                 "model_ema.diffusion_modelout2weight",
                                 "cond_stage_model.embedding.weight"])
def test_numbers_that_are_not_finite_are_refused(model, tmp_path, key, value):
    state = official_state(model)
    state[key].view(-1)[-1] = value
    assert "numbers that are not finite" in refusal(write(tmp_path / "a.ckpt", state))


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_an_official_latent_scale_must_be_positive(model, tmp_path, scale):
    path = write(tmp_path / "a.ckpt", official_state(model, scale=scale))
    assert "a.ckpt is refused: its latent scale is" in refusal(path)


def test_a_refused_file_leaves_the_model_as_it_was(model, tmp_path):
    own = copy.deepcopy(model)
    state = official_state(model) | {"model.diffusion_model.stranger": torch.zeros(2)}
    with pytest.raises(ValueError, match="stranger is unexpected"):
        fill_official(own, state, tmp_path / "a.ckpt")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize("other, told", [
    (schedule(linear_end=0.0155), "betas 0.0015 to 0.0155 in 1000 steps"),
    ({name: values[:500] for name, values in schedule().items()}, "in 500 steps"),
    ({"alphas_cumprod": torch.zeros(0)}, "in 0 steps")], ids=["betas", "short", "empty"])
def test_another_noise_schedule_is_refused(model, tmp_path, other, told):
    message = refusal(write(tmp_path / "a.ckpt", official_state(model) | other))
    assert told in message
    assert message.endswith("the model's has betas 0.0015 to 0.0195 in 1000 steps")


class Malicious:
    """Unpickling it creates a file, as any code could."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("place", ["beside the weights", "among the weights", "as a callback"])
def test_code_in_a_file_is_not_run(model, tmp_path, place):
    target, state, more = tmp_path / "owned", official_state(model), {}
    evil = Malicious(target)
    if place == "beside the weights":
        more = {"hyper_parameters": evil}
    elif place == "among the weights":
        state["model.diffusion_model.out.2.bias"] = evil
    else:
        name = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
        more = {"callbacks": {name: {"state": evil}}}
    path = write(tmp_path / "a.ckpt", state, **more)
    message = refusal(path)
    assert "is refused: it asks for" in message and "open" in message
    assert not target.exists()
    torch.load(path, weights_only=False)   # the payload is a real one
    assert target.exists()


def test_names_that_are_not_on_the_list_are_refused(model, tmp_path):
    path = write(tmp_path / "a.ckpt", official_state(model), hyper_parameters=Config())
    assert "runtime.config.Config" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04", b"\x80\x02."])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert "is refused: it is damaged" in refusal(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": None}, {"state_dict": {"a": 1}}])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    assert "no state_dict" in refusal(tmp_path / "a.ckpt")


@pytest.mark.parametrize("tensor", [
    torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.complex64), torch.ones(4, device="meta")],
    ids=["sparse", "complex", "meta"])
@pytest.mark.parametrize("key", ["first_stage_model.decoder.conv_in.bias", "alphas_cumprod",
                                 "cond_stage_model.embedding.weight"])
def test_tensors_of_another_kind_are_refused(model, tmp_path, key, tensor):
    path = write(tmp_path / "a.ckpt", official_state(model) | {key: tensor})
    assert "no state_dict of tensors of real numbers" in refusal(path)


def test_a_missing_file_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.ckpt")
    assert "does not exist" in refusal(tmp_path)   # a folder


def test_a_truncated_file_is_refused(model, tmp_path):
    path = write(tmp_path / "a.ckpt", official_state(model))
    path.write_bytes(path.read_bytes()[:5000])
    refusal(path)
