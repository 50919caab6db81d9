"""Every preset is right, the paper's are the authors', and wrong names say what is near."""

from dataclasses import asdict

import pytest
from oracles.official import oracle

from runtime import presets
from runtime.config import Config, check

# ---- the presets -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", presets.preset_names())
def test_every_preset_can_be_used(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)   # they are found from anywhere
    config = Config.from_preset(name)
    config.summary = name == "text256"   # which cannot be trained
    check(config)
    assert config.preset == name and asdict(config) != asdict(Config(preset=name))


# preset: DP-LDM's setting
PAPER = {"mnist-paper": "mnist", "cifar10": "cifar10", "celeba32": "celeba32",
         "celeba64": "celeba64", "celebahq256": "celebahq256-class", "text256": "text2img256"}


@pytest.mark.parametrize("name, setting", PAPER.items())
def test_the_paper_s_presets_have_the_authors_networks(name, setting):
    case = oracle("architectures.json")["settings"][setting]
    architecture = Config.from_preset(name).architecture(10)
    vae = {**case["autoencoder"], **case["autoencoder"]["ddconfig"]}
    unet = {"context_dim": None, "num_head_channels": None, "use_scale_shift_norm": False,
            "resblock_updown": False, **case["unet"]}
    if unet["num_head_channels"]:   # then the number of heads has no effect
        del architecture["unet"]["num_heads"]
    for ours, theirs in ((architecture["vae"], vae), (architecture["unet"], unet)):
        for key, value in ours.items():
            assert (list(value) if isinstance(value, tuple) else value) == theirs[key], key
    assert case["ldm"]["image_size"] * 2 ** (len(vae["ch_mult"]) - 1) == vae["resolution"]
    for key in ("linear_start", "linear_end"):
        assert architecture[key] == case["ldm"][key]


@pytest.mark.parametrize("name, setting", PAPER.items())
def test_the_paper_s_presets_have_the_authors_private_settings(name, setting):
    case, config = oracle("architectures.json")["settings"][setting], Config.from_preset(name)
    private, theirs = config.private, case["dp_config"]
    assert (private.epsilon, private.delta) == (theirs["epsilon"], theirs["delta"])
    assert private.max_grad_norm == theirs["max_grad_norm"]
    assert private.expected_batch == case["batch_size"]
    assert int(config.run.physical_batch) == theirs["max_batch_size"]
    skipped = case["ldm"]["ablation_blocks"]   # the authors' K skips K - 1 modules
    assert private.trainable == ("attention" if skipped == -1 else f"from:{skipped - 1}")


# ---- wrong ones --------------------------------------------------------------------------------

def complaint(function: object, *arguments: object) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tables, words", [
    ({"unt": {"num_heads": 2}}, "here: unknown table 'unt'; did you mean 'unet'?"),
    ({"xyz": {}}, "unknown table 'xyz': give one of data, vae, unet, text,"),
    ({"stage": {"x": 1}}, "unknown table 'stage'"),   # a setting, but no table
    ({"unet": 3}, "unknown table 'unet'"),
    ({"unet": {"num_head": 2}}, "here: [unet] has no key 'num_head'; did you mean 'num_heads'?"),
    ({"samples": {"xyz": 2}}, "has no key 'xyz': give one of steps, solver, eta, guidance,"),
    ({"unet": {"num_heads": "two"}}, "here: unet.num_heads must be of type int, not 'two'"),
    ({"unet": {"num_heads": 2.0}}, "unet.num_heads must be of type int, not 2.0"),
    ({"unet": {"num_heads": True}}, "unet.num_heads must be of type int, not True"),
    ({"private": {"lr": True}}, "private.lr must be of type float, not True"),
    ({"run": {"bf16": 1}}, "run.bf16 must be of type bool, not 1"),
    ({"run": {"out": 1.5}}, "run.out must be of type str, not 1.5"),
    ({"vae": {"ch_mult": 2}}, "vae.ch_mult must be a list of int values, not 2"),
    ({"vae": {"ch_mult": [1, 2.5]}}, "vae.ch_mult must be a list of int values, not [1, 2.5]"),
    ({"vae": {"ch_mult": [1, True]}}, "vae.ch_mult must be a list of int values, not [1, True]"),
    ({"samples": {"prompts": ["a", 7]}}, "samples.prompts must be a list of str values")])
def test_wrong_settings_are_refused_with_the_nearest(tables, words):
    assert words in complaint(presets.apply, Config(), tables, "here")


@pytest.mark.parametrize("name, words", [
    ("mnist-papers", "unknown preset 'mnist-papers'; did you mean 'mnist-paper'?"),
    ("xyz", "unknown preset 'xyz': give one of celeba32, celeba64,"),
    ("../presets/mnist", "unknown preset")])
def test_an_unknown_preset_is_refused_with_the_nearest(name, words):
    assert words in complaint(presets.read_preset, name)


@pytest.mark.parametrize("content", [
    b"[unet", b"[unet]\nnum_heads = \xff", b"x = " + b"[" * 10**5], ids=["cut", "bytes", "nested"])
def test_a_damaged_preset_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    (tmp_path / "mine.toml").write_bytes(content)
    assert "mine.toml is no readable preset" in complaint(presets.read_preset, "mine")


# ---- --set -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [
    ("a.b=3", 3), ("a.b = 3", 3), ("a.b=[1, 2]", [1, 2]), ("a.b=1e-3", 1e-3), ("a.b=true", True),
    ('a.b="x y"', "x y"), ("a.b=last:2", "last:2"), ("a.b=x=y", "x=y"), ("a.b=", "")])
def test_assignments_are_toml_or_a_word(text, value):
    assert presets.read_assignment(text) == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["", "a", "a.b", "ab=3", ".b=3", "a.=3", "=3"])
def test_what_is_no_assignment_is_refused(text):
    assert f"{text!r} is not table.key=value" in complaint(presets.read_assignment, text)


def test_a_nested_assignment_is_refused():
    message = complaint(presets.read_assignment, f"unet.num_heads={'[' * 10**5}")
    assert message == "unet.num_heads is nested too deeply"


@pytest.mark.parametrize("tables, value", [
    ({"data": {"public": "~/photos"}}, "/home of/me/photos"), ({"run": {"out": "a~"}}, "a~"),
    ({"private": {"lr": 1}}, 1.0), ({"run": {"physical_batch": 64}}, "64"),
    ({"vae": {"ch_mult": [1, 2]}}, (1, 2)), ({"samples": {"prompts": []}}, ())])
def test_a_value_gets_the_setting_s_type(monkeypatch, tables, value):
    monkeypatch.setenv("HOME", "/home of/me")
    config, [(table, values)] = Config(), tables.items()
    presets.apply(config, tables, "here")
    [key] = values
    found = getattr(getattr(config, table), key)
    assert found == value and type(found) is type(value)
