"""Evaluation: classifiers that never learn from test images, Frechet distances that equal their closed forms."""

import functools
import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
from train import to_pixels

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def two_kinds(count: int, seed: int, flipped: float = 0.0) -> data.Dataset:
    """Noise that is brighter on the left (0) or on the right (1); a share of the labels is wrong."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.integers(0, 200, (count, 20, 20, 1))
    images[labels == 0, :, :10] += 25
    images[labels == 1, :, 10:] += 25
    return data.Dataset(images.astype(np.uint8), np.where(rng.random(count) < flipped, 1 - labels, labels), ["0", "1"])


class Watched(data.Dataset):
    """A data set that notes whenever its images or labels are asked for."""

    def __getattribute__(self, name):
        if name in ("images", "labels"):
            object.__getattribute__(self, "__dict__").setdefault("log", []).append(name)
        return object.__getattribute__(self, name)


# ---- classifiers -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, channels, size, wrn, parameters", [
    ("logreg", 1, 28, None, 7_850),
    ("mlp", 1, 28, None, 79_510),
    ("cnn", 1, 28, None, 241_546),      # DPDM: 320 + 18,496 + 73,856 + 147,584 + 1,290
    ("cnn", 3, 32, None, 356_810),      # four pixels wide before the linear layers
    ("wrn", 3, 32, (16, 4), 2_748_890),     # 2.7 M, Zagoruyko and Komodakis 2016, table 4
    ("wrn", 3, 32, (40, 4), 8_949_210),     # 8.9 M, as there
])
def test_the_classifiers_are_those_of_the_literature(name, channels, size, wrn, parameters):
    model = evaluate.make_classifier(name, channels, size, 10, wrn)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if wrn != (40, 4):
        assert model.eval()(torch.zeros(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", evaluate.RECIPES)
def test_classifiers_learn(name):
    score = evaluate.train_and_test(name, two_kinds(300, 0), two_kinds(100, 1), 0, 40, CPU, (10, 1))
    assert score > 0.8


@pytest.mark.parametrize("name", ["small-cnn", "logreg"])
def test_test_images_are_looked_at_once_and_after_training(name, monkeypatch):
    test = Watched(*vars(two_kinds(100, 1)).values())
    test.log.clear()
    trained = evaluate.train_classifier

    def note_the_end(*args):
        model = trained(*args)
        test.log.append("trained")
        return model

    monkeypatch.setattr(evaluate, "train_classifier", note_the_end)
    evaluate.train_and_test(name, two_kinds(200, 0), test, 0, 20, CPU)
    assert sorted(test.log[1:]) == ["images", "labels"] and test.log[0] == "trained"


@pytest.mark.parametrize("name", ["logreg", "mlp"])
def test_no_choice_depends_on_test_labels(name):
    """The classifier is the same for opposite test labels, though its snapshots differ."""
    train, test = two_kinds(300, 0, flipped=0.3), two_kinds(200, 1)
    opposite = data.Dataset(test.images, 1 - test.labels, test.classes)
    scores = [evaluate.train_and_test(name, train, t, 0, 20, CPU) for t in (test, opposite)]
    assert 0.5 < scores[0] < 1.0 and sum(scores) == pytest.approx(1.0)


def test_no_gradient_comes_from_the_held_out_tenth(monkeypatch):
    train = two_kinds(200, 0)
    train.images[:, 0, 0, 0], train.images[:, 0, 1, 0] = np.arange(200), 7   # every image tells its number
    trained_on, scored_on = set(), set()
    monkeypatch.setattr(evaluate, "to_pixels", lambda images, device: (
        (trained_on if len(images) == evaluate.RECIPES["logreg"].batch else scored_on).update(images[:, 0, 0, 0]),
        to_pixels(images, device))[1])
    evaluate.train_classifier("logreg", train, 2, 0, 60, CPU)
    assert len(scored_on) == 20 and len(trained_on) == 180 and not trained_on & scored_on


def test_the_snapshot_with_the_best_held_out_score_is_kept(monkeypatch):
    weights, scores = [], iter([0.1, 0.2, 0.9, 0.3, 0.3, 0.8, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(evaluate, "accuracy", lambda model, images, labels: (
        weights.append(model[1].weight.detach().clone()), next(scores))[1])
    model = evaluate.train_classifier("logreg", two_kinds(100, 0), 2, 0, 30, CPU)
    assert len(weights) == 10 and torch.equal(model[1].weight, weights[2])


def test_images_stay_uint8_except_for_one_batch(monkeypatch):
    sizes = []
    monkeypatch.setattr(evaluate, "to_pixels", lambda images, device: (
        sizes.append(len(images)), to_pixels(images, device))[1])
    evaluate.train_and_test("logreg", two_kinds(5_000, 0), two_kinds(1_001, 1), 0, 10, CPU)
    assert max(sizes) <= 250 and sum(sizes) == 10 * 128 + 10 * 500 + 1_001


def test_accuracy_counts_every_image():
    images, labels = np.zeros((503, 4, 4, 1), np.uint8), np.zeros(503, np.int64)
    labels[250:300] = 1
    always_zero = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(always_zero[1].weight)
    always_zero[1].bias.data = torch.tensor([1.0, 0.0])
    assert evaluate.accuracy(always_zero, images, labels) == 453 / 503


def test_accuracy_is_taken_without_dropout_and_training_goes_on_with_it():
    drops_all = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(16, 2, bias=False))
    nn.init.constant_(drops_all[2].weight[0], 1.0)   # black images are -1 everywhere: class 1 unless all is dropped
    nn.init.zeros_(drops_all[2].weight[1])
    dataset = data.Dataset(np.zeros((300, 4, 4, 1), np.uint8), np.ones(300, np.int64), ["0", "1"])
    assert evaluate.accuracy(drops_all, dataset.images, dataset.labels) == 1.0
    before = drops_all[2].weight.detach().clone()
    list(evaluate.optimise(drops_all, dataset, torch.arange(300), evaluate.RECIPES["cnn"], 2))
    assert torch.equal(drops_all[2].weight, before)   # no gradient comes through a dropout of everything


# ---- Frechet distance ------------------------------------------------------------------------------

def random_covariance(rng, size: int, rank: int) -> np.ndarray:
    half = rng.standard_normal((size, rank))
    return half @ half.T


def test_frechet_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    (mean_a, mean_b), (a, b) = rng.standard_normal((2, 30)), rng.random((2, 30))
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert evaluate.frechet_distance(mean_a, np.diag(a), mean_b, np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2)."""
    a, b, zero = np.array([[2.0, 1.5], [1.5, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]]), np.zeros(2)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert not np.allclose(a @ b, b @ a)
    assert evaluate.frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)
    assert evaluate.frechet_distance(zero, b, zero, a) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_singular_covariances():
    """u u^T and v v^T: |u|^2 + |v|^2 - 2 |u v|. Of anything to itself: 0."""
    rng = np.random.default_rng(1)
    u, v, zero = *rng.standard_normal((2, 200)), np.zeros(200)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert evaluate.frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, rel=1e-6)
    thin = random_covariance(rng, 200, 20)
    assert evaluate.frechet_distance(zero, thin, zero, thin) == pytest.approx(0.0, abs=1e-9 * np.trace(thin))


