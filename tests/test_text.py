"""Models of captions: tokens, text encoder, null caption, both engines, a private stage end to end, prompts, glyphs."""

import json
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import refuse
from test_dp_sgd import TINY as CLASSES
from test_dp_sgd import tiny_data
from test_ghost import assert_equal_sums
from test_ledger import TINY
from torch import nn

import config
import data
import dp_sgd
import glyphs
import ldm
import sample
import train
from ldm import LatentDiffusion, TextEmbedder, load_checkpoint, noise_draws, replace_embedder, tokenise
from unet import private_parameter_names

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import prompts  # noqa: E402

TEXT = [*TINY, "--context-tokens", "12", "--text-layers", "1"]
L = 6


def tiny_model(layers: int = 2) -> LatentDiffusion:
    """All parameters random: zero-initialised layers would hide the gradients of others."""
    torch.manual_seed(0)
    model = LatentDiffusion(CLASSES.architecture(3) | {"text": dict(length=L, layers=layers)})
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double()


def captions(count: int) -> torch.Tensor:
    return tokenise([f"a{k % 3} {'xyz'[k % 3]}" for k in range(count)], L)


def draws(count: int, K: int, dropout: float = 0.3) -> tuple[torch.Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in noise_draws(
        tiny_model(), tiny_data(count)[0], captions(count), K, dropout, dp_sgd.secure_generator(0)))


# ---- tokens ----------------------------------------------------------------------------------------

def test_a_caption_s_tokens_are_its_bytes_and_padding():
    tokens = tokenise(["ab", "", "é!", "ééé"], 5)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [[97, 98, 256, 256, 256], [256] * 5, [0xc3, 0xa9, 33, 256, 256],
                               [0xc3, 0xa9, 0xc3, 0xa9, 0xc3]]


def test_text_that_has_no_bytes_is_refused():
    with pytest.raises(ValueError, match="^caption number 2 is not valid UTF-8 text$"):
        tokenise(["fine", "\ud800"], 5)


@pytest.mark.parametrize("prompt, complaint", [
    ("", "0 bytes: give from 1 to 6"), ("  ", "2 bytes"), ("sevenths", "8 bytes"), ("ééé!", "7 bytes"),
    ("\udcff", "not UTF-8")])
