"""Checkpoints: what is saved comes back; damaged, foreign and malicious files are refused."""

import functools
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ldm import LatentDiffusion
from runtime.checkpoints import build_model, load_checkpoint, save_checkpoint
from tiny import configure, tiny_model
from variants.text import TextEmbedder
from variants.unconditional import NoEmbedder
from variants.vq import AutoencoderVQ

ARCHITECTURE, CONFIG, CLASSES = configure().architecture(3), asdict(configure()), ["a", "b", "c"]


@pytest.fixture
def model() -> LatentDiffusion:
    return tiny_model().float()


def assert_equal_weights(one: LatentDiffusion, other: LatentDiffusion) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


# ---- saving and loading ------------------------------------------------------------------------

def test_a_checkpoint_round_trip(model, tmp_path):
    model.latent_scale.fill_(0.7)
    path = tmp_path / "runs" / "public.pt"
    save_checkpoint(path, model.train(), classes=["a", "b", "c"], config=CONFIG, spent=1.5)
    loaded, metadata = load_checkpoint(path)
    assert metadata["classes"] == ["a", "b", "c"] and metadata["spent"] == 1.5
    assert loaded.architecture == ARCHITECTURE and not loaded.training
    assert_equal_weights(loaded, model)

    def images(m):
        return m.generate(torch.tensor([0, 2]), 3, 1.0, 2.0, torch.Generator().manual_seed(0))

    assert torch.equal(images(loaded), images(model.eval()))
    assert [p.name for p in path.parent.iterdir()] == ["public.pt"]


@pytest.mark.parametrize("settings, part, kind", [
    (["text.length=6", "text.layers=2"], "embedder", TextEmbedder),
    (["unet.context_dim=0"], "embedder", NoEmbedder),
    (["vae.n_embed=5"], "vae", AutoencoderVQ)])
def test_the_architecture_chooses_the_parts(settings, part, kind, tmp_path):
    model = tiny_model(*settings).float()
    save_checkpoint(tmp_path / "model.pt", model, classes=CLASSES, config=CONFIG)
    loaded, _ = load_checkpoint(tmp_path / "model.pt")
    assert type(getattr(loaded, part)) is kind
    assert_equal_weights(loaded, model)


def test_low_rank_weights_come_back(tmp_path):
    model = build_model({**ARCHITECTURE, "lora_rank": 2})
    for p in model.parameters():
        torch.nn.init.normal_(p)
    added = [name for name in model.state_dict() if ".lora." in name]
    assert added and all(2 in model.get_parameter(name).shape for name in added)
    save_checkpoint(tmp_path / "model.pt", model, classes=CLASSES, config=CONFIG)
    loaded, _ = load_checkpoint(tmp_path / "model.pt")
    assert loaded.architecture["lora_rank"] == 2
    assert_equal_weights(loaded, model)


def test_a_part_is_no_whole_model(model, tmp_path):
    whole, part = tmp_path / "public.pt", tmp_path / "autoencoder.pt"
    save_checkpoint(whole, model, classes=CLASSES, config=CONFIG)
    save_checkpoint(part, model, classes=CLASSES, config=CONFIG, part="autoencoder")
    assert_equal_weights(load_checkpoint(part, "autoencoder")[0], model)
    load_checkpoint(whole, "autoencoder")   # a whole model has an autoencoder
    with pytest.raises(ValueError, match="holds a trained autoencoder only"):
        load_checkpoint(part)


# ---- files that are refused --------------------------------------------------------------------

def saved(content: object) -> Callable[[Path, LatentDiffusion], None]:
    return lambda path, model: torch.save(content, path)


def written(content: bytes) -> Callable[[Path, LatentDiffusion], None]:
    return lambda path, model: path.write_bytes(content)


def without(key: str) -> Callable[[Path, LatentDiffusion], None]:
    def save(path: Path, model: LatentDiffusion) -> None:
        content = {"architecture": ARCHITECTURE, "model": model.state_dict(), "classes": CLASSES,
                   "config": CONFIG}
        del content[key]
        torch.save(content, path)
    return save


