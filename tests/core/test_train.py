"""The two loops, the autoencoder, and the program on tiny arguments."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dp_sgd
import train
from datasets import lazy
from dp_sgd import PrivacyPlan, private_parameter_names
from ldm import lr_factor
from runtime.checkpoints import load_checkpoint
from runtime.cli import one_line_errors
from runtime.latents import encode_dataset
from tiny import (
    FLAGS,
    STAGES,
    arguments,
    configure,
    flat,
    refuse,
    tiny_data,
    tiny_model,
    write_images,
)

ROOT = Path(__file__).resolve().parents[2]


def states(*paths: Path) -> list[dict[str, torch.Tensor]]:
    return [load_checkpoint(path)[0].state_dict() for path in paths]


# ---- the public loop ---------------------------------------------------------------------------

def test_a_public_step_is_the_plain_formula(optimizer_steps):
    config = configure("public.steps=1", "public.batch=5", "diffusion.label_dropout=0.3")
    model, (z_0, labels) = tiny_model().float(), tiny_data(20)
    z_0, reference = z_0.float(), tiny_model().float()
    torch.manual_seed(3)
    train.train_public(model, z_0, labels, config, np.random.default_rng(4))
    torch.manual_seed(3)
    i, rng = torch.randint(20, (5,)), np.random.default_rng(4)
    eps = torch.from_numpy(rng.standard_normal((5, 4, 4, 4), dtype=np.float32))
    t = torch.from_numpy((1000 * rng.random(5)).astype(int))
    condition = labels[i].masked_fill(torch.from_numpy(rng.random(5) < 0.3), 3)   # the null class
    loss = reference(z_0[i], t, eps, condition).mean()
    trained = [p for name, p in reference.named_parameters() if not name.startswith("vae.")]
    for found, expected in zip(optimizer_steps[0], torch.autograd.grad(loss, trained)):
        torch.testing.assert_close(found, expected)


def test_the_public_loop_leaves_the_autoencoder_alone():
    model = tiny_model().float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    z_0, labels = tiny_data(8)
    train.train_public(model, z_0.float(), labels, configure("public.steps=2"),
                       np.random.default_rng(0))
    changed = {name.split(".")[0] for name, p in model.named_parameters()
               if not torch.equal(p, before[name])}
    assert changed == {"unet", "embedder"}


def test_public_runs_with_one_seed_are_equal(public, tmp_path):
    train.main(["--stage", "public", "--out", str(tmp_path), "--public-data",
                str(public / "public-images"), *FLAGS])
    one, other = states(public / "public.pt", tmp_path / "public.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- the private loop --------------------------------------------------------------------------

def test_average_and_learning_rate_count_logical_steps(recorded, in_step):
    """Whatever the chunks, and though every second batch is empty."""
    plan, model, averages = PrivacyPlan(5, 5, 6, 0.7, 1.0, 1e-5), tiny_model(), []
    recorded.stub = True

    def every_second(plan: PrivacyPlan, rng: np.random.Generator) -> torch.Tensor:
        return torch.arange(5 if len(recorded) % 2 else 0)

    rates = in_step(0, lambda: None)
    train.train_private(model, *tiny_data(5), private_parameter_names(model), plan, configure(),
                        np.random.default_rng(0), sample=every_second, clipped_sum=recorded,
                        on_step=lambda step, parameters, optimizer, ema: averages.append(
                            (step, ema.step, optimizer.param_groups[0]["lr"])))
    assert [len(batch[0]) for _, _, batch, _ in recorded] == [0, 5, 0, 5, 0, 5]
    assert [(step, count) for step, count, _ in averages] == [(k, k) for k in range(6)]
    expected = [configure().private.lr * lr_factor(step, 6) for step in range(5)]
    assert [lr for _, _, lr in averages[1:]] == pytest.approx(expected) and len(rates) == 6


def test_every_step_clips_and_adds_noise_as_planned(recorded):
    recorded.stub, plans = True, []
    plan, model = PrivacyPlan(5, 5, 30, 0.7, 0.5, 1e-5), tiny_model()

    def add_noise(total: dict, given: PrivacyPlan, rng: np.random.Generator) -> dict:
        plans.append(given)
        return dp_sgd.add_noise(total, given, rng)

    train.train_private(model, *tiny_data(5), private_parameter_names(model), plan, configure(),
                        np.random.default_rng(0), clipped_sum=recorded, add_noise=add_noise)
    assert plans == [plan] * 30
    assert [C for *_, C in recorded] == [plan.clip_to] * 30 and plan.clip_to < 0.5


def test_a_private_run_follows_the_plan_that_it_reports(public, tmp_path, capsys, optimizer_steps):
    more = ("--max-grad-norm", 0.3, "--delta", 1e-3, "--epochs", 4.2)   # 12.6 steps are 13
    train.main(arguments(public, tmp_path, *more))
    printed = capsys.readouterr().out
    metadata = load_checkpoint(tmp_path / "private-eps3.pt")[1]
    plan = PrivacyPlan(**metadata["plan"])
    assert dataclasses.astuple(plan)[:3] == (24, 8, 13) and len(optimizer_steps) == 13
    assert (plan.max_grad_norm, plan.delta) == (0.3, 1e-3) and 2.997 <= plan.epsilon <= 3
    assert "N = 24, sample rate 0.33333, 13 steps" in printed
    assert f"sigma = {plan.noise_multiplier:.4f}, C = 0.3" in printed
    trained = flat({n: load_checkpoint(public / "public.pt")[0].get_parameter(n)
                    for n in private_parameter_names(load_checkpoint(public / "public.pt")[0])})
    assert f"trains {len(trained):,} of" in printed


def test_physical_batches_change_neither_epsilon_nor_update(public, tmp_path):
    results = []
    for size in (1, 3, 64, "auto"):
        train.main(arguments(public, tmp_path / str(size), "--physical-batch", size, "--epochs", 1,
                             "--insecure-noise-seed", 7))
        results.append(load_checkpoint(tmp_path / str(size) / "private-eps3.pt"))
    for model, metadata in results[1:]:
        assert metadata["ledger"] == results[0][1]["ledger"]
        for one, other in zip(results[0][0].parameters(), model.parameters()):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# ---- the autoencoder ---------------------------------------------------------------------------

def test_random_squares_are_cut_out_of_their_images():
    images = np.arange(3 * 6 * 6).reshape(3, 6, 6, 1).astype(np.uint8)
    torch.manual_seed(0)
    squares = train.random_squares(images, np.array([2, 0, 2]), 4)
    windows = {k: {images[k, y:y + 4, x:x + 4].tobytes() for y in range(3) for x in range(3)}
               for k in (0, 2)}
    assert squares.shape == (3, 4, 4, 1)
    assert all(square.tobytes() in windows[k] for k, square in zip((2, 0, 2), squares))
    assert np.array_equal(train.random_squares(images, np.array([1]), 0), images[1:2])


def test_the_autoencoder_learns_its_images():
    images = np.random.default_rng(0).integers(0, 2, (4, 8, 8, 1)).astype(np.uint8) * 255
    config = configure("autoencoder.steps=60", "autoencoder.batch=8", "autoencoder.kl_weight=0")
    torch.manual_seed(0)
    vae = tiny_model(randomise=False).float().vae
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1.0
    before = vae.loss(x, 0.0).item()
    train.train_autoencoder(vae, images, config)
    assert vae.loss(x, 0.0).item() < 0.7 * before


def test_latents_have_unit_variance(public):
    model, _ = load_checkpoint(public / "public.pt")
    images = train.load_images(str(public / "public-images"), configure()).images
    z_0 = encode_dataset(model, images, torch.device("cpu"))
    assert z_0.shape == (12, 4, 4, 4) and z_0.std().item() == pytest.approx(1.0, rel=1e-4)


# ---- data larger than memory -------------------------------------------------------------------

def test_both_stages_learn_the_same_of_large_sets(public, tmp_path, monkeypatch):
    found = []
    for name in ("small", "large"):
        out = tmp_path / name
        command = arguments(public, out, "--insecure-noise-seed", 3, "--set", "autoencoder.crop=4")
        train.main(command[2:])   # without the public checkpoint: the public stage comes first
        found.append([model.values() for model in states(out / "public.pt",
                                                         out / "private-eps3.pt")])
        monkeypatch.setattr(lazy, "LARGE", 0)
    for small, large in zip(*found, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(small, large, strict=True))


@pytest.mark.parametrize("stage", ["public", "private"])
def test_a_damaged_picture_of_a_large_set_is_refused_first(public, tmp_path, capsys, monkeypatch,
                                                           optimizer_steps, stage):
    images = write_images(tmp_path / "images", [12, 12], seed=1)
    (images / "b/7.png").write_bytes(b"damaged")
    monkeypatch.setattr(lazy, "LARGE", 0)
    command = arguments(public, tmp_path / "out", "--stage", stage, f"--{stage}-data", images)
    message = refuse(capsys, train.main, command[2 * (stage == "public"):])
    assert f"cannot read the image b/7.png of {images}" in message and not optimizer_steps


# ---- the program -------------------------------------------------------------------------------

def test_the_private_stage_runs_the_public_one_first(public, tmp_path, capsys):
    command = arguments(public, tmp_path)[2:]   # without the public checkpoint
    train.main(command)
    printed = capsys.readouterr().out
    assert "running the public stage first" in printed and "spent epsilon = 3 (RDP)" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "autoencoder.pt", "public.pt", "public.png", "private-eps3.pt", "private-eps3.png",
        "private-eps3.privacy.json"}
    assert torch.equal(*(model["alphas_cumprod"] for model in states(
        tmp_path / "public.pt", tmp_path / "private-eps3.pt")))


def test_a_stopped_public_stage_goes_on_after_its_autoencoder(public, tmp_path, capsys):
    data = public / "public-images"
    (tmp_path / "autoencoder.pt").write_bytes((public / "autoencoder.pt").read_bytes())
    command = ["--stage", "public", "--out", str(tmp_path), *FLAGS, "--public-data"]
    other = write_images(tmp_path / "other", [6, 6], seed=5)
    assert "other data" in refuse(capsys, train.main, [*command, other])
    train.main([*command, str(data), "--public-steps", "1"])   # comes after the autoencoder
    assert "taking the autoencoder from" in capsys.readouterr().out
    one, other = (load_checkpoint(p / "public.pt")[0].vae.state_dict() for p in (public, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("setting, told", [
    ("autoencoder.steps=3", "autoencoder.steps 2, not 3"), ("autoencoder.lr=1.0", "autoencoder.lr"),
    ("autoencoder.crop=4", "autoencoder.crop 0, not 4"), ("public.seed=1", "--seed 0, not 1"),
    ("vae.num_res_blocks=2", "vae.num_res_blocks"), ("data.channels=3", "data.channels 1, not 3"),
    ("data.image_size=16", "data.image_size 8, not 16")])
def test_an_autoencoder_of_other_settings_is_refused(public, tmp_path, capsys, optimizer_steps,
                                                     setting, told):
    (tmp_path / "autoencoder.pt").write_bytes((public / "autoencoder.pt").read_bytes())
    command = ["--stage", "public", "--out", tmp_path, "--public-data", public / "public-images"]
    message = refuse(capsys, train.main, [*command, *FLAGS, "--set", setting])
    assert told in message and "autoencoder.pt was made with" in message and not optimizer_steps


def other_public_model(public: Path, folder: Path) -> list[str]:
    """A private run's command, to whose folder another public stage's model is put."""
    (folder / "public.pt").write_bytes((public / "public.pt").read_bytes())
    return arguments(public, folder, "--epochs", 1)[2:]   # without --public-checkpoint


@pytest.mark.parametrize("more, told", [
    (["--public-steps", "3"], "--public-steps 2, not 3"), (["--seed", "1"], "--seed 0, not 1"),
    (["--set", "public.batch=5"], "public.batch 4, not 5"),
    (["--set", "autoencoder.steps=3"], "autoencoder.steps 2, not 3"),
    (["--public-data", "scenes"], "public-images, not scenes"),
    (["--preset", "mnist"], "public.lr 0.004, not 0.002")])
def test_a_public_model_of_other_settings_is_refused(public, tmp_path, capsys, more, told):
    command = [*other_public_model(public, tmp_path), *more]
    message = refuse(capsys, train.main, command)
    assert "public.pt was made with" in message and told in message
    assert f"--public-checkpoint {tmp_path}/public.pt to take it as it is" in message
    train.main([*command, "--public-checkpoint", str(tmp_path / "public.pt")])


def test_the_private_stage_need_not_repeat_public_flags(public, tmp_path):
    command = other_public_model(public, tmp_path)
    for flag in ("--public-data", *STAGES[:4]):   # now as the preset has them
        del command[(k := command.index(flag)) - (flag[0] != "-"):k + 1 + (flag[0] == "-")]
    train.main(command)
    assert load_checkpoint(tmp_path / "private-eps3.pt")[1]["config"]["public"]["steps"] != 2


@pytest.mark.parametrize("stage, names", [
    ("public", ["public.pt", "public.png", "autoencoder.pt"]),
    ("private", ["private-eps3.pt", "private-eps3.png", "private-eps3.privacy.json",
                 "private-eps3.unfinished.pt", "private-eps3.unfinished.privacy.json", "public.pt",
                 "public.png", "autoencoder.pt"])])
def test_another_program_s_files_are_never_replaced(public, tmp_path, capsys, stage, names):
    command = [*arguments(public, tmp_path, "--stage", stage, "--overwrite")[2:]]
    for name in names:
        (tmp_path / name).write_text("mine")
        message = refuse(capsys, train.main, command)
        assert f"{name} was not made by" in message or f"{name} is damaged or of ano" in message
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()


def test_a_run_writes_neither_into_its_data_nor_over_its_model(public, tmp_path, capsys):
    images = public / "private-images"
    among = refuse(capsys, train.main, arguments(public, images / "a"))
    assert "which is read as data" in among and len(list((images / "a").iterdir())) == 12
    (tmp_path / "private-eps3.pt").write_bytes((public / "public.pt").read_bytes())
    command = arguments(public, tmp_path, "--overwrite", "--public-checkpoint",
                        tmp_path / "private-eps3.pt")
    assert "is what this command reads" in refuse(capsys, train.main, command)


def test_a_full_disk_ends_a_run_in_one_line(public, private, tmp_path, capsys, full_disk):
    shutil.copytree(private.parent, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    with full_disk(50_000), pytest.raises(SystemExit) as stop, one_line_errors():
        train.main(arguments(public, tmp_path, "--overwrite"))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("private-eps3.unfinished.pt cannot be written: File too large")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_private_loss_is_shown_only_when_asked_for(public, tmp_path, capsys):
    train.main(arguments(public, tmp_path / "a"))
    quiet = capsys.readouterr()
    assert not re.search(r"loss\s*=|WARNING", quiet.out + quiet.err)
    train.main(arguments(public, tmp_path / "b", "--show-private-loss"))
    loud = capsys.readouterr()
    assert "WARNING" in loud.out and re.search(r"not_private_loss=\d", loud.out + loud.err)


def test_a_large_delta_is_warned_about(public, tmp_path, capsys):
    train.main(arguments(public, tmp_path, "--delta", 0.1))
    assert "WARNING: delta is not below 1/N" in capsys.readouterr().out


REFUSED = [
    (["--eps", "0"], "--eps must be positive"),
    (["--eps", "nan"], "--eps must be positive"),
    (["--eps", "inf"], "--eps must be positive and finite"),
    (["--private-lr", "inf"], "--private-lr must be positive and finite"),
    (["--max-grad-norm", "1e-30"], "max_grad_norm must be at least 1e-12"),
    (["--epochs", "1e308"], "epochs must be positive and below"),
    (["--delta", "0"], "--delta must be positive"),
    (["--delta", "1.5"], "delta"),
    (["--expected-batch", "101"], "expected batch 101"),
    (["--label-dropout", "1"], "--label-dropout must be below 1"),
    (["--preset", "glyph"], "did you mean 'glyphs'?"),
    (["--stage", "nonsense"], "unknown --stage"),
    (["--set", "unet.model_chanels=8"], "did you mean 'model_channels'?"),
    (["--accountant", "nonsense"], "--accountant must be one of rdp, pld"),
    (["--clipping", "nonsense"], "--clipping must be one of ghost, vmap"),
    (["--private-data", "nonsense"], "unknown data"),
    (["--trainable", "first:2"], "--trainable must be"),
    (["--trainable", "last:99"], "names nothing that can be trained"),
    (["--bf16", "--clipping", "vmap"], "--bf16 needs --clipping ghost"),
    (["--set", "private.timesteps=[800, 200]"], "private.timesteps must be two numbers"),
    (["--physical-batch", "0"], "--physical-batch must be a positive number or auto"),
    (["--set", "data.image_size=6"], "data.image_size must be a multiple of 4"),
    (["--set", "autoencoder.crop=3"], "autoencoder.crop must be a multiple of 2"),
    (["--set", "unet.model_channels=15"], "unet.model_channels must be even"),
    (["--set", "unet.model_channels=32"], "another architecture"),
    (["--set", "data.channels=2"], "data.channels must be one of 1, 3"),
    (["--set", "samples.steps=1001"], "sampling steps"),
    (["--set", "samples.eta=0.5"], "deterministic"),
    (["--set", "text.length=9"], "has no captions"),
    (["--set", "vae.n_embed=5", "--stage", "public", "--public-checkpoint", "missing.pt"],
     "a VQ autoencoder is not trained here"),
    (["--pretrained", "official.ckpt"], "both give a public model"),
    (["--device", "meta"], "device 'meta'"),
    (["--device", "mps"], "mps has no float64"),
    (["--device", "abacus"], "device 'abacus'"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--eps", "many"], "--eps"),
    (["--public-checkpoint", "missing.pt"], "missing.pt does not exist"),
    (["--stage", "public", "--public-checkpoint", "model.png"], "must be the name of a .pt file"),
    (["--private-data", "letters", "--public-data", "letters"], "are both letters"),
    (["--private-data", "celeba:Smiling", "--public-data", "celeba"], "they must differ"),
]


@pytest.mark.parametrize("more, complaint", REFUSED, ids=[" ".join(more) for more, _ in REFUSED])
def test_bad_input_is_refused_and_nothing_written(public, tmp_path, capsys, more, complaint):
    capsys.readouterr()
    out = tmp_path / "out"
    assert complaint in refuse(capsys, train.main, arguments(public, out, *more))
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("more", [["--delta", "1.5"], ["--expected-batch", "101"],
                                  ["--trainable", "from:99"]])
def test_what_cannot_work_is_refused_before_the_public_stage(public, tmp_path, capsys, more):
    refuse(capsys, train.main, [*arguments(public, tmp_path / "out", *more)[2:]])
    assert not (tmp_path / "out").exists()


def test_public_data_are_never_trained_on_privately(public, tmp_path, capsys, optimizer_steps):
    command = arguments(public, tmp_path / "out")
    detour = public / "private-images/../private-images"
    assert "they must differ" in refuse(capsys, train.main, [*command, "--public-data", detour])
    same = [*command[2:], "--private-data", shutil.copytree(public / "public-images",
                                                            tmp_path / "copy")]
    assert f"copy holds the images of {public}" in refuse(capsys, train.main, same)
    assert not optimizer_steps and [path.name for path in tmp_path.iterdir()] == ["copy"]
    swapped = ["--private-data", public / "public-images", "--public-data", "digits"]
    assert "without privacy" in refuse(capsys, train.main, [*command, *swapped])


def test_the_program_exits_with_code_2_and_no_traceback(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "train.py", "--eps", "-1"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