def test_bad_prompts_are_refused_in_one_line(prompt, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        ldm.check_prompts(["fine", prompt], L)
    assert "\n" not in str(error.value)


# ---- text encoder ----------------------------------------------------------------------------------

def test_the_context_has_a_token_per_byte_and_every_token_knows_the_whole_caption():
    embedder = tiny_model().embedder
    one, other = embedder(tokenise(["ab", "ax"], L))
    assert one.shape == (L, 8)
    assert ((one - other).abs().amax(1) > 1e-6).all()   # the padding's too


def test_the_order_of_the_bytes_matters():
    one, other = tiny_model().embedder(tokenise(["ab", "ba"], L))
    assert (one - other).abs().max() > 1e-3
    assert (one.sort(0).values - other.sort(0).values).abs().max() > 1e-3


def test_rescaling_changes_the_table_s_gradient_and_nothing_else():
    gradients = []
    for scale in (1.0, 7.0):
        embedder = tiny_model().embedder
        embedder.rescale(3.0)
        embedder.rescale(scale)
        out = embedder(captions(3))
        out.square()[..., 0].sum().backward()
        gradients.append((out, embedder.tokens.weight.grad, embedder.positions.weight.grad))
    (out, table, places), (out_7, table_7, places_7) = gradients
    for ours, expected in ((out_7, out), (table_7, 7 * table), (places_7, places)):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_the_architecture_says_which_embedder_it_is(tmp_path):
    model = tiny_model().float()
    ldm.save_checkpoint(tmp_path / "model.pt", model, classes=[], config={})
    loaded, _ = load_checkpoint(tmp_path / "model.pt")
    assert isinstance(loaded.embedder, TextEmbedder) and len(loaded.embedder.blocks) == 2
    torch.testing.assert_close(loaded.embedder(captions(3)), model.embedder(captions(3)))
    assert "text" not in config.Config(context_tokens=1).architecture(3)
    assert "text" not in config.Config(context_tokens=9, context_dim=0).architecture(3)
    assert config.Config(context_tokens=9).architecture(3)["text"] == dict(length=9, layers=2)


def test_the_private_stage_keeps_the_public_text_encoder():
    model = tiny_model()
    new = replace_embedder(model, None, 1)
    assert new is not model
    torch.testing.assert_close(new.embedder.state_dict(), model.embedder.state_dict(), rtol=0, atol=0)


def test_unseen_digits_start_as_the_letters_they_look_like():
    before, embedder = (tiny_model().embedder for _ in range(2))
    embedder.start_unseen(["O1l", "Z"], data.LOOKALIKES)
    old, new = before.tokens.weight, embedder.tokens.weight
    assert (new[ord("0")] == old[ord("O")]).all() and (new[ord("2")] == old[ord("Z")]).all()
    changed = (new != old).any(1).nonzero().flatten().tolist()
    assert changed == [ord("0"), ord("2")]   # 1 was seen; what 3 looks like was not


# ---- null caption ----------------------------------------------------------------------------------

def test_dropout_replaces_whole_captions_by_the_empty_one():
    _, _, _, condition = draws(200, 2, dropout=0.4)
    assert condition.shape == (200, 2, L)
    dropped = (condition == tokenise([""], L)).all(2)
    kept = (condition == captions(200)[:, None]).all(2)
    assert (dropped ^ kept).all()
    assert dropped.double().mean().item() == pytest.approx(0.4, abs=0.1)
    assert (dropped[:, 0] != dropped[:, 1]).any()   # each draw for itself


def test_the_other_draws_do_not_depend_on_the_captions():
    one, other = (noise_draws(tiny_model(), tiny_data(5)[0], condition, 2, 0.3, dp_sgd.secure_generator(0))
                  for condition in (captions(5), torch.arange(5)))
    for ours, expected in zip(one[:3], other[:3], strict=True):
        assert torch.equal(ours, expected)


def test_guidance_moves_away_from_the_empty_caption(monkeypatch):
    model = tiny_model().float()
    contexts = []
    monkeypatch.setattr(model, "predict_eps", lambda z, t, context: contexts.append(context) or torch.zeros_like(z))
    model.generate(captions(2), 1, guidance=2.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contexts, [model.embedder(captions(2)), model.embedder(tokenise(["", ""], L))])


# ---- private stage ---------------------------------------------------------------------------------

@pytest.mark.parametrize("parts", ["attention", "lora"])
@pytest.mark.parametrize("K, chunk", [(1, 3), (3, 2)])
def test_both_engines_agree_on_attention_and_text_encoder(parts, K, chunk):
    model = tiny_model()
    if parts == "lora":
        model = ldm.with_lora(model, 2, 0).double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    model.embedder.rescale(7.0)
    names = private_parameter_names(model, "all", L, parts)
    assert_equal_sums(model, names, draws(5, K), None, chunk)


def test_the_private_stage_trains_the_whole_text_encoder_and_the_attention_s_keys():
    model = tiny_model()
    names = private_parameter_names(model, "all", L)
    assert {n for n in names if n.startswith("embedder.")} == {f"embedder.{n}" for n, _ in
                                                               model.embedder.named_parameters()}
    parameters = {name: model.get_parameter(name) for name in names}
    sums = dp_sgd.clipped_gradient_sum(model.requires_grad_(False), parameters, draws(4, 1, 0.0), 1e9, 4)
    assert sum("attn2.to_k" in name for name in names) > 0
    assert all(s.abs().max() > 1e-12 for s in sums.values()), [n for n, s in sums.items() if not s.any()]


def test_one_example_with_its_caption_moves_the_sum_by_C_at_most():
    model = tiny_model()
    parameters = {name: model.get_parameter(name) for name in private_parameter_names(model, "all", L)}
    one = dp_sgd.clipped_gradient_sum(model.requires_grad_(False), parameters, draws(1, 2), 1e-3, 4)
    assert torch.cat([s.flatten() for s in one.values()]).norm().item() == pytest.approx(1e-3, rel=1e-9)


def write_captioned(folder: Path, texts: list[str], seed: int) -> Path:
    """8x8 images and their metadata.jsonl."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    for i in range(len(texts)):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def arguments(folder: Path, *more) -> list[str]:
    return ["--public-data", str(folder / "letters"), "--private-data", str(folder / "digits"), "--out",
            str(folder / "run"), *TEXT, *more]


SECRET = "secret 4xqzj"   # whose end is in no number, however long


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Both stages from folders with a metadata.jsonl."""
    folder = tmp_path_factory.mktemp("text")
    write_captioned(folder / "letters", ["red O", "blue O", "red Z"] * 4, seed=0)
    write_captioned(folder / "digits", [SECRET, "blue 2", "red 0"] * 8, seed=1)
    train.main(["--stage", "public", *arguments(folder)])
    train.main([*arguments(folder), "--prompts", "red 0", "blue 2"])
    return folder / "run"


def test_training_from_captions_end_to_end(trained):
    public, private = (load_checkpoint(trained / name) for name in ("public.pt", "private-eps3.pt"))
    assert public[0].architecture["text"] == private[0].architecture["text"] == dict(length=12, layers=1)
    table = public[0].embedder.tokens.weight
    assert (table[ord("2")] == table[ord("Z")]).all() and (table[ord("4")] != table[ord("A")]).any()
    before, after = (m.embedder.scale * m.embedder.tokens.weight for m in (public[0], private[0]))
    assert (before != after).any()
    changed = {n: not torch.equal(p, private[0].get_parameter(n)) for n, p in public[0].named_parameters()}
    frozen = [n for n in changed if n.startswith("vae.") or ".in_layers." in n]
    learnt = [n for n in changed if n.startswith("embedder.") or ".attn2." in n]
    assert frozen and not any(changed[n] for n in frozen) and learnt and all(changed[n] for n in learnt)
    with Image.open(trained / "private-eps3.png") as picture:
        assert picture.size[1] < 100   # two prompts, not ten captions


def test_no_private_caption_is_in_what_may_be_published(trained):
    content = b"".join(path.read_bytes() for path in trained.iterdir() if path.name.startswith("private"))
    assert SECRET.split()[1].encode() not in content
    assert load_checkpoint(trained / "private-eps3.pt")[1]["classes"] == ["all"]


def test_without_prompts_the_private_stage_shows_nothing(trained, capsys):
    out = trained.parent / "silent"
    train.main([*arguments(trained.parent), "--out", str(out), "--public-checkpoint", str(trained / "public.pt")])
    assert "--prompt" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["private-eps3.privacy.json", "private-eps3.pt"]


def test_a_folder_without_captions_is_refused(trained, capsys):
    from test_ledger import write_images
    write_images(trained.parent / "classes", [3, 3], seed=2)
    message = refuse(capsys, train, [*arguments(trained.parent), "--overwrite", "--private-data",
                                     trained.parent / "classes"])
    assert "has no captions" in message and "--context-tokens 1" in message


def test_a_model_of_captions_is_no_model_of_classes(trained, capsys):
    message = refuse(capsys, train, [*arguments(trained.parent), "--overwrite", "--context-tokens", "1"])
    assert "another architecture" in message


def test_ldm_s_own_text_encoder_is_not_trained_but_ours_may_stand_in(capsys):
    assert "--text-layers 0" in refuse(capsys, train, ["--preset", "text256"])
    assert config.parse_args(["--preset", "text256", "--text-layers", "1"], "").has_captions
    described = config.describe(config.parse_args(["--preset", "glyphs-text", "--describe"], ""))
    with torch.device("meta"):
        size = config.count(TextEmbedder(48, 32, 2).parameters())
    assert f"text encoder, 2 layers{size:>27,}{size:>15,}  100.00%" in described


# ---- prompts ---------------------------------------------------------------------------------------

def run_sample(trained: Path, *more) -> None:
    sample.main([str(trained / "private-eps3.pt"), "--steps", "2", "--columns", "3", "--device", "cpu",
                 *map(str, more)])


def test_every_prompt_is_a_row_of_the_grid(trained, tmp_path, monkeypatch):
    panels, save_grid = [], data.save_grid
    monkeypatch.setattr(data, "save_grid", lambda path, shown, text: (panels.extend(shown),
                                                                      save_grid(path, shown, text)))
    rows = ["red 0", "blue 2", "red 0"]
    run_sample(trained, *(word for prompt in rows for word in ("--prompt", prompt)), "--grid", tmp_path / "grid.png")
    (title, images, names), = panels
    assert title == "eps = 3" and names == rows and images.shape == (3, 3, 8, 8, 1)
    assert (tmp_path / "grid.png").is_file()


def test_the_prompt_makes_the_difference(trained):
    model, _ = load_checkpoint(trained / "private-eps3.pt")
    nn.init.normal_(model.unet.out[2].weight)   # two steps of training leave it near zero
    one, same, other = (sample.sample(model, model.conditions([prompt]).numpy(), 2, 0.0, 1, 1.5, seed=3)
                        for prompt in ("red 0", "red 0", "blue 2"))
    assert (one == same).all() and (one != other).any()


def test_an_npz_of_prompts_is_labelled_by_their_numbers(trained, tmp_path):
    run_sample(trained, "--prompt", "red 0", "--prompt", "blue 2", "--npz", tmp_path / "x.npz", "--count", 5)
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["labels"].tolist() == [0, 1, 0, 1, 0] and arrays["images"].shape == (5, 8, 8, 1)
        assert json.loads(str(arrays["origin"]))["prompts"] == ["red 0", "blue 2"]


@pytest.mark.parametrize("prompt, complaint", [
    ([], "say what to sample by --prompt TEXT"), (["--prompt", ""], "0 bytes"),
    (["--prompt", "a caption too long"], "18 bytes: give from 1 to 12"), (["--prompt", "\udcff"], "not UTF-8")])
def test_wrong_prompts_end_with_one_line(trained, tmp_path, capsys, prompt, complaint):
    for target, suffix in (("--grid", "png"), ("--npz", "npz")):
        message = refuse(capsys, sample, [trained / "private-eps3.pt", *prompt, target, tmp_path / f"out.{suffix}"])
        assert complaint in message
    assert not list(tmp_path.iterdir())


def test_a_model_of_classes_takes_no_prompt(tmp_path, capsys):
    model = LatentDiffusion(CLASSES.architecture(3))
    ldm.save_checkpoint(tmp_path / "model.pt", model, classes=list("abc"), config={})
    message = refuse(capsys, sample, [tmp_path / "model.pt", "--prompt", "a", "--grid", tmp_path / "grid.png"])
    assert "leave out --prompt" in message


# ---- captioned glyphs ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def captioned() -> dict[str, data.Dataset]:
    """Few captioned glyphs, not from the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", Path("/nonexistent"))
        patch.setattr(data, "save_arrays", lambda path, **arrays: None)
        patch.setattr(data, "COUNTS", {"letters": {"train": 936, "test": 0}, "digits": {"train": 1_400, "test": 450}})
        return {f"{source} {split}": data.load(f"captioned-{source}", split)
                for source, split in (("letters", "train"), ("digits", "train"), ("digits", "test"))}


def combinations(dataset: data.Dataset) -> set[tuple[int, int, int]]:
    return {prompts.MEANINGS[caption] for caption in dataset.captions}


def test_held_out_combinations_are_not_in_the_private_training_data(captioned):
    held_out = {prompts.MEANINGS[c] for c, is_held_out in prompts.IS_HELD_OUT.items() if is_held_out}
    every = {(d, w, s) for d in range(10) for w in range(3) for s in range(3)}
    assert len(held_out) == 20 and set(prompts.MEANINGS.values()) == every
    assert combinations(captioned["digits train"]) == every - held_out
    assert combinations(captioned["digits test"]) == every
    for digit in range(10):   # each digit is seen with each word, and each style with most digits
        seen = [c for c in every - held_out if c[0] == digit]
        assert len(seen) == 7 and {c[1] for c in seen} == {c[2] for c in seen} == {0, 1, 2}


def test_captions_and_labels_agree_and_no_public_caption_has_a_digit(captioned):
    for dataset in captioned.values():
        assert all(dataset.classes[label] in caption.split() for label, caption in zip(
            dataset.labels, dataset.captions, strict=True))
    letters = captioned["letters train"]
    assert len(set(letters.captions)) == 52 * 9 and not set("".join(letters.captions)) & set(string.digits)
    assert all(len(caption.encode()) <= config.PRESETS["glyphs-text"]["context_tokens"]
               for dataset in captioned.values() for caption in dataset.captions)


def test_the_moments_of_the_images_agree_with_the_words(captioned):
    training, test = captioned["digits train"], captioned["digits test"]
    means = prompts.calibrate(training.images, np.array([prompts.MEANINGS[c] for c in training.captions]))
    assert (np.diff(means[0]) > 3).all() and (np.diff(means[1]) > 0.2).all()   # thin < medium < bold, left < right
    asked = np.array([prompts.MEANINGS[c] for c in test.captions])
    right = (prompts.read(test.images, test.labels, means) == asked).mean(0)
    assert (right > 0.95).all(), right


def test_moments_of_a_bar():
    image = np.zeros((3, 32, 32, 1), np.uint8)
    image[0, 6:26, 14:16] = image[1, 6:26, 12:18] = 255
    for y in range(6, 26):
        image[2, y, 14 + (15 - y) // 5:16 + (15 - y) // 5] = 255   # leans right by a fifth
    weight, slant = prompts.moments(image).T
    assert slant[:2] == pytest.approx([0, 0], abs=1e-9) and slant[2] == pytest.approx(0.2, abs=0.02)
    assert weight[1] == pytest.approx(3 * weight[0]) and weight[2] == pytest.approx(weight[0])
    assert np.isfinite(prompts.moments(np.zeros((1, 8, 8, 1), np.uint8))).all()


def test_captioned_glyphs_follow_the_seed_and_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "COUNTS", {"digits": {"train": 90, "test": 90}})
    first = data.load("captioned-digits", "train")
    monkeypatch.setattr(data, "render_captioned", None)
    second = data.load("captioned-digits", "train")
    assert (first.images == second.images).all() and first.captions == second.captions
    assert (first.labels == second.labels).all() and first.images.shape == (90, 32, 32, 1)
    again, other = (glyphs.render_captioned("digit", 90, seed, complete=False)[0] for seed in (0, 1))
    assert (first.images[:, 2:-2, 2:-2, 0] == again).all() and (again != other).any()


def test_real_images_with_a_caption(captioned):
    test = captioned["digits test"]
    rows, names = data.rows_by_caption(test, ["a thin digit 7 upright"], 3)
    assert rows.shape == (1, 3, 32, 32, 1) and names == ["a thin digit 7 upright"]
    with pytest.raises(ValueError, match="no real image has the caption 'a cat'"):
        data.rows_by_caption(test, ["a thin digit 7 upright", "a cat"], 3)