def with_more(**more: object) -> Callable[[Path, LatentDiffusion], None]:
    return lambda path, model: save_checkpoint(path, model, classes=CLASSES, config=CONFIG, **more)


def save_damaged(path: Path, model: LatentDiffusion) -> None:
    save_checkpoint(path, model, classes=CLASSES, config=CONFIG)
    content = bytearray(path.read_bytes())
    start = content.index(b"architecture")
    content[start:start + 400] = bytes(400)
    path.write_bytes(content)


def save_with_other_sizes(path: Path, model: LatentDiffusion) -> None:
    model.architecture = {**ARCHITECTURE, "num_classes": 4}
    save_checkpoint(path, model, classes=CLASSES, config=CONFIG)


DAMAGED = "is damaged or of another program"
NO_LEDGER = "its ledger is gone"
REFUSED = {
    "missing": (lambda path, model: None, "does not exist"),
    "folder": (lambda path, model: path.mkdir(), "does not exist"),
    "no classes": (without("classes"), "it lacks classes"),
    "no config": (without("config"), "it lacks config"),
    "no ledger": (with_more(plan={"steps": 3}), NO_LEDGER),
    "no ledger, no plan": (with_more(public_config=CONFIG), NO_LEDGER),
    "an empty ledger": (with_more(ledger=[]), NO_LEDGER),
    "no architecture": (without("architecture"), DAMAGED),
    "no weights": (without("model"), DAMAGED),
    "damaged": (save_damaged, DAMAGED),
    "other sizes": (save_with_other_sizes, DAMAGED),
    "empty": (written(b""), DAMAGED),
    "text": (written(b"not a checkpoint\n"), DAMAGED),
    "zip": (written(b"PK\x03\x04"), DAMAGED),
    "png": (written(b"\x89PNG\r\n\x1a\n"), DAMAGED),
    "json": (written(b'{"model": 1}'), DAMAGED),
    "broken pickle": (written(b"\x80\x02."), DAMAGED),   # it stops with nothing on the stack
    "no keys": (saved({}), DAMAGED),
    "other keys": (saved({"state_dict": {"w": torch.zeros(2)}}), DAMAGED),
    "other weights": (saved({"architecture": ARCHITECTURE, "model": {"w": torch.zeros(2)}}),
                      DAMAGED),
    "other architecture": (saved({"architecture": {"dim": 4}, "model": {}}), DAMAGED),
    "weights None": (saved({"architecture": ARCHITECTURE, "model": None}), DAMAGED),
    "words": (saved({"architecture": "unet", "model": {}}), DAMAGED),
    "list": (saved([1, 2]), DAMAGED),
    "None": (saved(None), DAMAGED),
    "tensor": (saved(torch.zeros(3)), DAMAGED),
}


@pytest.mark.parametrize("write, reason", REFUSED.values(), ids=REFUSED)
def test_a_foreign_file_is_refused(model, tmp_path, recwarn, write, reason):
    path = tmp_path / "model.pt"
    write(path, model)
    with pytest.raises(ValueError, match=reason) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not recwarn.list


# What a whole private checkpoint holds, and how it may be damaged, or made to do harm.
PLAN = dict(num_examples=20, expected_batch=5, steps=4, noise_multiplier=1.0, max_grad_norm=0.1,
            delta=1e-5)
HUGE = 10**12


def private(model: LatentDiffusion) -> dict:
    weights = model.state_dict()
    some = {name: weights[name] for name in list(weights)[:2]}
    state = {k: {"step": torch.tensor(2.0), "exp_avg": p, "exp_avg_sq": p}
             for k, p in enumerate(some.values())}
    return {"architecture": ARCHITECTURE, "model": dict(weights), "classes": CLASSES,
            "config": CONFIG, "public_config": CONFIG, "plan": PLAN,
            "ledger": [{**PLAN, "steps": 2, "versions": {"torch": "2"}}],
            "training": dict(step=2, parameters=some, ema=some, handle="name",
                             optimizer=dict(state=state, param_groups=[]))}


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


