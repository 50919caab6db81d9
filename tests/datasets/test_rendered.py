"""The rendered data sets by name: classes, splits, seeds, and the cache."""

import string
from collections.abc import Callable

import numpy as np
import pytest

from datasets import glyphs, load, rendered, scenes
from datasets.glyphs import LETTERS
from datasets.rendered import RENDERED, load_rendered

CLASSES = {"letters": list(LETTERS), "digits": list(string.digits), "pen-letters": list(LETTERS),
           "pen-letters-varied": glyphs.TURNED_LETTERS, "captioned-letters": list(LETTERS),
           "captioned-digits": list(string.digits), "leaves": scenes.LEAVES,
           **{name: kind.classes for name, kind in scenes.KINDS.items()}}
SHAPES = {**dict.fromkeys(RENDERED, (30, 28, 28, 1)), "leaves": (30, 32, 32, 3),
          **dict.fromkeys(scenes.KINDS, (30, 256, 256, 3))}


@pytest.fixture
def never(monkeypatch) -> Callable[[], None]:
    """After its call nothing can be rendered."""
    def forbid() -> None:
        for module, name in ((glyphs, "render"), (glyphs, "render_pen"), (scenes, "render"),
                             (glyphs, "render_captioned"), (scenes, "render_leaves")):
            monkeypatch.setattr(module, name, None)
    return forbid


@pytest.mark.parametrize("source", RENDERED)
def test_a_rendered_set_is_drawn_once(small_cache, never, source):
    train, test = (load_rendered(source, split) for split in ("train", "test"))
    assert train.images.shape == test.images.shape == SHAPES[source]
    assert train.classes == test.classes == CLASSES[source]
    shown = [{image.tobytes() for image in images} for images in (train.images, test.images)]
    assert not shown[0] & shown[1]
    has_captions = source.startswith(("captioned", "scenes"))
    assert (train.captions is not None) == has_captions
    assert len(list(small_cache.glob(f"{source}-*.npz"))) == 2
    never()
    again = load_rendered(source, "train")
    assert np.array_equal(again.images, train.images)
    assert np.array_equal(again.labels, train.labels) and again.captions == train.captions


def test_public_and_private_sets_share_no_class():
    for public, private in (("letters", "digits"), ("pen-letters", "digits"),
                            ("pen-letters-varied", "digits"), ("scenes", "scenes-private"),
                            ("captioned-letters", "captioned-digits")):
        assert not set(CLASSES[public]) & set(CLASSES[private])
    assert len(set(CLASSES["pen-letters-varied"])) == 208


def test_no_two_sets_of_scenes_share_a_seed(small_cache, monkeypatch):
    seeds, render = [], scenes.render

    def watched(kind: scenes.Kind, count: int, seed: int) -> tuple[np.ndarray, ...]:
        seeds.append(seed)
        return render(kind, 1, seed)

    monkeypatch.setattr(scenes, "render", watched)
    for source in scenes.KINDS:
        for split in ("train", "test"):
            load_rendered(source, split)
    assert len(set(seeds)) == 4


def test_only_test_digits_have_held_out_combinations(small_cache, monkeypatch):
    asked = []

    def watched(kind: str, count: int, seed: int, complete: bool) -> tuple[np.ndarray, ...]:
        asked.append((kind, complete))
        return np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.int64), np.array(["a"])

    monkeypatch.setattr(glyphs, "render_captioned", watched)
    for source in ("captioned-letters", "captioned-digits"):
        for split in ("train", "test"):
            load_rendered(source, split)
    assert asked == [("letter", True), ("letter", True), ("digit", False), ("digit", True)]


def test_a_process_that_may_not_write_renders_too(small_cache, as_process):
    """As the second of torchrun's processes does while the first one is still rendering."""
    as_process(1)
    found = load_rendered("scenes", "test")
    assert not small_cache.exists()
    as_process(0)
    written = load_rendered("scenes", "test")
    assert np.array_equal(found.images, written.images) and found.captions == written.captions
    assert small_cache.exists()


@pytest.mark.parametrize("variable, folder", [("XDG_CACHE_HOME", "dp-ldm"),
                                              ("HOME", ".cache/dp-ldm")])
def test_a_closed_cache_moves_to_the_user_s_folder(small_cache, never, tmp_path, monkeypatch,
                                                   variable, folder):
    small_cache.write_text("a file where a folder must be")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "user"))
    found = load_rendered("digits", "test")
    assert (tmp_path / "user" / folder / "digits-test-v3.npz").is_file()
    never()
    assert np.array_equal(load_rendered("digits", "test").images, found.images)


def test_without_any_cache_a_set_is_rendered_each_time(small_cache, monkeypatch, capsys):
    small_cache.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_cache))
    first, second = (load_rendered("digits", "test").images for _ in range(2))
    assert np.array_equal(first, second)
    assert capsys.readouterr().out.count("digits-test-v3 is made anew each time") == 2


def test_a_full_disk_is_no_cache(small_cache, tmp_path, monkeypatch, full_disk, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    with full_disk(1_000):
        assert len(load_rendered("digits", "test").images) == 30
    assert "File too large" in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_damaged_cache_is_refused(small_cache):
    small_cache.mkdir()
    (small_cache / "digits-test-v3.npz").write_bytes(b"not an npz")
    with pytest.raises(ValueError, match="digits-test-v3.npz"):
        load_rendered("digits", "test")


def test_the_cache_is_in_the_project_s_folder():
    assert rendered.CACHE.parts[-2:] == ("data", "cache")
    assert (rendered.CACHE.parents[1] / "datasets" / "rendered.py").is_file()


@pytest.mark.parametrize("source, size, channels", [
    ("scenes", 64, 1), ("leaves", 64, 1), ("leaves", 32, 3)])
def test_rendered_colour_is_loaded_at_any_size(small_cache, source, size, channels):
    images = load(source, "test", image_size=size, channels=channels).images
    assert images.shape == (30, size, size, channels)
