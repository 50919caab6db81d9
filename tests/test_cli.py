"""The programs on tiny arguments: what they write and print, and how they refuse bad input."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
import train
from ldm import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--vae-channels 8 --vae-mult 1 1 2 --latent-channels 4 --vae-steps 2 --vae-batch 4 --unet-channels 16 "
        "--unet-mult 1 2 --attention-resolutions 1 2 --num-heads 2 --context-dim 8 --public-steps 3 --public-batch 8 "
        "--epochs 0.2 --expected-batch 10 --sample-steps 2 --device cpu").split()


@pytest.fixture(scope="module", autouse=True)
def few_glyphs(tmp_path_factory):
    """The embedded data, but few of it, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(data, "COUNTS", {"letters": {"train": 104, "test": 52}, "digits": {"train": 100, "test": 50}})
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the private stage has run, and so, first, the public one."""
    out = tmp_path_factory.mktemp("run")
    train.main(["--stage", "private", "--eps", "3", "--out", str(out), *TINY])
    return out


def refuse(capsys, program, argv) -> str:
    """Run a program's main, which must exit with code 2 and one line; returns that line."""
    with pytest.raises(SystemExit) as stop, train.one_line_errors():
        program.main([str(a) for a in argv])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---- what the programs do --------------------------------------------------------------------------

def test_private_stage_runs_the_public_one_first_and_prints_its_budget(tmp_path, capsys):
    train.main(["--stage", "private", "--eps", "3", "--out", str(tmp_path), *TINY])
    printed = capsys.readouterr().out
    assert "running the public stage first" in printed
    assert "N = 100, sample rate 0.10000, 2 steps, sigma = " in printed
    spent = float(re.search(r"epsilon = ([\d.]+) at delta = 1e-05", printed).group(1))
    assert 2.99 < spent <= 3.0
    trained, total, share = re.search(r"trains ([\d,]+) of ([\d,]+) parameters \(([\d.]+)%\)", printed).groups()
    trained, total = (int(n.replace(",", "")) for n in (trained, total))
    assert 0 < trained < total and float(share) == round(100 * trained / total, 1)
    assert {p.name for p in tmp_path.iterdir()} == {
        "autoencoder.pt", "public.pt", "public.png", "private-eps3.pt", "private-eps3.png",
        "private-eps3.privacy.json"}


def test_checkpoint_holds_the_whole_configuration_and_the_plan(trained):
    model, facts = load_checkpoint(trained / "private-eps3.pt")
    assert set(facts["config"]) == {f.name for f in dataclasses.fields(train.Config)}
    assert facts["classes"] == list("0123456789")
    assert facts["plan"]["num_examples"] == 100 and facts["plan"]["steps"] == 2
    assert model.embedder.null_class == 10


def test_private_training_changes_only_attention_and_embedder(trained):
    public = load_checkpoint(trained / "public.pt")[0].state_dict()
    private = load_checkpoint(trained / "private-eps3.pt")[0].state_dict()
    changed = {name for name in public if not torch.equal(public[name], private[name])}
    assert changed and all(".transformer_blocks." in n or ".proj_" in n or ".norm." in n or n.startswith("embedder")
                           for n in changed)