# place in the file: values that do not belong there
HOSTILE = {
    "plan": [None, [], "plan", {}, {**PLAN, "more": 1}, *({**PLAN, key: bad} for key in PLAN
             for bad in (-1, 0.5, "5", None, float("nan")) if (key, bad) not in (
                 ("noise_multiplier", 0.5), ("max_grad_norm", 0.5), ("delta", 0.5),
                 ("expected_batch", 0.5), ("num_examples", 0.5)))],
    "ledger": ["a ledger", ["an entry"], [[]], {"0": PLAN}, [{**PLAN, "steps": -3}], [{}],
               [PLAN, {**PLAN, "expected_batch": -5, "num_examples": -20}], 7,
               [{**PLAN, "num_examples": 0}], [{**PLAN, "num_examples": float("inf")}],
               1_001 * [PLAN]],
    "classes": [[1, 2, 3], "abc", {"a": 1}, ["a"], list("abcd"), torch.zeros(3), None],
    "config": [None, [], "config", {}, {**CONFIG, "data": None}, {**CONFIG, "private": {}},
               {**CONFIG, "data": {"public": 7}}, {**CONFIG, "data": nested(50)}],
    "public_config": [None, {}, {"data": {}}, {"data": "letters"}],
    "architecture": [
        {**ARCHITECTURE, "num_classes": HUGE}, {**ARCHITECTURE, "num_classes": "3"},
        *({**ARCHITECTURE, part: {**ARCHITECTURE[part], key: bad}} for part, key, bad in [
            ("unet", "model_channels", HUGE), ("unet", "num_res_blocks", HUGE),
            ("unet", "channel_mult", [1] * 10**5), ("unet", "context_dim", HUGE),
            ("vae", "num_res_blocks", HUGE), ("vae", "resolution", HUGE), ("vae", "ch", HUGE),
            ("vae", "resolution", 0), ("vae", "z_channels", -1), ("unet", "num_heads", 0),
            ("vae", "resolution", 8.5), ("vae", "resolution", 8.0), ("vae", "resolution", 9),
            ("vae", "resolution", 2), ("vae", "resolution", True), ("vae", "embed_dim", None),
            ("vae", "ch_mult", (1, 2.0)), ("vae", "attn_resolutions", (-1,)),
            ("unet", "num_heads", -1), ("unet", "num_heads", 2.0), ("unet", "num_heads", True),
            ("unet", "num_heads", None), ("unet", "num_head_channels", -1),
            ("unet", "num_res_blocks", -1), ("unet", "transformer_depth", 10**5)]),
        *({**ARCHITECTURE, end: bad} for end in ("linear_start", "linear_end")
          for bad in (0, -0.01, 1, float("nan"), float("inf"), "0.01")),
        {**ARCHITECTURE, "linear_end": 0.5},
        {**ARCHITECTURE, "text": {"layers": HUGE, "length": 4}},
        {**ARCHITECTURE, "text": {"layers": 1, "length": HUGE}},
        {**ARCHITECTURE, "lora_rank": HUGE}],
    "training": [None, [], {}, "training", {"step": 2}],
    "training/step": [-1, 5, 2.0, "2", None, HUGE],
    "training/parameters": [{}, {"w": torch.zeros(2)}, None, [torch.zeros(2)]],
    "training/ema": [{}, {"w": torch.zeros(2)}, None],
    "training/optimizer": [None, {}, {"state": {0: {}}}, {"state": []}],
    "training/ema/latent_scale": [torch.tensor(1), torch.tensor(1j), 1],
    "model": [{}, [], {"w": 1}, torch.zeros(2)],
    "model/latent_scale": [torch.tensor(1), torch.tensor(1j), torch.tensor(True), 1,
                           torch.tensor(1.0).to_sparse(), torch.tensor(1.0, device="meta")],
}
CASES = [(place, bad) for place, values in HOSTILE.items() for bad in values
         if (place, str(bad)) != ("training/optimizer", "{'state': []}")]   # it was saved at step 0


