"""Private files lack what their public model has, which is found by its digest."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import train
from runtime import weights
from runtime.checkpoints import load_checkpoint, save_checkpoint
from tiny import ATTENTION, EMBEDDER, FLAGS, SCALE, TRANSFORMER, arguments, parameters_of, refuse

TRAINED = parameters_of(ATTENTION, TRANSFORMER) | EMBEDDER | SCALE


def stored(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture
def published(public: Path, private: Path, tmp_path: Path) -> Path:
    """The private file beside its public model, both of other names, with other files."""
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copy(private, folder / "digits.pt")
    shutil.copy(public / "public.pt", folder / "letters.pt")
    shutil.copy(public / "autoencoder.pt", folder)
    (folder / "damaged.pt").write_bytes(b"PK")
    return folder


@pytest.mark.parametrize("more, names", [
    ([], TRAINED), (["--trainable", "last:1"],
                    parameters_of(ATTENTION[-1:], TRANSFORMER) | EMBEDDER | SCALE)])
def test_a_private_file_holds_what_was_trained(public, tmp_path, more, names):
    train.main(arguments(public, tmp_path, *more))
    assert set(stored(tmp_path / "private-eps3.pt")) == names


def test_low_rank_additions_are_stored_alone(public, tmp_path):
    train.main(arguments(public, tmp_path, "--trainable", "lora"))
    names = set(stored(tmp_path / "private-eps3.pt")) - EMBEDDER - SCALE
    assert names and all(".lora." in name for name in names)
    load_checkpoint(tmp_path / "private-eps3.pt")


def test_a_whole_private_file_is_the_same_model(public, tmp_path):
    seed = ["--insecure-noise-seed", 3]
    train.main(arguments(public, tmp_path / "lacking", *seed))
    train.main(arguments(public, tmp_path / "whole", "--whole", *seed))
    lacking, whole = (load_checkpoint(tmp_path / name / "private-eps3.pt")[0].state_dict()
                      for name in ("lacking", "whole"))
    assert all(torch.equal(lacking[name], tensor) for name, tensor in whole.items())
    assert list(lacking) == list(whole) == list(stored(tmp_path / "whole/private-eps3.pt"))


def test_the_public_model_is_found_by_digest(published, private, monkeypatch):
    before = load_checkpoint(private)[0].state_dict()
    monkeypatch.setattr(weights, "began_in", lambda content, folder: folder)
    after = load_checkpoint(published / "digits.pt")[0].state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_another_public_model_is_not_taken(published, monkeypatch):
    model, metadata = load_checkpoint(published / "letters.pt")
    with torch.no_grad():
        next(model.vae.parameters()).flatten()[0] += 1e-6
    save_checkpoint(published / "letters.pt", model, **metadata)
    monkeypatch.setattr(weights, "began_in", lambda content, folder: folder)
    with pytest.raises(ValueError, match="digits.pt holds only what its private run has changed"):
        load_checkpoint(published / "digits.pt")


def test_a_run_from_a_private_file_needs_one_public_model(public, private, tmp_path):
    train.main(arguments(public, tmp_path, "--public-checkpoint", private, "--eps", 4))
    assert set(stored(tmp_path / "private-eps4.pt")) == TRAINED
    load_checkpoint(tmp_path / "private-eps4.pt")


def test_a_run_without_its_public_file_is_whole(public, tmp_path, in_step):
    shutil.copy(public / "public.pt", tmp_path)
    in_step(3, (tmp_path / "public.pt").unlink)
    train.main(arguments(public, tmp_path, "--public-checkpoint", tmp_path / "public.pt"))
    assert set(stored(tmp_path / "private-eps3.pt")) > TRAINED
    load_checkpoint(tmp_path / "private-eps3.pt")


def test_a_public_model_that_is_needed_stays(published, public, capsys):
    command = ["--stage", "public", "--public-checkpoint", published / "letters.pt", "--overwrite",
               "--public-data", public / "public-images", *FLAGS]
    content = (published / "letters.pt").read_bytes()
    message = refuse(capsys, train.main, command)
    assert "digits.pt needs the weights in" in message
    assert (published / "letters.pt").read_bytes() == content


def test_half_precision_halves_the_file(public, tmp_path):
    seed = ["--insecure-noise-seed", 3]
    train.main(arguments(public, tmp_path / "full", *seed))
    train.main(arguments(public, tmp_path / "half", "--set", "run.half=true", *seed))
    full, half = (tmp_path / name / "private-eps3.pt" for name in ("full", "half"))
    sizes = [sum(w.nbytes for w in stored(path).values()) for path in (full, half)]
    assert sizes[1] < 0.51 * sizes[0] and os.path.getsize(half) < os.path.getsize(full)
    for (name, one), other in zip(load_checkpoint(full)[0].state_dict().items(),
                                  load_checkpoint(half)[0].state_dict().values(), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7, msg=name)


def test_numbers_too_large_for_half_keep_theirs():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = 1e5
    kept = weights.in_half(model, model.state_dict())
    assert (kept["weight"].dtype, kept["bias"].dtype) == (torch.float32, torch.float16)
