"""--train: what the private stage fine-tunes, and that nothing else of the public model changes."""

import pytest
import torch
from test_ledger import arguments, crash, interrupt, public, refused, run  # noqa: F401

import sample
import train
from ldm import load_checkpoint, with_lora
from unet import PRIVATE_PARTS

BELONGS = {   # an excerpt of every kind of name, and the choices that train it
    ".transformer_blocks.0.attn1.to_q.weight": {"attention", "all"},
    ".attn1.to_q.lora.0.weight": {"lora"},
    ".proj_in.weight": {"attention", "all"},
    ".in_layers.2.weight": {"resblocks", "all"},
    ".emb_layers.1.bias": {"resblocks", "all"},
    "unet.time_embed.0.weight": {"all"},
    "unet.out.2.weight": {"all"},
    "embedder.embedding.weight": {*PRIVATE_PARTS},
    "vae.encoder.conv_in.weight": set(),
}


@pytest.mark.parametrize("parts", PRIVATE_PARTS)
def test_what_is_chosen_is_trained_and_nothing_else(public, tmp_path, parts):  # noqa: F811
    run(public, tmp_path, "--train", parts, "--lora-rank", 2)
    before = load_checkpoint(public / "public.pt")[0]
    before = (with_lora(before, 2, 0) if parts == "lora" else before).state_dict()
    after = load_checkpoint(tmp_path / "private-eps3.pt")[0].state_dict()
    before["embedder.embedding.weight"] = before["embedder.embedding.weight"] / after["embedder.scale"]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])} - {"embedder.scale"}
    for part, choices in BELONGS.items():
        names = {name for name in before if part in name}
        assert names or ".lora." in part
        assert changed & names == (names if parts in choices else set()), part
    sample.main([str(tmp_path / "private-eps3.pt"), "--grid", str(tmp_path / "grid.png"), "--columns", "1"])


def test_adding_lora_changes_no_output_and_follows_the_seed(public):  # noqa: F811
    model = load_checkpoint(public / "public.pt")[0]
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(3, 4, 2, 2, generator=generator), torch.tensor([1, 500, 900]),
             torch.randn(3, 4, 2, 2, generator=generator), torch.tensor([0, 1, 2]))
    one, same, other = (with_lora(model, 2, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(one(*batch), model(*batch), rtol=0, atol=0)
    down = next(name for name in one.state_dict() if name.endswith("lora.0.weight"))
    assert torch.equal(one.get_parameter(down), same.get_parameter(down))
    assert not torch.equal(one.get_parameter(down), other.get_parameter(down))


def test_a_run_with_lora_is_resumed_and_fine_tuned_again(public, tmp_path, interrupt, capsys):  # noqa: F811
    lora = ("--train", "lora", "--lora-rank", 2)
    interrupt(7, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.main(arguments(public, tmp_path, *lora))
    assert "--train lora" in refused(capsys, public, tmp_path, "--resume")
    run(public, tmp_path, *lora, "--resume")
    first = load_checkpoint(tmp_path / "private-eps3.pt")[1]
    assert [entry["steps"] for entry in first["ledger"]] == [12]
    for more in (lora, ()):   # the same low-rank weights go on, or those around them
        out = tmp_path / f"again{len(more)}"
        again = arguments(public, out, *more, "--eps", 5)
        again[again.index("--public-checkpoint") + 1] = str(tmp_path / "private-eps3.pt")
        train.main(again)
        assert [entry["steps"] for entry in load_checkpoint(out / "private-eps5.pt")[1]["ledger"]] == [12, 12]
