"""Settings, their flags, and what follows from them."""

import argparse
import dataclasses
import math
import typing

import pytest

from runtime import config as config_module
from runtime import presets
from runtime.config import FLAGS, MAY_BE_ZERO, MODEL_TABLES, Config, check, make_parser, parse_args
from tiny import configure

TABLES = {field.name: field.type for field in dataclasses.fields(Config)[3:]}
SETTINGS = {f"{table}.{field.name}": field.type
            for table, kind in TABLES.items() for field in dataclasses.fields(kind)}
FLAG_PLACES = {flag: place for flags in FLAGS.values() for flag, (place, _) in flags.items()}


def settings(*argv: str) -> Config:
    return parse_args([*argv], "")


def tables(config: Config) -> dict:
    return dataclasses.asdict(config)


def another(place: str) -> object:
    """A value of the setting's type that is not its default."""
    kind = SETTINGS[place]
    if typing.get_origin(kind) is tuple:
        return ("a", "b") if place == "samples.prompts" else (1, 2, 3)
    return {bool: True, int: 7, float: 0.25, str: "another"}[kind]


# ---- flags -------------------------------------------------------------------------------------

def options() -> list[argparse.Action]:
    return [a for a in make_parser("")._actions if a.dest != "help"]


def test_there_are_at_most_34_flags():
    assert len(options()) <= 34


def test_every_flag_has_a_place_of_its_own():
    assert set(FLAG_PLACES.values()) <= set(SETTINGS)
    assert len(set(FLAG_PLACES.values())) == len(FLAG_PLACES)
    assert all(action.help for action in options())


def test_the_help_fits_two_screens():
    lines = make_parser("one line").format_help().splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("flag, place", FLAG_PLACES.items())
def test_a_flag_and_set_agree(flag, place, monkeypatch):
    monkeypatch.setattr(config_module, "check", lambda config: None)
    value, kind = another(place), SETTINGS[place]
    words = [] if kind is bool else value if isinstance(value, tuple) else [str(value)]
    toml = "true" if kind is bool else list(value) if isinstance(value, tuple) else value
    by_flag = settings(f"--{flag}", *words)
    assert tables(by_flag) == tables(settings("--set", f"{place}={toml}"))
    table, key = place.split(".")
    assert getattr(getattr(by_flag, table), key) == value


def test_flags_precede_set_which_precedes_the_preset():
    more = ["--set", "private.epochs=7", "--set", "private.lr=1"]
    config = settings("--preset", "mnist", "--private-lr", "0.5", *more)
    assert (config.private.epochs, config.private.lr) == (7.0, 0.5)
    assert config.private.noise_multiplicity == 4   # the preset's
    assert config.private.delta == Config().private.delta


def test_runs_have_a_folder_by_preset():
    assert str(settings("--preset", "mnist").folder) == "runs/mnist"
    assert str(settings("--out", "elsewhere").folder) == "elsewhere"


# ---- checks ------------------------------------------------------------------------------------

NUMBERS = [place for place, kind in SETTINGS.items()
           if kind in (int, float) and place != "private.insecure_noise_seed"]


@pytest.mark.parametrize("place", NUMBERS)
def test_numbers_are_positive_and_finite(place):
    table, key = place.split(".")
    for value in (-1, math.nan, math.inf, 0):
        config = Config(summary=True)
        setattr(getattr(config, table), key, value)
        name = f"--{dict(zip(FLAG_PLACES.values(), FLAG_PLACES)).get(place, place)}"
        if value == 0 and place in MAY_BE_ZERO:
            check(config)
            continue
        with pytest.raises(ValueError, match=f"({name}|{place}) must be positive and finite"):
            check(config)


