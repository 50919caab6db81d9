"""evaluate.py, the program: distances, its report, and what it refuses."""

import functools
import hashlib
import http.server
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import datasets
import evaluate
from datasets import rendered
from runtime.files import read_arrays
from runtime.samples import caption
from tiny import refuse

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class StandIn(nn.Module):
    """Instead of Inception: the means of four corners of uint8 images with three channels."""

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
def folder(tmp_path, monkeypatch):
    """The folder that the program runs in, with few digits in a cache of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rendered, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(rendered, "COUNTS", {"digits": {"train": 150, "test": 50},
                                             "letters": {"train": 9, "test": 60}})
    return tmp_path


@pytest.fixture
def stand_in(folder):
    """What tells that network's file from others, and where it is not: nobody answers there."""
    path = folder / "network.pt"
    torch.jit.save(torch.jit.script(StandIn()), path)
    return evaluate.NetworkFile("http://127.0.0.1:9/network.pt", path.stat().st_size,
                                hashlib.sha256(path.read_bytes()).hexdigest())


def write_samples(path: Path, size: int = 32, labels: object = np.arange(40) % 10,
                  origin: str = "{}", classes: object = list("0123456789")) -> Path:
    """An .npz as sample.py writes it, or without classes."""
    images = np.random.default_rng(0).integers(0, 256, (40, size, size, 1), np.uint8)
    named = {} if classes is None else {"classes": np.array(classes)}
    np.savez(path, images=images, labels=labels, origin=np.array(origin), **named)
    return path


ORIGIN = dict(checkpoint="private.pt", sha256="ab", epsilon=1.98, delta=1e-5)


@pytest.fixture
def samples(folder):
    return write_samples(folder / "eps2.npz", origin=json.dumps(ORIGIN))


def run(*arguments: object, inception: evaluate.NetworkFile = evaluate.INCEPTION) -> dict:
    """The report of a quick evaluation."""
    evaluate.main([*map(str, arguments), "--steps", "2", "--seeds", "1", "--device", "cpu",
                   "--json", "r.json", "--overwrite"], inception)
    return json.loads(Path("r.json").read_text())


def table(printed: str) -> list[list[str]]:
    return [line.split() for line in printed[printed.index("training images"):].splitlines()]


# ---- distances ---------------------------------------------------------------------------------

def test_fid_end_to_end_with_a_stand_in_network(stand_in, samples, capsys):
    report = run(samples, "--real-baseline", "--inception", "network.pt", inception=stand_in)
    a = corners(read_arrays(samples)[0])
    b = corners(datasets.load("digits", "train").images)
    root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)).sum()
    traces = np.trace(np.cov(a.T) + np.cov(b.T))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root
    fake, real = report["results"]
    assert fake["FID"] == pytest.approx(expected, rel=1e-4)   # the network is in float32
    assert "FID" not in real   # of the real images to themselves it is 0
    assert table(capsys.readouterr().out)[0][-1] == "FID"


def test_the_distance_without_inception_is_never_called_fid(samples, monkeypatch, capsys):
    quick = functools.partial(evaluate.train_feature_classifier, steps=5)
    monkeypatch.setattr(evaluate, "train_feature_classifier", quick)
    report = run(samples, "--frechet")
    assert report["results"][0]["Frechet"] > 0
    assert "FID" not in capsys.readouterr().out + Path("r.json").read_text()


def test_real_statistics_are_cached_by_images_and_network(folder):
    images, calls = np.zeros((20, 4, 4, 1), np.uint8), []

    def features(images: np.ndarray) -> list[torch.Tensor]:
        calls.append(1)
        return [torch.eye(20)]

    first = evaluate.real_statistics("photos.zip", images, features, "a")
    again = evaluate.real_statistics("photos.zip", images, features, "a")
    assert len(calls) == 1
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    changed = images.copy()
    changed[0, 0, 0, 0] = 1
    evaluate.real_statistics("photos.zip", changed, features, "a")
    evaluate.real_statistics("photos.zip", images, features, "b")
    assert len(calls) == 3
    assert len(list((folder / "cache").glob("inception-photos-train-4-*.npz"))) == 3


