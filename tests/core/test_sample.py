"""sample.py on tiny checkpoints: grids, .npz files, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.classes import new_class_embedder
from runtime.samples import provenance
from tiny import configure, refuse, tiny_model, write_images

SETTINGS = dataclasses.asdict(configure())


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A checkpoint of a model of captions."""
    path = tmp_path_factory.mktemp("captioned") / "public.pt"
    model = tiny_model("text.length=12", "text.layers=1").float()
    save_checkpoint(path, model, classes=["all"], config=SETTINGS)
    return path


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path) as content:
        return dict(content)


def test_labels_of_samples_are_uniform(private, tmp_path):
    sample.main([str(private), "--npz", str(tmp_path / "s.npz"), "--count", "7", "--steps", "2"])
    content = arrays(tmp_path / "s.npz")
    assert content["images"].shape == (7, 8, 8, 1) and content["images"].dtype == np.uint8
    assert content["labels"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert content["classes"].tolist() == ["a", "b"]   # what these numbers mean


def test_samples_without_condition_have_no_classes(tmp_path):
    model = tiny_model("unet.context_dim=0").float()
    save_checkpoint(tmp_path / "public.pt", model, classes=["all"], config=SETTINGS)
    sample.main([str(tmp_path / "public.pt"), "--npz", str(tmp_path / "s.npz"), "--count", "3",
                 "--steps", "1"])
    content = arrays(tmp_path / "s.npz")
    assert content["labels"].tolist() == [0, 0, 0] and content["classes"].shape == (0,)


def test_an_npz_says_where_it_is_from(private, tmp_path):
    more = ["--count", "2", "--steps", "3", "--solver", "ddim", "--eta", "0.5", "--seed", "4"]
    sample.main([str(private), "--npz", str(tmp_path / "s.npz"), *more])
    origin = json.loads(str(arrays(tmp_path / "s.npz")["origin"]))
    assert origin["checkpoint"] == "private-eps3.pt" and 2.99 < origin["epsilon"] <= 3.0
    settings = dict(steps=3, solver="ddim", eta=0.5, guidance=1.5, seed=4, delta=1e-5)
    assert {name: origin[name] for name in settings} == settings


def test_samples_follow_the_seed(private, tmp_path):
    drawn = []
    for number, seed in enumerate("112"):
        path = tmp_path / f"{number}.npz"
        sample.main([str(private), "--npz", str(path), "--count", "4", "--steps", "2",
                     "--seed", seed])
        drawn.append(arrays(path)["images"])
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_checkpoints_stand_side_by_side_in_a_grid(public, private, tmp_path):
    grid = tmp_path / "g.png"
    sample.main([str(public / "public.pt"), str(private), "--grid", str(grid), "--steps", "2",
                 "--columns", "3"])
    width, height = Image.open(grid).size
    assert width > 2 * 3 * 8 and height > 2 * 8


@pytest.fixture
def grids(monkeypatch) -> list:
    """(panels, caption) of each grid, in place of its file."""
    seen = []
    monkeypatch.setattr(sample, "save_grid", lambda path, *grid: seen.append(grid))
    return seen


def test_real_images_come_first_and_accuracies_below(private, tmp_path, grids):
    write_images(tmp_path / "real/test", [2, 2], seed=5)
    row = dict(origin=provenance(private, {}), accuracy=dict(cnn=dict(mean=0.75)))
    report = dict(results=[row], test_images=9, seeds=2)
    (tmp_path / "r.json").write_text(json.dumps(report))
    sample.main([str(private), "--grid", "g.png", "--steps", "2", "--columns", "3", "--real",
                 str(tmp_path / "real"), "--caption-from", str(tmp_path / "r.json")])
    [(panels, caption)] = grids
    assert [title for title, _, _ in panels] == ["real", "eps = 3"]
    assert all(images.shape == (2, 3, 8, 8, 1) for _, images, _ in panels)
    assert [names for _, _, names in panels] == [["a", "b"]] * 2
    assert caption.startswith("delta = 1e-05. Accuracy on 9 real") and "75.00%" in caption


def test_every_prompt_is_a_row_of_the_grid(captioned, grids):
    rows = ["a cat", "a dog", "a cat"]
    sample.main([str(captioned), "--grid", "g.png", "--steps", "2", "--columns", "2",
                 *(word for prompt in rows for word in ("--prompt", prompt))])
    [([(title, images, names)], _)] = grids
    assert title == "public only" and names == rows and images.shape == (3, 2, 8, 8, 1)
    assert not np.array_equal(images[0], images[1])


def test_a_grid_shows_ten_classes_at_most(tmp_path, grids):
    model = new_class_embedder(tiny_model().float(), None, 12)
    save_checkpoint(tmp_path / "many.pt", model, classes=list("abcdefghijkl"), config=SETTINGS)
    sample.main([str(tmp_path / "many.pt"), "--grid", "g.png", "--steps", "1", "--columns", "1"])
    [([(_, images, names)], _)] = grids
    assert names == list("abcdefghij") and len(images) == 10


def test_prompts_are_drawn_in_turn(captioned, tmp_path):
    prompts = ["--prompt", "a cat", "--prompt", "a dog"]
    sample.main([str(captioned), "--npz", str(tmp_path / "s.npz"), "--count", "3", "--steps", "2",
                 *prompts])
    content = arrays(tmp_path / "s.npz")
    assert content["labels"].tolist() == [0, 1, 0]
    assert content["classes"].tolist() == ["a cat", "a dog"]
    assert json.loads(str(content["origin"]))["prompts"] == ["a cat", "a dog"]


@pytest.mark.parametrize("resolution, most", [(32, 500), (256, 6)])
def test_large_images_are_sampled_few_at_a_time(resolution, most):
    sizes = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae, self.unet = torch.nn.Module(), torch.nn.Module()
            self.vae.resolution, self.vae.latent_shape = resolution, (4, 4, 4)
            self.unet.model_channels = 16

        def generate(self, condition, *settings):
            sizes.append(len(condition))
            return torch.zeros(len(condition), 1, 1, 1, dtype=torch.uint8)

    args = sample.parse_args(["x.pt", "--grid", "g.png", "--device", "cpu"])
    assert sample.draw_samples(Model(), np.arange(1_001), args).shape == (1_001, 1, 1, 1)
    assert sum(sizes) == 1_001 and max(sizes) <= most


REFUSED = [
    ([], "nothing to do"),
    (["--grid", "g.png", "--steps", "0"], "sampling steps"),
    (["--grid", "g.png", "--eta", "2", "--solver", "ddim"], "eta must be from 0 to 1"),
    (["--grid", "g.png", "--eta", "0.5"], "deterministic"),
    (["--grid", "g.png", "--solver", "euler"], "--solver"),
    (["--grid", "g.png", "--guidance", "nan"], "--guidance must be finite"),
    (["--grid", "g.png", "--columns", "0"], "--columns must be at least 1"),
    (["--grid", "g.png", "--caption-from", "missing.json"], "missing.json"),
    (["--grid", "g.png", "--npz", "s.npz", "--caption-from", "missing.json"], "missing.json"),
    (["--grid", "g.png", "--npz", "s.npz", "--real", "nonsense"], "unknown data"),
    (["--grid", "g.png", "--prompt", "a cat"], "leave out --prompt"),
    (["--grid", "g.jpg"], "must be the name of a .png file"),
    (["--npz", "s.png"], "must be the name of a .npz file"),
    (["--npz", "/proc/s.npz"], "/proc/s.npz cannot be written"),
    (["--npz", "s.npz", "--count", "0"], "--count of at least 1"),
    (["--npz", "s.npz", "--caption-from", "r.json"], "--caption-from is for --grid"),
    (["other.pt", "--npz", "s.npz"], "--npz takes one checkpoint"),
    (["other.pt", "--grid", "g.png"], "other.pt does not exist"),
    (["--grid", "g.png", "--device", "abacus"], "device 'abacus'"),
]


@pytest.mark.parametrize("more, complaint", REFUSED, ids=[" ".join(more) for more, _ in REFUSED])
def test_bad_input_is_refused(private, tmp_path, monkeypatch, capsys, more, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in refuse(capsys, sample.main, [private, *more])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more, complaint", [
    (["--grid", "real/test/a/g.png", "--real", "real"], "real/test/a/g.png lies in real"),
    (["--grid", "r.png", "--caption-from", "r.png"], "r.png is what this command reads"),
    (["--grid", "real/test/a/0.png"], "was not made by this program"),
    (["--npz", "mine.npz"], "mine.npz was not made by this program")])