def test_frechet_distance_of_scaled_gaussians_is_known():
    cov = random_covariance(np.random.default_rng(2), 50, 80)
    distance = evaluate.frechet_distance(np.zeros(50), cov, np.ones(50), 9 * cov)
    assert distance == pytest.approx(50 + 4 * np.trace(cov), rel=1e-10)   # (3 - 1)^2


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_mean_and_covariance_of_batches_equal_those_of_all(offset):
    features = np.random.default_rng(0).standard_normal((103, 7)) * np.arange(1, 8) + offset
    mean, cov = evaluate.mean_and_covariance(torch.from_numpy(features).split(10))
    assert mean == pytest.approx(features.mean(0), rel=1e-12)
    assert cov == pytest.approx(np.cov(features.T), rel=1e-7, abs=1e-7) and cov.dtype == np.float64


class StandIn(nn.Module):
    """Instead of Inception: the means of four corners' channels, of images that must be uint8 with three of them."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if not return_features or images.dtype != torch.uint8 or images.shape[1] != 3:
            raise RuntimeError("not called as Inception is")
        x = images.float()
        return torch.stack([x[:, 0, :16, :16].mean((1, 2)), x[:, 1, :16, 16:].mean((1, 2)),
                            x[:, 2, 16:, :16].mean((1, 2)), x[:, 0, 16:, 16:].mean((1, 2))], 1)


def corners(images: np.ndarray) -> np.ndarray:
    x = images[..., 0].astype(np.float64)
    return np.stack([x[:, i:i + 16, j:j + 16].mean((1, 2)) for i in (0, 16) for j in (0, 16)], 1)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The file of such a network, which passes for the right one, and few digits in a cache of their own."""
    path = tmp_path / "network.pt"
    torch.jit.save(torch.jit.script(StandIn()), path)
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "COUNTS", {"digits": {"train": 150, "test": 50}})
    return path


