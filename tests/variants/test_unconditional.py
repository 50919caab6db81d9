"""Models without a condition: NoEmbedder beside a U-Net of AttentionBlocks."""

import pytest
import torch

import dp_sgd
import train
from ldm import LatentDiffusion, sample_t_and_noise
from tiny import ATTENTION, configure, parameters_of, tiny_data, tiny_model
from variants.unconditional import NoEmbedder


@pytest.fixture
def model() -> LatentDiffusion:
    return tiny_model("unet.context_dim=0")


def test_labels_make_no_difference(model):
    assert isinstance(model.embedder, NoEmbedder)
    assert not any("embedder" in name for name in model.state_dict())
    z_0, labels = tiny_data(4)
    batch = sample_t_and_noise(model, z_0, labels, 1, 0.0, dp_sgd.secure_generator(0))
    z_0, t, eps, labels = (x[:, 0] for x in batch)
    assert torch.equal(model(z_0, t, eps, labels), model(z_0, t, eps, 2 - labels))


def test_all_its_names_are_conditions(model):
    assert model.embedder.conditions(["all"]).tolist() == [0]


@torch.inference_mode()
def test_guidance_changes_nothing_and_costs_nothing(model):
    calls, labels = [], torch.zeros(2, dtype=torch.long)
    model.float().unet.register_forward_hook(lambda *arguments: calls.append(1))
    images = [model.generate(labels, 3, guidance=w, generator=torch.Generator().manual_seed(0))
              for w in (1.0, 4.0)]
    assert images[0].shape == (2, 8, 8, 1)
    assert torch.equal(*images) and len(calls) == 2 * 3


def test_the_private_stage_trains_attention_whole(model):
    """Two steps without noise: what has a gradient changes, and nothing else."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    z_0, labels = tiny_data(4)
    train.train_private(model, z_0, 0 * labels, dp_sgd.private_parameter_names(model),
                        dp_sgd.PrivacyPlan(4, 4, 2, 0.0, 0.5, 1e-5),
                        configure("unet.context_dim=0"), dp_sgd.secure_generator(0))
    changed = {name for name, x in model.state_dict().items() if not torch.equal(before[name], x)}
    parts = {"norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "proj_out.weight",
             "proj_out.bias"}
    assert changed == parameters_of(ATTENTION, parts)
