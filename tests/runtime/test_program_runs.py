"""Whole runs of train.py with what a default run does not have: captions, official weights, ..."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from datasets import rendered
from ldm import LatentDiffusion
from runtime import runs, samples
from runtime.checkpoints import build_model, load_checkpoint
from tiny import FLAGS, arguments, configure, refuse, write_images


def changed_names(before: LatentDiffusion, after: LatentDiffusion) -> set[str]:
    return {name for name, p in before.named_parameters()
            if not torch.equal(p, after.get_parameter(name))}


def drawn(checkpoint: Path, *more: str) -> np.ndarray:
    path = checkpoint.with_suffix(".npz")
    sample.main([str(checkpoint), "--npz", str(path), "--count", "4", "--steps", "2", *more])
    with np.load(path) as arrays:
        return arrays["images"]


# ---- captions ----------------------------------------------------------------------------------

def captioned(folder: Path, texts: list[str], seed: int) -> Path:
    """Random images with these captions."""
    write_images(folder, [len(texts)], seed)
    lines = [json.dumps({"file_name": f"a/{i}.png", "text": text}) for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_model_of_captions_from_start_to_samples(tmp_path, monkeypatch, capsys):
    panels, save_grid = [], samples.save_grid
    monkeypatch.setattr(samples, "save_grid", lambda path, shown: (
        panels.extend(shown), save_grid(path, shown)))
    public = captioned(tmp_path / "letters", ["red O", "blue O", "red Z"] * 4, seed=0)
    private = captioned(tmp_path / "digits", ["red 4", "blue 2", "red 0"] * 8, seed=1)
    out = tmp_path / "out"
    command = [*FLAGS, "--out", str(out), "--public-data", str(public), "--private-data",
               str(private), "--set", "text.length=12", "--set", "text.layers=1",
               "--save-every", "99"]
    train.main([*command, "--prompts", "red 0", "blue 2"])
    assert [names for _, _, names in panels] == [["red O", "blue O", "red Z"], ["red 0", "blue 2"]]
    before, after = (load_checkpoint(out / f"{name}.pt")[0] for name in ("public", "private-eps3"))
    table = before.embedder.tokens.weight   # unseen digits start as the letters they look like
    assert (table[ord("2")] == table[ord("Z")]).all() and (table[ord("4")] != table[ord("Z")]).any()
    learnt = {name for name, _ in before.named_parameters()
              if name.startswith("embedder.") or ".attn2.to_k" in name}
    assert learnt <= (changed := changed_names(before, after))
    assert not any(name.startswith("vae.") or ".in_layers." in name for name in changed)
    assert drawn(out / "private-eps3.pt", "--prompt", "red 7").shape == (4, 8, 8, 1)
    capsys.readouterr()
    other = [*command, "--set", "text.length=0", "--eps", "4"]
    assert "another architecture" in refuse(capsys, train.main, other)


def test_captions_that_are_cut_are_said(capsys):
    captions = ["é" * 6, "short"]   # 12 bytes
    runs.check_captions(captions, "mine", configure("text.length=12"))
    assert capsys.readouterr().out == ""
    runs.check_captions(captions, "mine", configure("text.length=11"))
    assert capsys.readouterr().out == "mine: captions are cut to 11 bytes (text.length)\n"


# ---- official weights --------------------------------------------------------------------------

def official_file(path: Path, *assignments: str, rows: int = 5) -> LatentDiffusion:
    """Write a file as CompVis does, with `rows` classes; the model whose weights it has."""
    torch.manual_seed(0)
    model = build_model(configure(*assignments).architecture(2))
    prefixes = {"unet": "model.diffusion_model", "vae": "first_stage_model"}
    state = {f"{prefix}.{name}": tensor for part, prefix in prefixes.items()
             for name, tensor in getattr(model, part).state_dict().items()}
    state["scale_factor"] = torch.tensor(0.25)
    state["cond_stage_model.embedding.weight"] = torch.randn(rows, 8)
    torch.save({"state_dict": state}, path)
    return model


def test_the_private_stage_starts_from_official_weights(public, tmp_path, capsys):
    model, out = official_file(tmp_path / "official.ckpt"), tmp_path / "out"
    train.main([*arguments(public, out)[2:], "--pretrained", str(tmp_path / "official.ckpt"),
                "--save-every", "99"])
    printed = capsys.readouterr().out
    assert f"a model that knows {tmp_path / 'official.ckpt'}" in printed
    assert "running the public stage" not in printed
    assert {path.name for path in out.iterdir()} == {
        "private-eps3.pt", "private-eps3.png", "private-eps3.privacy.json"}
    private, metadata = load_checkpoint(out / "private-eps3.pt")
    assert metadata["public_config"]["data"]["public"] == str(tmp_path / "official.ckpt")
    assert private.embedder.null_class == 2 and private.latent_scale == 0.25
    changed = changed_names(model, private)
    assert "unet.input_blocks.0.0.weight" not in changed and changed
    assert not any(name.startswith("vae.") for name in changed)
    assert drawn(out / "private-eps3.pt").shape == (4, 8, 8, 1)


def test_the_public_stage_goes_on_from_official_weights(public, tmp_path):
    model, out = official_file(tmp_path / "official.ckpt"), tmp_path / "out"
    train.main([*arguments(public, out)[2:], "--pretrained", str(tmp_path / "official.ckpt"),
                "--stage", "public"])
    assert {path.name for path in out.iterdir()} == {"public.pt", "public.png"}
    after, metadata = load_checkpoint(out / "public.pt")
    assert after.latent_scale == 0.25 and metadata["classes"] == ["a", "b"]
    assert after.embedder.null_class == 2
    changed = changed_names(model, after)
    assert "unet.input_blocks.0.0.weight" in changed
    assert not any(name.startswith("vae.") for name in changed)
    weights = (m.unet.input_blocks[0][0].weight for m in (model, after))
    torch.testing.assert_close(*weights, atol=0.02, rtol=0)   # near: there were two steps


def test_official_vq_weights_are_fine_tuned(public, tmp_path):
    official_file(tmp_path / "official.ckpt", "vae.n_embed=16")
    train.main([*arguments(public, tmp_path)[2:], "--pretrained", str(tmp_path / "official.ckpt"),
                "--set", "vae.n_embed=16", "--epochs", "1"])
    assert drawn(tmp_path / "private-eps3.pt").shape == (4, 8, 8, 1)


def test_two_public_models_are_one_too_many(public, tmp_path, capsys):
    official_file(tmp_path / "official.ckpt")
    (tmp_path / "public.pt").write_bytes((public / "public.pt").read_bytes())
    command = [*arguments(public, tmp_path)[2:], "--pretrained", tmp_path / "official.ckpt"]
    assert "two public models" in refuse(capsys, train.main, command)


@pytest.mark.parametrize("assignment", ["unet.model_channels=32", "vae.n_embed=16",
                                        "schedule.linear_end=0.0155"])
@pytest.mark.parametrize("stage", ["public", "private"])
def test_official_weights_that_do_not_fit_are_refused(public, tmp_path, capsys, stage, assignment):
    model = official_file(tmp_path / "official.ckpt")
    content = torch.load(tmp_path / "official.ckpt")
    content["state_dict"]["alphas_cumprod"] = model.alphas_cumprod
    torch.save(content, tmp_path / "official.ckpt")
    command = [*arguments(public, tmp_path / "out")[2:], "--set", assignment, "--stage", stage,
               "--pretrained", tmp_path / "official.ckpt"]
    with pytest.raises(SystemExit), train.one_line_errors():
        train.main([*map(str, command)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "official.ckpt is refused" in message
    assert not [path for path in tmp_path.glob("out/*") if path.suffix == ".pt"]


# ---- other networks ----------------------------------------------------------------------------

@pytest.mark.parametrize("clipping", ["ghost", "vmap"])
def test_an_unconditional_model_from_start_to_samples(public, tmp_path, clipping):
    train.main([*arguments(public, tmp_path)[2:], "--set", "unet.context_dim=0", "--clipping",
                clipping, "--save-every", "99"])
    before = load_checkpoint(tmp_path / "public.pt")[0]
    after, metadata = load_checkpoint(tmp_path / "private-eps3.pt")
    changed = changed_names(before, after)
    assert metadata["classes"] == ["all"] and changed
    assert all(re.search(r"^unet.*\.(norm|qkv|proj_out)\.", name) for name in changed)
    assert drawn(tmp_path / "private-eps3.pt").shape == (4, 8, 8, 1)


def test_the_paper_s_kinds_of_networks_work(public, tmp_path):
    """mnist-paper in small: grey images in three channels, attention in the autoencoder, ..."""
    more = ["data.channels=3", "vae.attn_resolutions=[4]", "vae.num_res_blocks=2",
            "unet.use_scale_shift_norm=true", "unet.resblock_updown=true",
            "unet.num_head_channels=4"]
    train.main([*arguments(public, tmp_path)[2:], "--save-every", "99",
                *(word for text in more for word in ("--set", text))])
    model = load_checkpoint(tmp_path / "private-eps3.pt")[0]
    heads = {m.num_heads for m in model.unet.modules() if hasattr(m, "num_heads")}
    assert heads == {8}   # 32 channels by 4
    assert drawn(tmp_path / "private-eps3.pt").shape == (4, 8, 8, 3)


# ---- presets -----------------------------------------------------------------------------------

SHORT = ["autoencoder.steps=2", "autoencoder.batch=4", "public.steps=2", "public.batch=4",
         "private.expected_batch=4", "private.epochs=0.7", "samples.steps=1", "run.device=cpu"]


@pytest.fixture
def few_pictures(tmp_path, monkeypatch):
    """Rendered data, but few of them, in a cache of its own."""
    monkeypatch.setattr(rendered, "CACHE", tmp_path / "cache")
    counts = {source: {"train": 28, "test": 28} for source in rendered.COUNTS}
    monkeypatch.setattr(rendered, "COUNTS", counts)


def run_preset(name: str, out: Path, *more: str) -> tuple[LatentDiffusion, dict]:
    train.main(["--preset", name, "--out", str(out), *more,
                *(word for text in SHORT for word in ("--set", text))])
    return load_checkpoint(out / "private-eps10.pt")


def test_scenes256_runs_scaled_down(few_pictures, tmp_path):
    small = ["data.image_size=32", "autoencoder.crop=16"]
    model, metadata = run_preset("scenes256", tmp_path / "out", "--bf16",
                                 *(word for text in small for word in ("--set", text)))
    assert [len(model.vae.encoder.down), model.vae.latent_shape] == [4, (4, 4, 4)]
    assert metadata["ledger"][0]["num_examples"] == 28
    with Image.open(tmp_path / "out/private-eps10.png") as picture:
        assert picture.width > 10 * 32


def test_cifar10_small_goes_from_leaves_to_photographs(few_pictures, tmp_path):
    private = write_images(tmp_path / "photographs", [4, 4, 4], seed=1)
    model, metadata = run_preset("cifar10-small", tmp_path / "out", "--private-data", str(private))
    assert metadata["classes"] == ["a", "b", "c"]
    assert metadata["public_config"]["data"]["public"] == "leaves"
    assert model.vae.latent_shape == (8, 8, 8) and model.vae.resolution == 32


def test_a_preset_s_missing_images_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "data/celeba" in refuse(capsys, train.main, ["--preset", "celeba64"])
    assert not list(tmp_path.iterdir())
