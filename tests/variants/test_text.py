"""Models of captions: tokens, text encoder, null caption, prompts, and their private stage."""

import pytest
import torch
from torch import nn

import dp_sgd
import train
from ldm import LatentDiffusion, sample_t_and_noise
from runtime.classes import LOOKALIKES
from tiny import (
    ATTENTION,
    SCALE,
    TRANSFORMER,
    WITHOUT_EFFECT,
    configure,
    flat,
    parameters_of,
    tiny_data,
    tiny_model,
)
from variants import ghost
from variants.lora import add_lora
from variants.text import check_prompts, tokenise
from variants.trainable import private_parameter_names

L = 6
TEXT = [f"text.length={L}", "text.layers=2"]


def text_model() -> LatentDiffusion:
    return tiny_model(*TEXT)


def captions(count: int) -> torch.Tensor:
    return tokenise([f"a{k % 3} {'xyz'[k % 3]}" for k in range(count)], L)


def draws(count: int, K: int, dropout: float = 0.3) -> tuple[torch.Tensor, ...]:
    batch = sample_t_and_noise(text_model(), tiny_data(count)[0], captions(count), K, dropout,
                               dp_sgd.secure_generator(0))
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


# ---- tokens ------------------------------------------------------------------------------------

def test_a_caption_s_tokens_are_bytes_and_padding():
    tokens = tokenise(["ab", "", "é!", "ééé"], 5)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [[97, 98, 256, 256, 256], [256] * 5, [0xc3, 0xa9, 33, 256, 256],
                               [0xc3, 0xa9, 0xc3, 0xa9, 0xc3]]


def test_text_that_has_no_bytes_is_refused():
    with pytest.raises(ValueError, match="^caption number 2 is not valid UTF-8 text$"):
        tokenise(["fine", "\ud800"], 5)


@pytest.mark.parametrize("prompt, complaint", [
    ("", "0 bytes: give from 1 to 6"), ("  ", "2 bytes"), ("sevenths", "8 bytes"),
    ("ééé!", "7 bytes"), ("\udcff", "not UTF-8")])