def test_public_runs_with_one_seed_are_identical(trained, tmp_path):
    train.main(["--stage", "public", "--out", str(tmp_path), *TINY])
    one, other = (load_checkpoint(p / "public.pt")[0].state_dict() for p in (trained, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_public_stage_goes_on_after_its_autoencoder(trained, tmp_path, capsys):
    shutil.copy(trained / "autoencoder.pt", tmp_path)
    train.main(["--stage", "public", "--out", str(tmp_path), *TINY])
    assert "taking the autoencoder from" in capsys.readouterr().out
    one, other = (load_checkpoint(p / "public.pt")[0].vae.state_dict() for p in (trained, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_private_loss_is_shown_only_when_asked_for(tmp_path, trained, capsys):
    arguments = ["--eps", "3", "--public-checkpoint", str(trained / "public.pt"), *TINY]
    train.main(["--out", str(tmp_path / "a"), *arguments])
    quiet = capsys.readouterr()
    assert not re.search(r"loss\s*[=:]", quiet.out + quiet.err)
    train.main(["--out", str(tmp_path / "b"), "--show-private-loss", *arguments])
    loud = capsys.readouterr()
    assert "WARNING" in loud.out and re.search(r"not_private_loss=\d", loud.err)


def test_sample_and_evaluate_round_trip(trained, tmp_path, capsys, monkeypatch):
    private, npz, grid = trained / "private-eps3.pt", tmp_path / "s.npz", tmp_path / "g.png"
    sample.main([str(private), "--npz", str(npz), "--count", "43", "--steps", "2"])
    with np.load(npz) as arrays:
        assert arrays["images"].dtype == np.uint8 and arrays["images"].shape == (43, 32, 32, 1)
        assert sorted(np.bincount(arrays["labels"], minlength=10)) == [4] * 7 + [5] * 3   # uniform
    capsys.readouterr()
    results = tmp_path / "r.json"
    evaluate.main([str(npz), "--real", "digits", "--ceiling", "--steps", "3", "--seeds", "2", "--json", str(results)])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["accuracy", "training", "s", "real"]
    assert all(re.search(r"\d+\.\d+% \+- \d+\.\d+%", line) for line in table[2:])
    origin = json.loads(results.read_text())["results"][0]["origin"]
    assert 2.99 < origin["epsilon"] <= 3.0 and origin["delta"] == 1e-5 and origin["guidance"] == 1.5
    captions, save_grid = [], data.save_grid
    monkeypatch.setattr(data, "save_grid", lambda path, panels, caption: (
        captions.append(caption), save_grid(path, panels, caption)))
    sample.main([str(trained / "public.pt"), str(private), "--real", "digits", "--grid", str(grid),
                 "--steps", "2", "--columns", "3", "--caption-from", str(results)])
    width, height = Image.open(grid).size
    assert width > 3 * 3 * 32 and height > 10 * 32
    means = [f"{row['accuracy']['small-cnn']['mean']:.2%}" for row in json.loads(results.read_text())["results"]]
    assert captions == ["delta = 1e-05. Accuracy on 50 real test images of classifiers trained on eps = 3: small-cnn "
                        f"{means[0]}; real images: small-cnn {means[1]} (mean of 2)."]


def test_captions_are_never_about_other_checkpoints(trained, tmp_path, capsys):
    def row(sha256):
        return dict(origin=dict(sha256=sha256), accuracy=dict(cnn=dict(mean=0.5)))

    public, results = trained / "public.pt", tmp_path / "r.json"
    for content in (dict(results=[row("0" * 64)], test_images=9, seeds=1), dict(results=[{}]), [], "{"):
        results.write_text(content if content == "{" else json.dumps(content))
        message = refuse(capsys, sample, [public, "--grid", tmp_path / "g.png", "--caption-from", results])
        assert "r.json" in message and not (tmp_path / "g.png").exists()
    own = hashlib.sha256(public.read_bytes()).hexdigest()
    results.write_text(json.dumps(dict(results=[row("0" * 64), row(own)], test_images=9, seeds=1)))
    sources = [dict(sha256=own, epsilon=None, delta=None)]
    assert sample.caption(sources, results).count("50.00%") == 1
    assert sample.caption(sources, None) == ""


def test_samples_follow_the_seed(trained):
    model, _ = load_checkpoint(trained / "private-eps3.pt")
    draw = [sample.sample(model, np.arange(4), 2, 0.0, 1, 1.0, seed) for seed in (1, 1, 2)]
    assert np.array_equal(draw[0], draw[1]) and not np.array_equal(draw[0], draw[2])


@pytest.mark.parametrize("resolution, most", [(32, 500), (256, 6)])
def test_large_images_are_sampled_few_at_a_time(resolution, most):
    sizes = []

    def generate(labels, *arguments):
        sizes.append(len(labels))
        return torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)

    model = types.SimpleNamespace(latent_scale=torch.tensor(1.0), generate=generate,
                                  architecture={"vae": {"resolution": resolution}})
    assert sample.sample(model, np.arange(1_001), 2, 0.0, 1, 1.0, 0).shape == (1_001, 1, 1, 1)
    assert sum(sizes) == 1_001 and max(sizes) <= most and len(sizes) <= 1_001 // most + 1


def test_classifier_learns_real_digits_and_ignores_test_labels_in_training():
    digits = data.Dataset(*data.render("01", data.STYLES["digits"], 300, seed=5), ["0", "1"])
    digits.images = digits.images[..., None]
    test = data.Dataset(digits.images[:60], digits.labels[:60], ["0", "1"])
    flipped = data.Dataset(test.images, 1 - test.labels, ["0", "1"])
    rest = data.Dataset(digits.images[60:], digits.labels[60:], ["0", "1"])
    right = evaluate.train_and_test("small-cnn", rest, test, seed=0, steps=40, device=torch.device("cpu"))
    wrong = evaluate.train_and_test("small-cnn", rest, flipped, seed=0, steps=40, device=torch.device("cpu"))
    assert right > 0.9
    assert right + wrong == pytest.approx(1.0)   # the same classifier, whatever the test labels say


# ---- bad input -------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, complaint", [
    (["--eps", "0"], "--eps must be positive"),
    (["--eps", "-1"], "--eps must be positive"),
    (["--eps", "nan"], "--eps must be positive"),
    (["--eps", "inf"], "--eps must be positive and finite"),
    (["--private-lr", "inf"], "--private-lr must be positive and finite"),
    (["--max-grad-norm", "1e-30"], "max_grad_norm must be at least 1e-12"),
    (["--epochs", "1e308"], "epochs must be positive and below"),
    (["--device", "meta"], "device 'meta'"),
    (["--delta", "0"], "--delta must be positive"),
    (["--delta", "1.5"], "delta"),
    (["--expected-batch", "101"], "expected batch 101"),
    (["--max-grad-norm", "0"], "--max-grad-norm"),
    (["--preset", "nonsense"], "unknown preset"),
    (["--stage", "nonsense"], "unknown stage"),
    (["--train", "nonsense"], "unknown --train"),
    (["--accountant", "nonsense"], "unknown accountant"),
    (["--private-data", "nonsense"], "unknown data"),
    (["--attention-blocks", "first:2"], "--attention-blocks"),
    (["--attention-blocks", "last:99"], "attention blocks"),
    (["--bf16", "--engine", "func"], "--bf16 needs --engine ghost"),
    (["--private-timesteps", "5"], "--private-timesteps must be two numbers"),
    (["--private-timesteps", "800", "200"], "--private-timesteps must be two numbers"),
    (["--private-timesteps", "0", "1001"], "--private-timesteps must be two numbers"),
    (["--chunk", "0"], "--chunk must be a positive number or auto"),
    (["--image-size", "30"], "--image-size"),
    (["--device", "abacus"], "device 'abacus'"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--eps", "many"], "--eps"),
    (["--public-checkpoint", "missing.pt"], "missing.pt"),
    (["--unet-channels", "32"], "another architecture"),
    (["--unet-channels", "33", "--num-heads", "3"], "--unet-channels must be even"),
    (["--channels", "2"], "--channels"),
    (["--private-data", "letters"], "are both letters"),
    (["--private-data", "letters", "--public-data", "digits"], "trained on letters without privacy"),
    (["--sample-steps", "1001"], "sampling steps"),
])
def test_train_refuses_bad_input_and_writes_nothing(trained, tmp_path, capsys, arguments, complaint):
    shutil.copy(trained / "public.pt", tmp_path)
    before = contents(tmp_path)
    assert complaint in refuse(capsys, train, ["--out", tmp_path, *TINY, *arguments])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--eps", "inf"], ["--delta", "1.5"], ["--expected-batch", "101"]])
def test_impossible_budgets_are_refused_before_the_public_stage_runs(tmp_path, capsys, arguments):
    refuse(capsys, train, ["--out", tmp_path / "out", *TINY, *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--attention-blocks", "from:99"], ["--attention-blocks", "last:99"]])
def test_blocks_that_there_are_not_are_refused_before_the_public_stage(tmp_path, capsys, arguments):
    assert "attention blocks" in refuse(capsys, train, ["--out", tmp_path / "out", *TINY, *arguments])
    assert not (tmp_path / "out").exists()


def test_a_rank_without_other_processes_writes(trained, tmp_path, monkeypatch, capsys):
    """Some schedulers set RANK for every program; torchrun sets WORLD_SIZE too."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sample.main([str(trained / "public.pt"), "--npz", str(tmp_path / "s.npz"), "--count", "2", "--device", "cpu"])
    assert (tmp_path / "s.npz").exists()


@pytest.mark.parametrize("lost", ["classes", "config"])
def test_a_checkpoint_without_its_facts_is_refused(trained, tmp_path, capsys, lost):
    content = torch.load(trained / "public.pt", weights_only=True)
    del content[lost]
    torch.save(content, tmp_path / "public.pt")
    assert f"lacks {lost}" in refuse(capsys, sample, [tmp_path / "public.pt", "--grid", tmp_path / "grid.png"])


def test_an_autoencoder_is_no_public_model(trained, tmp_path, capsys):
    for program, argv in ((train, ["--out", tmp_path / "out", *TINY, "--public-checkpoint"]),
                          (sample, ["--grid", tmp_path / "grid.png"])):
        assert "trained autoencoder only" in refuse(capsys, program, [*argv, trained / "autoencoder.pt"])
    assert not list(tmp_path.iterdir())


def test_pictures_and_samples_never_take_a_checkpoints_place(trained, tmp_path, capsys):
    victim = tmp_path / "public.pt"
    shutil.copy(trained / "public.pt", victim)
    before = contents(tmp_path)
    for flag in ("--grid", "--npz"):
        assert "must be the name of a" in refuse(capsys, sample, [victim, flag, victim])
    picture = tmp_path / "model.png"
    assert "must end in .pt" in refuse(capsys, train, ["--stage", "public", "--public-checkpoint", picture, *TINY])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--guidance", "nan"], ["--guidance", "inf"]])
def test_guidance_is_finite(trained, tmp_path, capsys, arguments):
    assert "--guidance" in refuse(capsys, sample, [trained / "public.pt", "--grid", tmp_path / "g.png", *arguments])


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 9 x 2"), torch.OutOfMemoryError("9 x 2"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
])
def test_lack_of_memory_is_one_line_that_tells_no_batch_size(capsys, error):
    def main(argv):
        raise error
    assert "9" not in refuse(capsys, types.SimpleNamespace(main=main), [])


def test_nothing_is_overwritten_unless_asked_for(trained, capsys):
    before = contents(trained)
    assert "--overwrite" in refuse(capsys, train, ["--stage", "private", "--eps", "3", "--out", trained, *TINY])
    assert "--overwrite" in refuse(capsys, train, ["--stage", "public", "--out", trained, *TINY])
    assert contents(trained) == before


def test_an_autoencoder_of_other_data_is_not_reused(trained, tmp_path, capsys):
    shutil.copy(trained / "autoencoder.pt", tmp_path)
    assert "autoencoder.pt" in refuse(capsys, train, ["--public-data", "digits", "--private-data", "letters",
                                                      "--out", tmp_path, *TINY])


def test_a_large_delta_is_warned_about(trained, tmp_path, capsys):
    train.main(["--out", str(tmp_path), "--public-checkpoint", str(trained / "public.pt"), *TINY, "--delta", "0.01"])
    assert "WARNING: delta is not below 1/N" in capsys.readouterr().out


def test_overwrite_replaces_the_checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    train.main(["--eps", "3", "--out", str(tmp_path), "--overwrite", *TINY])
    after = contents(tmp_path)
    assert after["public.pt"] == before["public.pt"] and after["private-eps3.pt"] != before["private-eps3.pt"]


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text"])
def test_missing_and_damaged_checkpoints_are_refused(trained, tmp_path, capsys, damage):
    path, whole = tmp_path / "public.pt", (trained / "public.pt").read_bytes()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": whole[:len(whole) // 2], "text": b"hello"}[damage])
    assert "public.pt" in refuse(capsys, sample, [path, "--grid", tmp_path / "g.png"])
    assert not (tmp_path / "g.png").exists()
    if damage != "missing":
        assert "public.pt" in refuse(capsys, train, ["--out", tmp_path, *TINY])
        assert [p.name for p in tmp_path.iterdir()] == ["public.pt"]


def test_unreadable_image_is_named(trained, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("L", (32, 32)).save(tmp_path / "pictures" / name / "fine.png")
    (tmp_path / "pictures" / "b" / "broken.png").write_bytes(b"no image")
    message = refuse(capsys, train, ["--out", tmp_path / "out", "--public-checkpoint", trained / "public.pt",
                                     "--private-data", tmp_path / "pictures", *TINY])
    assert "broken.png" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--grid", "g.png", "--steps", "0"], ["--grid", "g.png", "--eta", "2"],
                                       ["--grid", "g.png", "--eta", "0.5"], ["--grid", "g.png", "--order", "3"],
                                       ["--npz", "s.npz", "--count", "0"],
                                       ["--npz", "s.npz", "--caption-from", "r.json"],
                                       ["--grid", "g.png", "--caption-from", "missing.json"]])
def test_sample_refuses_bad_input(trained, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    refuse(capsys, sample, [trained / "public.pt", *arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arrays, complaint", [
    (dict(images=np.zeros((20, 32, 32, 1), np.uint8), labels=np.zeros(19, np.int64)), "integer labels [n]"),
    (dict(images=np.zeros((20, 32, 32, 1), np.uint8)), "labels"),
    (dict(images=np.zeros((20, 32, 32, 1)), labels=np.zeros(20, np.int64)), "uint8"),
    (dict(images=np.zeros((20, 32, 32, 1), np.uint8), labels=np.full(20, 10)), "classes"),
    (dict(images=np.zeros((20, 28, 32, 1), np.uint8), labels=np.zeros(20, np.int64)), "image sizes"),
])
def test_evaluate_refuses_bad_files(tmp_path, capsys, arrays, complaint):
    np.savez(tmp_path / "s.npz", **arrays)
    assert complaint in refuse(capsys, evaluate, [tmp_path / "s.npz", "--real", "digits"])


@pytest.mark.parametrize("command", [["train.py", "--eps", "-1"], ["sample.py", "missing.pt", "--grid", "g.png"],
                                     ["evaluate.py"]])
def test_programs_exit_with_code_2_and_no_traceback(tmp_path, command):
    program = [sys.executable, ROOT / command[0], *command[1:]]
    run = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