def test_no_input_or_foreign_file_is_replaced(private, tmp_path, monkeypatch, capsys, more,
                                              complaint):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "real/test", [2, 2], seed=5)
    (tmp_path / "r.png").write_text("{}")
    np.savez("mine.npz", images=np.zeros(3))
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert complaint in refuse(capsys, sample.main, [private, *more])
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_samples_are_replaced_by_new_ones(private, tmp_path):
    for count in (2, 3):
        sample.main([str(private), "--npz", str(tmp_path / "s.npz"), "--count", str(count),
                     "--grid", str(tmp_path / "g.png"), "--steps", "1", "--columns", "1"])
    assert len(arrays(tmp_path / "s.npz")["labels"]) == 3


@pytest.mark.parametrize("prompts, complaint", [
    ([], "say what to sample"), (["--prompt", "  "], "not only blanks"),
    (["--prompt", "a very long prompt"], "from 1 to 12")])
def test_wrong_prompts_are_refused(captioned, tmp_path, capsys, prompts, complaint):
    command = [captioned, "--grid", tmp_path / "g.png", *prompts]
    assert complaint in refuse(capsys, sample.main, command)


def test_a_trained_autoencoder_alone_is_no_model(public, tmp_path, capsys):
    command = [public / "autoencoder.pt", "--grid", tmp_path / "g.png"]
    assert "trained autoencoder only" in refuse(capsys, sample.main, command)
    assert load_checkpoint(public / "autoencoder.pt", "autoencoder")[1]["part"] == "autoencoder"