@pytest.fixture
def samples(tmp_path):
    """An .npz as sample.py writes it."""
    path, rng = tmp_path / "eps2.npz", np.random.default_rng(0)
    origin = dict(checkpoint="private.pt", sha256="ab", epsilon=1.98, delta=1e-5)
    np.savez(path, images=rng.integers(0, 256, (40, 32, 32, 1), np.uint8), labels=np.arange(40) % 10,
             origin=np.array(json.dumps(origin)))
    return path


def run(*arguments) -> dict:
    """The JSON of a quick evaluation."""
    *rest, path = arguments
    evaluate.main([*map(str, rest), "--real", "digits", "--steps", "2", "--seeds", "1", "--device", "cpu",
                   "--json", str(path), "--overwrite"])
    return json.loads(path.read_text())


def test_fid_end_to_end_with_a_stand_in_network(stand_in, samples, tmp_path, capsys):
    report = run(samples, "--ceiling", "--inception", stand_in, tmp_path / "r.json")
    real, (fake, _) = data.load("digits", "train").images, data.read_arrays(samples)
    a, b = corners(fake), corners(real)
    root = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(root).sum()
    assert report["results"][0]["FID"] == pytest.approx(expected, rel=1e-4)   # the network is in float32
    assert "FID" not in report["results"][1]   # the real images' to themselves is 0
    assert re_table(capsys.readouterr().out)[0][-1] == "FID"


def re_table(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines()[1:]]


def test_real_statistics_are_cached_by_images_and_network(stand_in, monkeypatch):
    network, digits = evaluate.load_inception(stand_in, CPU), data.load("digits", "train").images
    calls = []
    features = evaluate.inception_features
    monkeypatch.setattr(evaluate, "inception_features", lambda *args: calls.append(1) or features(*args))
    first = evaluate.real_statistics("digits", digits, network, CPU)
    again = evaluate.real_statistics("digits", digits, network, CPU)
    assert len(calls) == 1 and all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    changed = digits.copy()
    changed[0, 0, 0, 0] ^= 255
    evaluate.real_statistics("digits", changed, network, CPU)
    assert len(calls) == 2
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", "another")
    evaluate.real_statistics("digits", digits, network, CPU)
    assert len(calls) == 3 and len(list(data.CACHE.glob("inception-digits-train-32-*.npz"))) == 3


def test_colour_images_keep_their_channels(stand_in):
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    network = evaluate.load_inception(stand_in, CPU)
    found = torch.cat(list(evaluate.inception_features(network, images, CPU, batch=3)))
    assert found[:, 1].numpy() == pytest.approx(images[:, :16, 16:, 1].mean((1, 2)), rel=1e-5)
    assert found[:, 2].numpy() == pytest.approx(images[:, 16:, :16, 2].mean((1, 2)), rel=1e-5)


def test_the_distance_without_inception_is_never_called_fid(stand_in, samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "train_judge", functools.partial(evaluate.train_judge, steps=5))
    report = run(samples, "--frechet", tmp_path / "r.json")
    assert report["results"][0]["Frechet"] > 0 and "FID" not in capsys.readouterr().out
    assert "FID" not in (tmp_path / "r.json").read_text()


def test_a_judges_distance_grows_with_the_difference():
    real = data.Dataset(*data.render("01", data.STYLES["digits"], 300, seed=5), ["0", "1"])
    real.images = real.images[..., None]
    judge = evaluate.train_judge(real, CPU, steps=40)
    seen = [evaluate.mean_and_covariance([evaluate.judged(judge, x)[0]])
            for x in (real.images[:150], real.images[150:], 255 - real.images[150:])]
    assert evaluate.frechet_distance(*seen[0], *seen[1]) < 0.3 * evaluate.frechet_distance(*seen[0], *seen[2])
    assert np.mean(evaluate.judged(judge, real.images)[1] == real.labels) > 0.9


