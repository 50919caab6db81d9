"""LoRA: outputs and weights stay, additions are what they are named, runs go on with them."""

from pathlib import Path

import pytest
import torch
from oracles.official import randn
from torch import nn

import train
from ldm import EMA, LatentDiffusion
from runtime.checkpoints import build_model, load_checkpoint
from tiny import FLAGS, refuse, tiny_model, write_images
from variants.lora import add_lora

MODELS = {"conditional": "unet.context_dim=8", "unconditional": "unet.context_dim=0"}


@pytest.fixture(params=MODELS)
def model(request) -> LatentDiffusion:
    return tiny_model(MODELS[request.param])


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    z_0, eps = randn(3, 4, 4, 4).double(), randn(3, 4, 4, 4, seed=2).double()
    return z_0, torch.tensor([1, 500, 900]), eps, torch.tensor([0, 1, 2])


def downs(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(".lora.0.weight")]


def test_adding_it_changes_no_output_and_no_weight(model, batch):
    before, losses = {k: v.clone() for k, v in model.state_dict().items()}, model(*batch)
    add_lora(model.unet, rank=2)
    assert torch.equal(model(*batch), losses)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    new = [name for name in after if name not in before]
    assert new and all(".lora." in name for name in new)


@pytest.mark.parametrize("context_dim, expected", [
    (8, {f"{attn}.{layer}" for attn in ("attn1", "attn2")
         for layer in ("to_q", "to_k", "to_v", "to_out.0")}), (0, {"qkv", "proj_out"})])
def test_every_projection_of_the_attention_has_it(context_dim, expected):
    model = tiny_model(f"unet.context_dim={context_dim}")
    add_lora(model.unet, rank=2)
    middle = {name for name, layer in model.unet.middle_block[1].named_modules()
              if hasattr(layer, "lora")}
    assert {name.removeprefix("transformer_blocks.0.") for name in middle} == expected
    blocks = 4   # attention modules of the tiny model
    assert len(downs(model)) == blocks * len(expected)
    assert all(len(down) == 2 for down in downs(model))


def test_the_addition_is_up_of_down(model, batch):
    add_lora(model.unet, rank=2)
    nn.init.normal_(owner_of_lora(model).lora[1].weight)
    with_lora = model(*batch)
    layer = owner_of_lora(model)
    product = layer.lora[1].weight @ layer.lora[0].weight
    layer.weight.data += product.reshape(layer.weight.shape)
    nn.init.zeros_(layer.lora[1].weight)
    torch.testing.assert_close(model(*batch), with_lora)


def owner_of_lora(model: LatentDiffusion) -> nn.Module:
    """One of the layers that the output depends on: the first attention's output projection."""
    attention = model.unet.middle_block[1]
    if hasattr(attention, "qkv"):
        return attention.proj_out
    return attention.transformer_blocks[0].attn1.to_out[0]


def test_down_follows_the_seed_and_nothing_else(model):
    drawn = {}
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        copy = build_model(model.architecture)
        torch.manual_seed(state)
        add_lora(copy.unet, 2, seed)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(state).get_state())
        drawn[seed, state] = downs(copy)
    for one, same, other in zip(*drawn.values(), strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_model_on_the_meta_device_stays_there(model):
    with torch.device("meta"):
        described = build_model({**model.architecture, "lora_rank": 2})
    assert downs(described) and all(p.is_meta for p in described.parameters())


# ---- runs --------------------------------------------------------------------------------------

@pytest.fixture
def arguments(tmp_path):
    """The arguments of a private run: a function (output folder, *flags, public checkpoint)."""
    private = write_images(tmp_path / "private", [12, 12], seed=1)
    public = write_images(tmp_path / "public", [6, 6], seed=0)
    data = ["--public-data", str(public), "--private-data", str(private), *FLAGS]
    train.main(["--stage", "public", "--out", str(tmp_path), *data])

    def of_run(out: str, *flags: str, start: Path = tmp_path / "public.pt") -> list[str]:
        return ["--out", str(tmp_path / out), "--public-checkpoint", str(start), *data, *flags]

    return of_run


def test_a_stopped_run_goes_on_and_is_fine_tuned_again(arguments, tmp_path, monkeypatch, capsys):
    lora = "--trainable", "lora", "--set", "private.lora_rank=2"
    update = EMA.update

    def power_cut(ema: EMA, parameters: dict) -> None:
        if ema.step == 7:
            raise RuntimeError("power cut")
        update(ema, parameters)

    monkeypatch.setattr(EMA, "update", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train.main(arguments("first", *lora))
    monkeypatch.undo()
    capsys.readouterr()
    assert "trainable" in refuse(capsys, train.main, arguments("first", "--resume"))
    train.main(arguments("first", *lora, "--resume"))
    first = tmp_path / "first" / "private-eps3.pt"
    model, metadata = load_checkpoint(first)
    assert [entry["steps"] for entry in metadata["ledger"]] == [12]
    assert model.architecture["lora_rank"] == 2
    for out, flags in (("lora", lora), ("attention", ())):   # the additions go on, or all goes on
        train.main(arguments(out, *flags, "--eps", "5", start=first))
        again, metadata = load_checkpoint(tmp_path / out / "private-eps5.pt")
        assert [entry["steps"] for entry in metadata["ledger"]] == [12, 12]
        after = again.unet.state_dict()
        changed = {name for name, tensor in model.unet.state_dict().items()
                   if not torch.equal(tensor, after[name])}
        assert changed and all(".lora." in name for name in changed) == (out == "lora")