def test_a_whole_private_checkpoint_is_taken(model, tmp_path):
    torch.save(private(model), tmp_path / "model.pt")
    load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("place, bad", CASES, ids=[f"{p}-{str(bad)[:40]}" for p, bad in CASES])
def test_damaged_metadata_are_one_line(model, tmp_path, place, bad):
    path, content = tmp_path / "model.pt", private(model)
    *outer, last = place.split("/")
    functools.reduce(dict.__getitem__, outer, content)[last] = bad
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path} is damaged or of another program") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["plan", "public_config"])
def test_a_private_checkpoint_is_whole(model, tmp_path, key):
    content = private(model)
    del content[key]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"it lacks {key}"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model, tmp_path, bad):
    next(model.unet.parameters()).data.flatten()[-1] = bad
    save_checkpoint(tmp_path / "model.pt", model, classes=CLASSES, config=CONFIG)
    with pytest.raises(ValueError, match="a weight is not finite"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_latent_scale_must_be_positive(model, tmp_path, scale):
    model.latent_scale.fill_(scale)
    save_checkpoint(tmp_path / "model.pt", model, classes=CLASSES, config=CONFIG)
    with pytest.raises(ValueError, match="model.pt is refused: its latent scale is"):
        load_checkpoint(tmp_path / "model.pt")


def test_a_model_is_no_larger_than_its_file(model, tmp_path):
    content = private(model)
    content["architecture"] = {**ARCHITECTURE, "num_classes": 10**6 - 1}
    content["model"]["embedder.embedding.weight"] = torch.zeros(1, 8).expand(10**6, 8)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="its weights overlap"):
        load_checkpoint(tmp_path / "model.pt")


def test_a_compressed_checkpoint_is_not_unpacked(model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model.pt", model, classes=CLASSES, config=CONFIG)
    with zipfile.ZipFile(tmp_path / "model.pt") as source, zipfile.ZipFile(
            tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
        bomb.writestr("zeros", bytes(10**6))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match="bomb.pt is damaged .*it is compressed"):
        load_checkpoint(tmp_path / "bomb.pt")


def test_a_truncated_checkpoint_is_refused(model, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, model, classes=CLASSES, config=CONFIG)
    content = path.read_bytes()
    for size in (1, 10, 1_000, 20_000, len(content) - 300, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=DAMAGED):
            load_checkpoint(path)


class Malicious:
    """Unpickling it creates a file, as any code could."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("write", [
    torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))],
    ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(model, tmp_path, write):
    path, target = tmp_path / "model.pt", tmp_path / "owned"
    write({"architecture": ARCHITECTURE, "model": model.state_dict(), "classes": CLASSES,
           "config": CONFIG, "extra": Malicious(target)}, path)
    with pytest.raises(ValueError, match="model.pt is damaged"):
        load_checkpoint(path)
    assert not target.exists()


# ---- saving that fails -------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()],
                         ids=["full disk", "Ctrl-C"])
def test_a_failed_save_keeps_the_old_checkpoint(model, tmp_path, monkeypatch, error):
    path = tmp_path / "model.pt"
    save_checkpoint(path, model, classes=CLASSES, config=CONFIG, spent=1)
    old = path.read_bytes()

    def stop_halfway(content, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", stop_halfway)
    with pytest.raises(type(error)):
        save_checkpoint(path, model, classes=CLASSES, config=CONFIG, spent=2)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_that_cannot_be_saved_leaves_no_file(model, tmp_path):
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "model.pt", model, fact=lambda: None)
    assert not list(tmp_path.iterdir())


def test_on_commit_comes_before_the_new_file(model, tmp_path):
    path, seen = tmp_path / "model.pt", []
    path.write_bytes(b"old")
    save_checkpoint(path, model, lambda: seen.append(path.read_bytes()), classes=CLASSES,
                    config=CONFIG)
    assert seen == [b"old"]
    load_checkpoint(path)