@pytest.mark.parametrize("assignments, words", [
    (["vae.ch_mult=[1, 2, 0]"], "vae.ch_mult must be positive"),
    (["private.trainable=lora:last:1", "private.lora_rank=33"], "lora_rank must be at most 32"),
    *[([f"{stage}.lr=1e20"], "lr must be at most 1, not 1e\\+20")
      for stage in ("private", "public", "autoencoder")],
    (["data.image_size=10"], "data.image_size must be a multiple of 4"),
    (["unet.model_channels=12", "unet.num_heads=8"], "a multiple of unet.num_heads"),
    (["unet.num_head_channels=5"], "or unet.num_head_channels"),
    (["autoencoder.crop=16"], "autoencoder.crop must be a multiple of 2.*at most data.image_size"),
    (["private.timesteps=[5]"], "private.timesteps must be two numbers"),
    (["private.timesteps=[0, 1001]"], "private.timesteps must be two numbers"),
    (["run.physical_batch=many"], "--physical-batch must be a positive number or auto"),
    (["samples.eta=2", "samples.solver=ddim"], "eta must be from 0 to 1"),
    (["samples.guidance=inf"], "--guidance must be positive and finite"),
    (["text.length=5", "samples.prompts=['too long']"], "8 bytes: give from 1 to 5"),
    (["text.length=5", "text.layers=0"], "LDM's BERT .* cannot be trained on"),
    *[([f"private.trainable={what}"], "--trainable must be")
      for what in ("last", "last:", "last:-1", "lora:all", "attention:2", "every")]])
def test_settings_that_cannot_work_are_refused(assignments, words):
    config = configure(*assignments)
    with pytest.raises(ValueError, match=words) as error:
        check(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["attention", "last:2", "from:0", "lora", "lora:last:1", "all"])
def test_what_can_be_trained_is_accepted(what):
    check(configure(f"private.trainable={what}"))


# ---- what follows from them --------------------------------------------------------------------

def test_widths_that_follow_from_others_are_derived():
    architecture = configure("vae.z_channels=6", "data.channels=3").architecture(5)
    vae, unet = architecture["vae"], architecture["unet"]
    assert (vae["z_channels"], vae["embed_dim"]) == (6, 6) and vae["in_channels"] == 3
    assert (unet["in_channels"], unet["out_channels"]) == (6, 6) and vae["resolution"] == 8
    assert architecture["num_classes"] == 5
    assert "n_embed" not in vae and "text" not in architecture
    assert unet["num_head_channels"] is None and unet["context_dim"] == 8


def test_variants_are_part_of_the_architecture():
    assert configure("vae.n_embed=9").architecture(1)["vae"]["n_embed"] == 9
    unconditional = configure("unet.context_dim=0", "text.length=7")
    assert unconditional.architecture(1)["unet"]["context_dim"] is None
    assert not unconditional.has_captions and unconditional.context_tokens == 1
    captions = configure("text.length=7", "text.layers=1")
    assert captions.architecture(1)["text"] == dict(length=7, layers=1)
    assert captions.has_captions and captions.context_tokens == 7


# ---- what a resumed run must keep --------------------------------------------------------------

def test_run_and_samples_may_change_and_nothing_else():
    assert [*TABLES] == [*MODEL_TABLES, "run", "samples"]


@pytest.mark.parametrize("place", SETTINGS)
def test_a_change_of_mechanism_or_model_is_found(place):
    planned, now, (table, key) = tables(Config()), Config(), place.split(".")
    setattr(getattr(now, table), key, another(place))
    difference = now.changed(planned)
    if table not in MODEL_TABLES:
        assert difference is None
        return
    name, before, after = difference
    assert name.lstrip("-") in (place, *FLAG_PLACES) and FLAG_PLACES.get(name[2:], place) == place
    assert (before, after) == (planned[table][key], another(place))


def test_a_path_in_another_spelling_has_not_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "others"):
        (tmp_path / name).mkdir()
    planned = tables(configure("data.public=photos"))
    for same in ("./photos/", f"{tmp_path}/photos", "others/../photos"):
        assert configure(f"data.public={same}").changed(planned) is None
    assert configure("data.public=others").changed(planned) == ("--public-data", "photos", "others")
    assert configure("data.public=none").changed(planned) == ("--public-data", "photos", "none")


@pytest.mark.parametrize("name", presets.preset_names())
def test_the_same_preset_has_not_changed(name):
    planned = tables(Config.from_preset(name))
    assert Config.from_preset(name).changed(planned) is None