def test_download_fetches_the_network_once(stand_in, samples, folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    arguments = samples, "--inception", "sub/fetched.pt", "--download"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/network.pt"
        report = run(*arguments, inception=stand_in._replace(url=address))
        server.shutdown()
    assert "FID" in report["results"][0]
    assert Path("sub/fetched.pt").read_bytes() == Path("network.pt").read_bytes()
    assert run(*arguments, inception=stand_in)["results"][0]["FID"] == report["results"][0]["FID"]


def test_a_failed_download_names_address_and_place(stand_in, folder):
    with pytest.raises(ValueError, match=r"cannot fetch http://127.0.0.1:9[^\n]*"
                                         r"put that file at \S*missing.pt"):
        evaluate.fetch_inception(folder / "missing.pt", stand_in)


def test_samples_without_classes_have_distances_only(folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "train_classifier", None)
    quick = functools.partial(evaluate.train_feature_classifier, steps=5)
    monkeypatch.setattr(evaluate, "train_feature_classifier", quick)
    zeros = np.zeros(40, np.int64)
    write_samples(folder / "all.npz", labels=zeros, classes=np.array([], str))
    write_samples(folder / "nameless.npz", labels=zeros, classes=None)
    for arguments in (["all.npz"], ["all.npz", "--by-number"], ["nameless.npz", "--by-number"]):
        [row] = run(*arguments, "--frechet", "--classifiers", "logreg", "mlp")["results"]
        assert row["accuracy"] == {} and row["Frechet"] > 0
        line = table(capsys.readouterr().out)[-1]
        assert line[1:-1] == ["40", "-", "-", "-"] and float(line[-1]) > 0


# ---- classes -----------------------------------------------------------------------------------

@pytest.fixture
def evaluated(folder, monkeypatch) -> Callable:
    """evaluated(own, real, *flags): what classifiers get of samples of the classes `own`.

    There are four of each. Real images of the classes `real` have the labels `numbers`,
    or one of each.
    """
    def labels_and_classes(own: list | None, real: list, *flags: str,
                           numbers: list | None = None) -> tuple[list[int], list[str]]:
        given, labels = [], np.arange(len(real)) if numbers is None else np.array(numbers)
        made = datasets.Dataset(np.zeros((len(labels), 32, 32, 1), np.uint8), labels, real)
        monkeypatch.setattr(datasets, "load", lambda *args: made)
        monkeypatch.setattr(evaluate, "measure", lambda train, *others: given.append(train) or {})
        write_samples(folder / "s.npz", labels=np.arange(40) // 4, classes=own)
        evaluate.main(["s.npz", "--real", "photos", *flags])
        return given[0].labels[::4].tolist(), given[0].classes

    return labels_and_classes


TEN = sorted(map(str, range(1, 11)))   # 1, 10, 2, ...


@pytest.mark.parametrize("own, real, labels", [
    (TEN, TEN, range(10)),
    (TEN, sorted(TEN, key=int), [0, 9, 1, 2, 3, 4, 5, 6, 7, 8]),   # '10' before '2', and behind
    (["é", "猫", *TEN[2:]], ["猫", *TEN[2:], "e\u0301"], [9, 0, 1, 2, 3, 4, 5, 6, 7, 8])])
def test_classes_are_matched_by_name(evaluated, own, real, labels):
    assert evaluated(own, real) == ([*labels], real)


@pytest.mark.parametrize("own", [TEN, None])
def test_numbers_count_where_they_are_meant(evaluated, own):
    real = list("abcdefghijk")   # samples may have fewer classes
    assert evaluated(own, real, "--by-number") == ([*range(10)], real)


@pytest.mark.parametrize("own, real, flags, complaint", [
    (["one", *TEN[1:]], TEN, [], "of s are not those of photos ('one' only in s; '1' only in "
                                 "photos): add --by-number"),
    (TEN, TEN[1:], [], "('1' only in s)"),
    (TEN, [*TEN, "a\nb"], [], "('a\\nb' only in photos)"),
    (TEN, list("abcdefghij"), [], "'1', '10', '2', '3', ... only in s; 'a', 'b', 'c', 'd', ..."),
    ([name.upper() for name in "abcdefghij"], list("abcdefghij"), [], "'A', 'B', 'C', 'D', ..."),
    (["é", "e\u0301", *TEN[2:]], ["é", *TEN[1:]], [], "s has two classes called 'é'"),
    (["é", *TEN[1:]], ["é", "e\u0301", *TEN[1:]], [], "photos has two classes called 'é'"),
    (None, TEN, [], "s.npz does not name its classes: sample again, or add --by-number"),
    (TEN, TEN[1:], ["--by-number"], "s has more classes than the 9 of photos"),
    (None, TEN[:9], ["--by-number"], "s has more classes than the 9 of photos"),
    (TEN[:9], TEN[:9], [], "s.npz has an entry 'classes' that is not sample.py's"),
    ([*range(10)], TEN, [], "s.npz has an entry 'classes'"),
    ([TEN], TEN, [], "s.npz has an entry 'classes'"),
    ([], TEN, [], "s holds samples of a model without classes, which have no accuracy: add"),
    ([], TEN, ["--by-number"], "s holds samples of a model without classes"),
])
def test_classes_that_differ_are_refused(evaluated, capsys, own, real, flags, complaint):
    assert complaint in refuse(capsys, lambda argv: evaluated(own, real, *argv), flags)


def test_classes_without_images_are_named(evaluated, capsys):
    evaluated(TEN, TEN)
    assert "no image" not in capsys.readouterr().out
    eleven = [*TEN, "elf"]
    evaluated(eleven, eleven, "--real-baseline", numbers=[0] * 33)
    assert "s has no image of 'elf'\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags, complaint", [
    (["--frechet"], "--frechet needs at least two test images, and photos has 1"),
    (["--inception", "x.pt"], "--inception needs at least two training images, and photos has 1")])
def test_one_real_image_has_no_covariance(evaluated, capsys, flags, complaint):
    message = refuse(capsys, lambda argv: evaluated(TEN, ["a"], *argv, numbers=[0]), flags)
    assert complaint in message


# ---- the report --------------------------------------------------------------------------------

def test_json_holds_every_number_and_where_it_is_from(samples, capsys):
    evaluate.main([str(samples), "--real-baseline", "--classifiers", "logreg", "mlp", "--seeds",
                   "3", "--epochs", "2", "--json", "r.json"])
    report, lines = json.loads(Path("r.json").read_text()), table(capsys.readouterr().out)
    assert report["command"].startswith("python evaluate.py ")
    assert "--epochs 2" in report["command"]
    assert report["versions"]["torch"] == torch.__version__
    assert (report["real"], report["test_images"], report["seeds"]) == ("digits", 50, 3)
    synthetic, baseline = report["results"]
    assert synthetic["origin"] == ORIGIN and baseline["origin"] == {"real": True}
    assert (synthetic["images"], baseline["images"]) == (40, 150)
    for result, line in ((synthetic, lines[1]), (baseline, lines[2])):
        for name in ("logreg", "mlp"):
            found = result["accuracy"][name]
            assert len(found["scores"]) == 3
            assert found["mean"] == pytest.approx(np.mean(found["scores"]))
            assert found["spread"] == pytest.approx(np.std(found["scores"], ddof=1))
            assert found["steps"] == -(-2 * result["images"] * 9 // 10 // 128)
            assert f"{found['mean']:.2%}" in line
    assert lines[1][:3] == ["eps2", "40", "1.98"] and lines[2][2:4] == ["150", "-"]


def test_json_is_written_after_every_row(samples, monkeypatch):
    measure, rows = evaluate.measure, []

    def fail_at_the_second(*args):
        rows.append(1)
        if len(rows) == 2:
            raise RuntimeError("power cut")
        return measure(*args)

    monkeypatch.setattr(evaluate, "measure", fail_at_the_second)
    with pytest.raises(RuntimeError):
        run(samples, "--real-baseline")
    assert [r["name"] for r in json.loads(Path("r.json").read_text())["results"]] == ["eps2"]


def test_an_infinite_epsilon_is_valid_json(folder, capsys):
    """It is that of a run whose noise follows from a seed."""
    path = write_samples(folder / "seeded.npz", origin=json.dumps({**ORIGIN, "epsilon": math.inf}))
    run(path, "--classifiers", "logreg")
    report = json.loads(Path("r.json").read_text(), parse_constant=pytest.fail)
    assert report["results"][0]["origin"] == {**ORIGIN, "epsilon": "Infinity"}
    assert table(capsys.readouterr().out)[1][2] == "inf"
    assert "logreg" in caption([ORIGIN], [Path("r.json")])   # sample.py reads it


def test_rows_have_names_that_differ(folder, capsys):
    for name in ("a/s.npz", "b/s.npz", "real digits.npz", "t.npz"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_samples(folder / name)
    report = run("a/s.npz", "b/s.npz", "real digits.npz", "t.npz", "--real-baseline",
                 "--classifiers", "logreg")
    assert [row["name"] for row in report["results"]] == [
        "a/s.npz", "b/s.npz", "real digits.npz", "t", "real digits"]


def test_a_row_is_one_line_whatever_its_name(folder, capsys):
    run(write_samples(folder / "a\nb.npz"), "--classifiers", "logreg")
    assert table(capsys.readouterr().out)[1][:2] == ["a\\nb", "40"]


# ---- refusals ----------------------------------------------------------------------------------

# What sample.py never says of where samples are from.
STRANGE = ["[" * 100_000, "{" * 100_000, '{"a": [[[[[[1]]]]]]}', '{"real": true}', *(
    f'{{"epsilon": {value}}}' for value in (
        '"x"', '"3"', '{"a": 1}', "[2]", "-1", "-Infinity", "NaN", "1" + 400 * "0"))]


@pytest.fixture
def files(samples, folder):
    """The files that the table below names."""
    write_samples(folder / "small.npz", 16)
    write_samples(folder / "fractions.npz", labels=np.arange(40) / 3)
    write_samples(folder / "words.npz", labels=np.array(["a"] * 40))
    write_samples(folder / "negative.npz", labels=np.arange(40) - 1)
    write_samples(folder / "beyond.npz", labels=np.full(40, 2**64 - 1, np.uint64))
    write_samples(folder / "fewer.npz", labels=np.arange(39) % 10)
    np.savez(folder / "nine.npz", images=np.zeros((9, 32, 32, 1), np.uint8), labels=np.arange(9))
    for name, origin in (("no-json", "private.pt"), ("number", "3"), ("list", '["a"]'),
                         *((f"origin{k}", text) for k, text in enumerate(STRANGE)),
                         ("captions", '{"prompts": ["a thin digit 7"]}')):
        write_samples(folder / f"{name}.npz", origin=origin)
    (folder / "report.json").write_text('{"test_images": 50}')
    (folder / "notes.json").write_text("{}")
    (folder / "other.pt").write_bytes(b"another network")


NPZ = "must hold uint8 images [n, H, W, C] and integer labels [n] from 0 up, at least 10"


@pytest.mark.parametrize("arguments, complaint", [
    ("", "nothing to do: give .npz files of sample.py, or --real-baseline"),
    ("eps2.npz --epochs 0", "--epochs positive"),
    ("eps2.npz --epochs nan", "--epochs positive"),
    ("eps2.npz --steps 0", "--steps must be at least 1"),
    ("eps2.npz --seeds 0", "--seeds and --steps must be at least 1"),
    ("eps2.npz --steps 5 --epochs 1", "not allowed with"),
    ("eps2.npz --classifiers oracle", "invalid choice: 'oracle'"),
    ("eps2.npz --classifiers logreg wrn --wrn 11 1", "--wrn must be a depth of 10, 16, 22"),
    ("small.npz --classifiers cnn", "the cnn needs images of at least 18x18, not 16x16"),
    ("eps2.npz --json report.json", "report.json exists: give another name, or --overwrite"),
    ("eps2.npz --json notes.json --overwrite", "notes.json was not made by this program"),
    ("eps2.npz --json eps2.npz --overwrite", "eps2.npz must be the name of a .json file"),
    ("eps2.npz --json other.pt/r.json", "other.pt/r.json cannot be written"),
    ("eps2.npz --inception other.pt/i.pt --download", "other.pt/i.pt cannot be written"),
    ("eps2.npz --inception x.json --download --json x.json", "x.json would be written twice"),
    ("eps2.npz --inception report.json --json report.json --overwrite",
     "report.json is what this command reads"),
    ("eps2.npz --device nowhere", "device 'nowhere' cannot be used here"),
    ("eps2.npz --download", "--download needs --inception FILE"),
    ("eps2.npz --inception missing.pt", "missing.pt does not exist: add --download, or fetch "
                                        + evaluate.INCEPTION.url),
    ("eps2.npz --inception other.pt", "other.pt is damaged or another network"),
    ("eps2.npz --real nonsense", "unknown data 'nonsense'"),
    ("missing.npz", "missing.npz is no readable .npz of images and labels"),
    ("fractions.npz", f"fractions.npz {NPZ}"),
    ("words.npz", f"words.npz {NPZ}"),
    ("negative.npz", f"negative.npz {NPZ}"),
    ("beyond.npz", f"beyond.npz {NPZ}"),
    ("fewer.npz", f"fewer.npz {NPZ}"),
    ("nine.npz", f"nine.npz {NPZ}"),
    ("no-json.npz", "no-json.npz has an entry 'origin' that is not sample.py's"),
    ("number.npz", "number.npz has an entry 'origin'"),
    ("list.npz", "list.npz has an entry 'origin'"),
    *((f"origin{k}.npz", f"origin{k}.npz has an entry 'origin'") for k in range(len(STRANGE))),
    ("eps2.npz --inception .", ". is no file: give the name of one"),
    ("eps2.npz --inception . --download", ". is no file"),
    ("captions.npz", "captions.npz holds samples of captions"),
    ("eps2.npz small.npz", "small has images of the shape (16, 16, 1), where those of digits are "
                           "converted to (32, 32, 1)"),
    ("--real letters --real-baseline", "real letters has 9 images: a tenth of them is held out"),
])
def test_bad_input_is_refused_before_training(files, monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(evaluate, "optimise", None)
    assert complaint in refuse(capsys, evaluate.main, arguments.split())