def test_bad_prompts_are_refused_in_one_line(prompt, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        check_prompts(["fine", prompt], L)
    assert "\n" not in str(error.value)


def test_a_prompt_may_fill_the_whole_length():
    check_prompts(["a", "sixths", "ééé"], L)
    assert (tokenise(["sixths", "ééé"], L) < 256).all()   # nothing is cut off


# ---- text encoder ------------------------------------------------------------------------------

def test_every_token_knows_the_whole_caption():
    one, other = text_model().embedder(tokenise(["ab", "ax"], L))
    assert one.shape == (L, 8)                            # a token for each byte
    assert ((one - other).abs().amax(1) > 1e-6).all()     # the padding's too


def test_the_order_of_the_bytes_matters():
    one, other = text_model().embedder(tokenise(["ab", "ba"], L))
    assert (one - other).abs().max() > 1e-3
    assert (one.sort(0).values - other.sort(0).values).abs().max() > 1e-3


def test_captions_are_conditions_by_their_tokens():
    embedder = text_model().embedder
    assert torch.equal(embedder.conditions(["ab", ""]), tokenise(["ab", ""], L))


def test_rescaling_changes_only_the_table_s_gradient():
    gradients = []
    for scale in (1.0, 7.0):
        embedder = text_model().embedder
        embedder.rescale(3.0)
        embedder.rescale(scale)
        out = embedder(captions(3))
        out.square()[..., 0].sum().backward()
        gradients.append((out, embedder.tokens.weight.grad, embedder.positions.weight.grad))
    (out, table, places), (out_7, table_7, places_7) = gradients
    for ours, expected in ((out_7, out), (table_7, 7 * table), (places_7, places)):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_unseen_digits_start_as_their_lookalikes():
    before, embedder = (text_model().embedder for _ in range(2))
    embedder.init_unseen_bytes(["O1l", "Z"], LOOKALIKES)
    old, new = before.tokens.weight, embedder.tokens.weight
    assert (new[ord("0")] == old[ord("O")]).all() and (new[ord("2")] == old[ord("Z")]).all()
    changed = (new != old).any(1).nonzero().flatten().tolist()
    assert changed == [ord("0"), ord("2")]   # 1 was seen; what 3 looks like was not


# ---- null caption ------------------------------------------------------------------------------

def test_dropout_replaces_whole_captions_by_the_empty_one():
    condition = draws(200, 2, dropout=0.4)[3]
    assert condition.shape == (200, 2, L)
    dropped = (condition == tokenise([""], L)).all(2)
    kept = (condition == captions(200)[:, None]).all(2)
    assert (dropped ^ kept).all()
    assert dropped.double().mean().item() == pytest.approx(0.4, abs=0.1)


def test_other_draws_do_not_depend_on_captions():
    one, other = (sample_t_and_noise(text_model(), tiny_data(5)[0], condition, 2, 0.3,
                                     dp_sgd.secure_generator(0))
                  for condition in (captions(5), torch.arange(5)))
    for ours, expected in zip(one[:3], other[:3], strict=True):
        assert torch.equal(ours, expected)


@torch.inference_mode()
def test_guidance_moves_away_from_the_empty_caption():
    model, contexts = text_model().float(), []
    model.unet.register_forward_pre_hook(lambda module, inputs: contexts.append(inputs[2]))
    model.generate(captions(2), 1, guidance=2.0, generator=torch.Generator().manual_seed(0))
    expected = [model.embedder(captions(2)), model.embedder(tokenise(["", ""], L))]
    torch.testing.assert_close(contexts, expected)


# ---- private stage -----------------------------------------------------------------------------

def test_text_encoder_and_keys_are_trained():
    """Two steps without noise: what has a gradient changes, and nothing else."""
    model = text_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    names = dp_sgd.private_parameter_names(model, L)
    encoder = {f"embedder.{name}" for name, _ in model.embedder.named_parameters()}
    train.train_private(model, tiny_data(4)[0], captions(4), names,
                        dp_sgd.PrivacyPlan(4, 4, 2, 0.0, 0.5, 1e-5), configure(*TEXT),
                        dp_sgd.secure_generator(0))
    changed = {name for name, x in model.state_dict().items() if not torch.equal(before[name], x)}
    attention = parameters_of(ATTENTION, TRANSFORMER | WITHOUT_EFFECT)
    assert changed == attention | encoder | SCALE


@pytest.mark.parametrize("trainable", ["attention", "lora"])
@pytest.mark.parametrize("K", [1, 3])
def test_both_engines_agree_on_captions(trainable, K, monkeypatch):
    monkeypatch.setattr(ghost, "LEAST_SHARE", 0.0)   # by which ghost clipping raises norms
    model = text_model()
    if trainable == "lora":
        add_lora(model.unet, 2)
        for p in model.double().parameters():
            nn.init.normal_(p, std=0.3)
    model.embedder.rescale(7.0)
    model.requires_grad_(False)
    names = private_parameter_names(model, L, trainable)
    assert any("attn2.to_k" in name for name in names)
    parameters, batch = {name: model.get_parameter(name) for name in names}, draws(5, K)
    gradients = dp_sgd.per_example_gradients(model, parameters, batch)
    norms = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
    C = norms.median().item()   # clips some examples and not others
    ours, expected = (engine.clipped_gradient_sum(model, parameters, batch, C)
                      for engine in (ghost, dp_sgd))
    assert ours.keys() == expected.keys()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_one_example_s_caption_is_clipped_with_it():
    model = text_model().requires_grad_(False)
    parameters = {n: model.get_parameter(n) for n in dp_sgd.private_parameter_names(model, L)}
    one = dp_sgd.clipped_gradient_sum(model, parameters, draws(1, 2), 1e-3)
    assert flat(one).norm().item() == pytest.approx(1e-3, rel=1e-9)
