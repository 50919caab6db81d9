"""Which parameters the private stage trains, for every choice of `trainable`."""

import numpy as np
import pytest
import torch
from oracles.official import build, oracle
from torch import nn

import dp_sgd
from ldm import ClassEmbedder
from tiny import (
    ATTENTION,
    EMBEDDER,
    SCALE,
    TRANSFORMER,
    WITHOUT_EFFECT,
    configure,
    parameters_of,
    tiny_data,
    tiny_model,
)
from train import train_private
from unet import AttentionBlock, SpatialTransformer, UNet
from variants.lora import add_lora
from variants.trainable import private_parameter_names

CHOICES = ["last:1", "from:1", "resblocks", "all", "lora", "lora:last:1"]


# ---- the choices -------------------------------------------------------------------------------

@pytest.mark.parametrize("trainable, modules", [
    ("last:4", ATTENTION), ("from:0", ATTENTION), ("last:1", ATTENTION[3:]),
    ("last:3", ATTENTION[1:]), ("from:1", ATTENTION[1:]), ("from:3", ATTENTION[3:]),
    ("last:0", []), ("from:4", [])])
def test_attention_is_counted_from_the_input(trainable, modules):
    model = tiny_model()
    one, two = (private_parameter_names(model, tokens, trainable) for tokens in (1, 2))
    assert len(one) == len({*one}) and len(two) == len({*two})
    assert {*one} == parameters_of(modules, TRANSFORMER) | EMBEDDER
    assert {*two} == parameters_of(modules, TRANSFORMER | WITHOUT_EFFECT) | EMBEDDER


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("flags", [[], ["unet.context_dim=0"]])
def test_the_default_is_the_ground_s_choice(tokens, flags):
    model = tiny_model(*flags)
    names = private_parameter_names(model, tokens)
    assert names == dp_sgd.private_parameter_names(model, tokens)


def test_attention_blocks_are_trained_whole():
    parts = {"norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "proj_out.weight",
             "proj_out.bias"}
    names = private_parameter_names(tiny_model("unet.context_dim=0"), trainable="last:2")
    assert {*names} == parameters_of(ATTENTION[2:], parts)


BELONGS = {   # an excerpt of every kind of name, and the choices that train it
    ".transformer_blocks.0.attn1.to_q.weight": {"attention", "all"},
    ".proj_in.weight": {"attention", "all"},
    ".attn1.to_q.lora.0.weight": {"attention", "lora", "all"},
    ".attn2.to_q.lora.0.weight": set(),   # no effect with one context token
    ".in_layers.2.weight": {"resblocks", "all"},
    ".emb_layers.1.bias": {"resblocks", "all"},
    "unet.time_embed.0.weight": {"all"},
    "unet.out.2.weight": {"all"},
    "embedder.embedding.weight": {"attention", "lora", "resblocks", "all"},
    "vae.encoder.conv_in.weight": set(),
}


@pytest.mark.parametrize("trainable", ["attention", "lora", "resblocks", "all"])
def test_each_choice_trains_all_of_its_kind(trainable):
    model = tiny_model()
    add_lora(model.unet, rank=2)
    chosen = {*private_parameter_names(model, trainable=trainable)}
    for part, choices in BELONGS.items():
        names = {name for name in model.state_dict() if part in name}
        assert names and chosen & names == (names if trainable in choices else set()), part


def test_lora_of_the_last_modules():
    model = tiny_model()
    add_lora(model.unet, rank=2)
    names = {*private_parameter_names(model, 2, "lora:last:2")} - EMBEDDER
    every = {*private_parameter_names(model, 2, "lora")}
    assert names == {name for name in every if name.startswith(tuple(ATTENTION[2:]))}
    assert names == {*private_parameter_names(model, 2, "lora:from:2")} - EMBEDDER


@pytest.mark.parametrize("trainable", [
    "", "none", "ALL", "all:1", "last", "last:", "last:5", "from:5", "last:-1", "last:1.5",
    "from:two", "first:1", "3", "last:1:1", "lora:", "lora:all", "lora:attention", "lora:lora",
    "lora:last:5", "resblocks:last:1"])
def test_nonsense_is_refused(trainable):
    with pytest.raises(ValueError, match="attention, last:K") as refused:
        private_parameter_names(tiny_model(), trainable=trainable)
    assert "--" not in str(refused.value)


# ---- against the authors' code -----------------------------------------------------------------

def meta_unet(case: dict) -> nn.ModuleDict:
    with torch.device("meta"):   # nothing is allocated
        return nn.ModuleDict({"unet": build(UNet, case["unet"])})


def count(model: nn.Module, trainable: str = "attention", context_tokens: int = 2) -> int:
    return sum(model.get_parameter(name).numel()
               for name in private_parameter_names(model, context_tokens, trainable))


@pytest.mark.parametrize("setting", [
    "mnist", "cifar10", "celeba32", "celeba64", "celebahq256-class", "text2img256"])
def test_counts_equal_the_authors(setting):
    case = oracle("architectures.json")["settings"][setting]
    model, expected = meta_unet(case), case["ablation"]["-1"]
    assert sum(p.numel() for p in model.parameters()) == case["unet"]["total_params"]
    # The authors train to_q, to_k and norm2 as well, as one must for more than one context token.
    assert count(model) == expected["unet_trainable"]
    idle = case["unet"].get("params_without_effect_if_context_length_1", 0)
    assert count(model, context_tokens=1) == expected["unet_trainable"] - idle
    if case["conditioning"] and "n_classes" in (params := case["conditioning"]["params"]):
        # One row fewer, since this embedder adds the null class.
        model["embedder"] = ClassEmbedder(params["n_classes"] - 1, params["embed_dim"])
        assert count(model) == expected["optimizer_total"]


@pytest.mark.parametrize("setting", ["mnist", "celeba32"])
def test_the_modules_and_their_sizes_are_the_authors(setting):
    case = oracle("architectures.json")["settings"][setting]
    model, (names, sizes) = meta_unet(case), zip(*case["unet"]["attention_modules"], strict=True)
    assert [name for name, module in model["unet"].named_modules()
            if isinstance(module, AttentionBlock | SpatialTransformer)] == [*names]
    for k in range(len(sizes) + 1):
        assert count(model, f"from:{k}") == sum(sizes[k:])
        assert count(model, f"last:{k}") == sum(sizes[len(sizes) - k:])


def test_from_k_is_the_authors_ablation():
    case = oracle("architectures.json")["settings"]["cifar10"]
    model, expected = meta_unet(case), case["ablation"]["9"]
    names = private_parameter_names(model, 2, "from:8")   # the authors' 9 skips 8 of 16 modules
    assert count(model, "from:8") == expected["unet_trainable"]
    assert names[0].startswith(f"unet.{expected['first_trained']}.")
    last = f"last:{expected['attention_modules_trained']}"
    assert names == private_parameter_names(model, 2, last)


# ---- training ----------------------------------------------------------------------------------

@pytest.mark.parametrize("trainable", CHOICES)
def test_exactly_the_chosen_parameters_change(trainable):
    model = tiny_model()
    if trainable.startswith("lora"):
        add_lora(model.unet, rank=2)
    names = private_parameter_names(model, trainable=trainable)
    plan = dp_sgd.PrivacyPlan(num_examples=4, expected_batch=4, steps=2, noise_multiplier=0.7,
                              max_grad_norm=1.0, delta=1e-5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_private(model, *tiny_data(4), names, plan, configure(), np.random.default_rng(0))
    after = model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*names} | SCALE
