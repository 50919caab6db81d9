"""evaluate.py's classifiers: as in the literature, and never chosen by test images."""

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
from datasets import Dataset, glyphs
from ldm import normalize_images
from variants.fid import frechet_distance, mean_and_covariance

CPU = torch.device("cpu")


def two_kinds(count: int, seed: int, flipped: float = 0.0) -> Dataset:
    """Noise that is brighter on the left (0) or on the right (1); a share of labels is wrong."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.integers(0, 200, (count, 20, 20, 1))
    images[labels == 0, :, :10] += 25
    images[labels == 1, :, 10:] += 25
    labels = np.where(rng.random(count) < flipped, 1 - labels, labels)
    return Dataset(images.astype(np.uint8), labels, ["0", "1"])


@pytest.fixture
def batches(monkeypatch):
    """All arrays of images that were made into floats."""
    seen = []
    monkeypatch.setattr(evaluate, "normalize_images", lambda images, device: (
        seen.append(images), normalize_images(images, device))[1])
    return seen


# ---- networks ----------------------------------------------------------------------------------

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
    train, test = two_kinds(300, 0), two_kinds(100, 1)
    assert evaluate.train_and_test(name, train, test, 0, 40, CPU, (10, 1)) > 0.8


# ---- what is chosen by what --------------------------------------------------------------------

class Watched(Dataset):
    """A data set that notes whenever its images or labels are asked for."""

    def __getattribute__(self, name):
        if name in ("images", "labels"):
            object.__getattribute__(self, "__dict__").setdefault("log", []).append(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("name", ["small-cnn", "logreg"])
def test_test_images_are_looked_at_once_after_training(name, monkeypatch):
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
    opposite = Dataset(test.images, 1 - test.labels, test.classes)
    scores = [evaluate.train_and_test(name, train, t, 0, 20, CPU) for t in (test, opposite)]
    assert 0.5 < scores[0] < 1.0 and sum(scores) == pytest.approx(1.0)


def test_no_gradient_comes_from_the_held_out_tenth(batches):
    train = two_kinds(200, 0)
    train.images[:, 0, 0, 0] = np.arange(200)   # every image tells its number
    evaluate.train_classifier("logreg", train, 2, 0, 60, CPU)
    batch = evaluate.RECIPES["logreg"].batch
    trained_on = {n for x in batches if len(x) == batch for n in x[:, 0, 0, 0]}
    scored_on = {n for x in batches if len(x) != batch for n in x[:, 0, 0, 0]}
    assert len(scored_on) == 20 and len(trained_on) == 180 and not trained_on & scored_on


def test_the_snapshot_with_the_best_held_out_score_is_kept(monkeypatch):
    weights, scores = [], iter([0.1, 0.2, 0.9, 0.3, 0.3, 0.8, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(evaluate, "accuracy", lambda model, images, labels: (
        weights.append(model[1].weight.detach().clone()), next(scores))[1])
    model = evaluate.train_classifier("logreg", two_kinds(100, 0), 2, 0, 30, CPU)
    assert len(weights) == 10 and torch.equal(model[1].weight, weights[2])


def test_images_stay_uint8_except_for_one_batch(batches):
    train, test = two_kinds(5_000, 0), two_kinds(1_001, 1)
    evaluate.train_and_test("logreg", train, test, 0, 10, CPU)
    sizes = [len(x) for x in batches]
    assert max(sizes) <= 250 and sum(sizes) == 10 * 128 + 10 * 500 + 1_001


# ---- accuracy ----------------------------------------------------------------------------------

def test_accuracy_counts_every_image():
    images, labels = np.zeros((503, 4, 4, 1), np.uint8), np.zeros(503, np.int64)
    labels[250:300] = 1
    always_zero = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(always_zero[1].weight)
    always_zero[1].bias.data = torch.tensor([1.0, 0.0])
    assert evaluate.accuracy(always_zero, images, labels) == 453 / 503


def test_only_training_drops_out():
    drops_all = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(16, 2, bias=False))
    # Black images are -1 everywhere: class 1 unless all is dropped.
    nn.init.constant_(drops_all[2].weight[0], 1.0)
    nn.init.zeros_(drops_all[2].weight[1])
    black = Dataset(np.zeros((300, 4, 4, 1), np.uint8), np.ones(300, np.int64), ["0", "1"])
    assert evaluate.accuracy(drops_all, black.images, black.labels) == 1.0
    before = drops_all[2].weight.detach().clone()
    list(evaluate.optimise(drops_all, black, torch.arange(300), evaluate.RECIPES["cnn"], 2))
    assert torch.equal(drops_all[2].weight, before)   # no gradient comes through the dropout


# ---- the feature classifier --------------------------------------------------------------------

def test_a_feature_classifiers_distance_grows_with_the_difference():
    images, labels = glyphs.render("01", glyphs.STYLES["digits"], 300, seed=5)
    real = Dataset(images[..., None], labels, ["0", "1"])
    classifier = evaluate.train_feature_classifier(real, CPU, steps=40)
    features, seen = evaluate.features_and_predictions(classifier, real.images)
    assert features.shape == (300, 512) and np.mean(seen == labels) > 0.9
    one, other = mean_and_covariance([features[:150]]), mean_and_covariance([features[150:]])
    inverted = mean_and_covariance(
        evaluate.classifier_features(classifier, 255 - real.images[150:]))
    assert frechet_distance(*one, *other) < 0.3 * frechet_distance(*one, *inverted)
