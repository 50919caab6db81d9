"""Where private classes start: namesakes, lookalikes, or the mean of the public classes."""

import string

import numpy as np
import pytest
import torch

from ldm import LatentDiffusion, sample_t_and_noise
from runtime.classes import match_classes, new_class_embedder
from tiny import tiny_data, tiny_model

LETTERS = [*string.ascii_uppercase, *string.ascii_lowercase]
TURNED = ["E mirrored", "h turned", "L turned"]
SHAPES = ["circle", "triangle", "square", "diamond"]


@pytest.fixture
def model() -> LatentDiffusion:
    return tiny_model()


# ---- which class from which --------------------------------------------------------------------

@pytest.mark.parametrize("private, public, starts", [
    (string.digits, LETTERS, "OlZBASbTBq"),
    (string.digits, string.ascii_uppercase, "OLZBASBTBQ"),   # only capitals are known
    ("347", [*LETTERS, *TURNED], TURNED),   # more alike than upright letters
    (["hexagon", "heart", "cross", "star"], SHAPES, SHAPES),
    (["star", "8"], ["8", "star", "B", "diamond"], ["star", "8"])])   # namesakes come first
def test_classes_start_as_the_most_alike(private, public, starts):
    public = list(public)
    assert [public[k] for k in match_classes(list(private), public)] == list(starts)


@pytest.mark.parametrize("private", [["cat"], ["0", "cat"]])
def test_without_a_counterpart_there_is_no_match(private):
    assert match_classes(private, LETTERS) is None


# ---- the new embedder --------------------------------------------------------------------------

def test_new_classes_start_as_chosen_public_ones(model):
    new = new_class_embedder(model, [2, 0, 0, 1, 2], 5)
    old = model.embedder.embedding.weight
    # The null class stays last.
    torch.testing.assert_close(new.embedder.embedding.weight.double(), old[[2, 0, 0, 1, 2, 3]])
    assert new.embedder.null_class == 5 and new.architecture["num_classes"] == 5


def test_without_a_choice_they_start_as_the_mean(model):
    rows = new_class_embedder(model, None, 2).embedder.embedding.weight.double()
    old = model.embedder.embedding.weight
    mean = (old[0] + old[1] + old[2]) / 3   # without the null class
    torch.testing.assert_close(rows, torch.stack([mean, mean, old[3]]))


def test_they_embed_as_before_in_other_units(model):
    expected = model.embedder(torch.tensor([1, 3]))
    model.embedder.rescale(30.0)
    new = new_class_embedder(model, [1, 1], 2)
    torch.testing.assert_close(new.embedder(torch.tensor([0, 2])).double(), expected)
    assert new.embedder.scale == 1


def test_the_public_model_stays_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = new_class_embedder(model, [0], 1)
    for p in new.parameters():
        p.data.zero_()
    assert model.architecture["num_classes"] == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_new_classes_change_nothing_else(model):
    model.float()
    new = new_class_embedder(model, [1], 1)
    z_0, labels = tiny_data(4)
    batch = sample_t_and_noise(model, z_0.float(), labels, 1, 0.0, np.random.default_rng(0))
    z_0, t, eps, labels = (x[:, 0] for x in batch)
    assert torch.equal(new(z_0, t, eps, 0 * labels), model(z_0, t, eps, 0 * labels + 1))


@pytest.mark.parametrize("setting", ["text.length=6", "unet.context_dim=0"])
def test_a_model_without_classes_keeps_its_embedder(setting):
    model = tiny_model(setting)
    new = new_class_embedder(model, None, 7)
    assert new is not model and new.architecture["num_classes"] == 7
    assert type(new.embedder) is type(model.embedder)
    torch.testing.assert_close(new.state_dict(), model.state_dict(), rtol=0, atol=0)
