"""presets/NAME.toml and `--set table.key=value`: wrong names are refused in one line."""

import dataclasses
import difflib
import os
import tomllib
import typing
from pathlib import Path

PRESETS = Path(__file__).resolve().parents[1] / "presets"

Tables = dict[str, dict[str, object]]


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def nearest(name: str, known: list[str]) -> str:
    """"; did you mean NAME?", or all there are where nothing is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f": give one of {', '.join(known)}"


def read_preset(name: str) -> Tables:
    """The tables of a preset. ValueError for an unknown name and for a damaged file."""
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}{nearest(name, preset_names())}")
    path = PRESETS / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no readable preset: {error}") from error


def read_assignment(text: str) -> Tables:
    """{table: {key: value}} of "table.key=value", the value as in TOML, or a word without quotes.

    ValueError if it is no such assignment.
    """
    place, equals, value = text.partition("=")
    table, dot, key = place.strip().partition(".")
    if not (equals and dot and table and key):
        raise ValueError(f"{text!r} is not table.key=value")
    try:
        return {table: {key: tomllib.loads(f"value = {value}")["value"]}}
    except RecursionError as error:
        raise ValueError(f"{table}.{key} is nested too deeply") from error
    except tomllib.TOMLDecodeError:
        return {table: {key: value.strip()}}


def convert(value: object, kind: type, place: str) -> object:
    """`value` as `kind`; an int may become a float or a word. ValueError for other types."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, list | tuple) and all(type(v) is item for v in value):
            return tuple(value)
        raise ValueError(f"{place} must be a list of {item.__name__} values, not {value!r}")
    if kind in (float, str) and type(value) is int:
        return kind(value)
    if type(value) is not kind:
        raise ValueError(f"{place} must be of type {kind.__name__}, not {value!r}")
    # No shell spells out the ~ in --set data.public=~/photos, nor in a preset.
    return os.path.expanduser(value) if kind is str else value


def apply(config: object, tables: Tables, source: str) -> None:
    """Write `tables` into the tables of `config`. ValueError for unknown names and other types."""
    known = {name: table for name, table in vars(config).items() if dataclasses.is_dataclass(table)}
    for table, values in tables.items():
        if table not in known or not isinstance(values, dict):
            raise ValueError(f"{source}: unknown table {table!r}{nearest(table, list(known))}")
        kinds = {field.name: field.type for field in dataclasses.fields(known[table])}
        for key, value in values.items():
            if key not in kinds:
                raise ValueError(f"{source}: [{table}] has no key {key!r}"
                                 f"{nearest(key, list(kinds))}")
            setattr(known[table], key, convert(value, kinds[key], f"{source}: {table}.{key}"))