def test_other_networks_are_refused(stand_in, tmp_path):
    with pytest.raises(ValueError, match="--download.*https://nvlabs.*inception-2015-12-05.pt"):
        evaluate.load_inception(tmp_path / "missing.pt", CPU)
    stand_in.write_bytes(stand_in.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged or another network"):
        evaluate.load_inception(stand_in, CPU)


@pytest.fixture
def server(monkeypatch):
    """A function that makes INCEPTION_URL the address of a local server giving these bytes, or a part or a 404."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, sent = self.server.answer
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setattr(evaluate, "INCEPTION_URL", f"http://127.0.0.1:{listening.server_port}/network.pt")
        yield listening
        listening.shutdown()


@pytest.mark.parametrize("damage", [None, "cut", "changed", "missing", "nobody there"])
def test_the_network_is_fetched_whole_or_not_at_all(server, tmp_path, monkeypatch, damage):
    body, path = b"network" * 500_000, tmp_path / "folder" / "network.pt"
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(evaluate, "INCEPTION_BYTES", len(body))
    server.answer = {None: (body, None), "cut": (body, 2_000_000), "changed": (body[::-1], None)}.get(
        damage, (None, None))
    if damage == "nobody there":
        monkeypatch.setattr(evaluate, "INCEPTION_URL", "http://127.0.0.1:9/network.pt")
    if damage:
        with pytest.raises(ValueError, match=r"cannot fetch http://127[^\n]*put that file at"):
            evaluate.fetch_inception(path)
        assert not path.exists()   # what has come of a cut one is kept, to go on from
        assert not path.parent.exists() or not list(path.parent.iterdir()) or damage == "cut"
    else:
        evaluate.fetch_inception(path)
        assert path.read_bytes() == body and len(list(path.parent.iterdir())) == 1


def test_download_fetches_the_network_once(server, stand_in, samples, tmp_path, monkeypatch):
    path, body = tmp_path / "fetched.pt", stand_in.read_bytes()
    monkeypatch.setattr(evaluate, "INCEPTION_BYTES", len(body))
    server.answer = body, None
    assert "FID" in run(samples, "--inception", path, "--download", tmp_path / "r.json")["results"][0]
    server.answer = None, None   # a second request would fail
    assert "FID" in run(samples, "--inception", path, "--download", tmp_path / "r.json")["results"][0]


# ---- the command line ------------------------------------------------------------------------------

def test_json_holds_every_number_and_where_it_is_from(stand_in, samples, tmp_path, capsys):
    evaluate.main([str(samples), "--ceiling", "--classifiers", "logreg", "mlp", "--seeds", "3", "--epochs", "2",
                   "--json", str(tmp_path / "r.json")])
    report, table = json.loads((tmp_path / "r.json").read_text()), re_table(capsys.readouterr().out)
    assert report["command"].startswith("python evaluate.py ") and "--epochs 2" in report["command"]
    assert report["versions"]["torch"] == torch.__version__
    assert (report["real"], report["test_images"], report["seeds"]) == ("digits", 50, 3)
    synthetic, ceiling = report["results"]
    assert synthetic["origin"] == dict(checkpoint="private.pt", sha256="ab", epsilon=1.98, delta=1e-5)
    assert (synthetic["images"], ceiling["images"], ceiling["origin"]) == (40, 150, {"real": True})
    for result, line in ((synthetic, table[1]), (ceiling, table[2])):
        for name in ("logreg", "mlp"):
            found = result["accuracy"][name]
            assert len(found["scores"]) == 3 and found["mean"] == pytest.approx(np.mean(found["scores"]))
            assert found["spread"] == pytest.approx(np.std(found["scores"], ddof=1))
            assert found["steps"] == -(-2 * result["images"] * 9 // 10 // 128) and f"{found['mean']:.2%}" in line
    assert table[1][:3] == ["eps2", "40", "1.98"] and table[2][2:4] == ["150", "-"]


def test_json_is_written_after_every_row_and_never_over_another(stand_in, samples, tmp_path, monkeypatch):
    path, measure, rows = tmp_path / "r.json", evaluate.measure, []

    def fail_at_the_second(*args):
        rows.append(1)
        if len(rows) == 2:
            raise RuntimeError("power cut")
        return measure(*args)

    monkeypatch.setattr(evaluate, "measure", fail_at_the_second)
    arguments = [str(samples), "--ceiling", "--steps", "2", "--seeds", "1", "--json", str(path)]
    with pytest.raises(RuntimeError):
        evaluate.main(arguments)
    assert [r["name"] for r in json.loads(path.read_text())["results"]] == ["eps2"]
    with pytest.raises(ValueError, match="--overwrite"):
        evaluate.main(arguments)


@pytest.mark.parametrize("arguments, complaint", [
    (["--epochs", "0"], "--epochs"), (["--epochs", "nan"], "--epochs"), (["--steps", "0"], "--steps"),
    (["--steps", "5", "--epochs", "1"], "not allowed"), (["--seeds", "0"], "--seeds"),
    (["--classifiers", "oracle"], "oracle"), (["--classifiers", "logreg", "wrn", "--wrn", "11", "1"], "--wrn"),
    (["--download"], "--inception"), (["--inception", "missing.pt"], "missing.pt"),
])
def test_bad_arguments_are_refused_before_anything_is_trained(stand_in, samples, monkeypatch, arguments, complaint):
    monkeypatch.setattr(evaluate, "optimise", None)
    with pytest.raises(ValueError, match=complaint):
        evaluate.main([str(samples), *arguments])


@pytest.mark.parametrize("origin", ["no json", "3", '["a"]'])
def test_a_foreign_origin_is_refused_by_name(tmp_path, origin):
    np.savez(tmp_path / "s.npz", images=np.zeros((10, 32, 32, 1), np.uint8), labels=np.zeros(10, int),
             origin=np.array(origin))
    with pytest.raises(ValueError, match="s.npz"):
        evaluate.load_synthetic(tmp_path / "s.npz")


@pytest.mark.parametrize("labels, origin", [
    (np.arange(10) / 3, "{}"), (np.array(list("0123456789")), "{}"), (np.arange(9), "{}"), (np.arange(12), "{}"),
    (np.arange(10), '{"prompts": ["a thin digit 7"]}'),
], ids=["fractions", "words", "too few", "too many", "of captions"])
def test_labels_that_are_no_classes_are_refused_by_name(tmp_path, labels, origin):
    np.savez(tmp_path / "s.npz", images=np.zeros((10, 32, 32, 1), np.uint8), labels=labels, origin=np.array(origin))
    with pytest.raises(ValueError, match="s.npz"):
        evaluate.load_synthetic(tmp_path / "s.npz")


def test_too_few_real_images_are_refused(stand_in, monkeypatch):
    few = data.Dataset(np.zeros((9, 32, 32, 1), np.uint8), np.arange(9), list("0123456789"))
    monkeypatch.setattr(data, "load", lambda *args: few)
    monkeypatch.setattr(evaluate, "optimise", None)
    with pytest.raises(ValueError, match="at least 10"):
        evaluate.main(["--ceiling"])


def test_an_unwritable_report_is_refused_before_anything_is_trained(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "optimise", None)
    monkeypatch.setattr(evaluate.os, "access", lambda *args: False)   # root may write anywhere
    with pytest.raises(ValueError, match="cannot be written"):
        evaluate.main([str(samples), "--json", str(tmp_path / "r.json")])


# ---- captions --------------------------------------------------------------------------------------

def test_a_caption_goes_below_the_grid_in_lines_that_fit(tmp_path):
    panel = ("t", np.zeros((2, 5, 32, 32, 1), np.uint8), ["a", "b"])
    data.save_grid(tmp_path / "plain.png", [panel])
    data.save_grid(tmp_path / "captioned.png", [panel], "delta = 1e-05. " + "Accuracy of all. " * 9)
    plain, captioned = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "captioned.png"))
    assert captioned.shape[1] == plain.shape[1] and captioned.shape[0] > plain.shape[0] + 3 * 18
    assert np.array_equal(captioned[:len(plain)], plain)
    below = captioned[len(plain):].min((0, 2))
    assert below.min() < 100 and (below[:8] == 255).all() and (below[-8:] == 255).all()   # ink, and margins
