"""Scenes show what their captions say; dead leaves have the statistics of photographs."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from datasets import scenes
from datasets.scenes import KINDS, LEAVES, SHAPES

PAINTS = {name: np.array(rgb) for kind in KINDS.values() for name, rgb in kind.colours.items()}


@pytest.fixture(scope="module", params=KINDS)
def pictures(request) -> tuple[scenes.Kind, np.ndarray, np.ndarray, list[str]]:
    """A kind, 56 pictures of it, and their labels and captions."""
    kind = KINDS[request.param]
    images, *numbers = scenes.render(kind, 56, seed=5)
    return kind, images, numbers[0], [kind.caption(*each) for each in zip(*numbers, strict=True)]


def painted(image: np.ndarray) -> np.ndarray:
    """Where the object is, bool [256, 256]: backgrounds have hardly any colour."""
    return np.ptp(image.astype(int), axis=-1) > 100


def outlines(mask: np.ndarray, angles: tuple[int, ...] = (0,)) -> np.ndarray:
    """A silhouette cut out, turned by each angle (degrees), at 24x24."""
    turned = [Image.fromarray(mask.astype(np.uint8) * 255).rotate(angle) for angle in angles]
    return np.stack([np.asarray(p.crop(p.getbbox()).resize((24, 24))) > 127 for p in turned])


def texture_seen(image: np.ndarray) -> str:
    """The background's texture, judged by its pixels alone."""
    grey, ground = image.mean(-1), ~ndimage.binary_dilation(painted(image), iterations=6)
    low, high = np.percentile(grey[ground], [2, 98])
    level = (grey - low) / (high - low)
    dy, dx = (g[ground] for g in np.gradient(ndimage.gaussian_filter(level, 1)))
    small, large = np.linalg.eigvalsh(np.cov(dy, dx))
    if small < 0.1 * large:   # it changes in one direction only
        return "striped"
    if np.mean((level[ground] > 0.2) & (level[ground] < 0.8)) > 0.45:
        return "cloudy"
    return "dotted" if level[ground].mean() < 0.35 else "checked"


def test_scenes_follow_the_seed():
    kind = KINDS["scenes-private"]
    images, labels, colours, textures = scenes.render(kind, 28, 5)
    assert images.shape == (28, 256, 256, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2] * len(kind.classes)
    assert colours.max() < len(kind.colours) and textures.max() < len(scenes.TEXTURES)
    assert np.array_equal(scenes.render(kind, 28, 5)[0], images)
    assert not np.array_equal(scenes.render(kind, 28, 6)[0], images)


def test_captions_name_the_colour_that_is_painted(pictures):
    for image, caption in zip(pictures[1], pictures[3], strict=True):
        colour = image[ndimage.binary_erosion(painted(image), iterations=2)].mean(0) / 255
        nearest = min(PAINTS, key=lambda name: np.abs(PAINTS[name] - colour).sum())   # noqa: B023
        assert nearest == caption.split()[1], caption


def test_captions_name_the_texture_that_is_painted(pictures):
    for image, caption in zip(pictures[1], pictures[3], strict=True):
        assert texture_seen(image) == caption.split()[-2], caption


def test_classes_and_captions_name_the_object(pictures):
    kind, images, labels, captions = pictures
    masks = [scenes.distance_map(thing) > -3 for thing in kind.classes]
    templates = np.stack([outlines(mask, (-10, -5, 0, 5, 10)) for mask in masks])
    right = []
    for image, label, caption in zip(images, labels, captions, strict=True):
        name = kind.classes[label]
        thing = caption.split(" on ")[0].split()[2:]
        assert thing == ([kind.word, name] if len(name) == 1 else [name])
        alike = (templates == outlines(painted(image))[0]).mean((2, 3)).max(1)   # [classes]
        right.append(alike.argmax() == label)
    assert np.mean(right) > 0.9


def test_no_private_object_or_colour_is_public():
    public, private = KINDS.values()
    assert not set(public.classes) & set(private.classes)
    assert not set(public.colours) & set(private.colours)


# ---- dead leaves -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def leaves() -> tuple[np.ndarray, np.ndarray]:
    return scenes.render_leaves(480, seed=5)


def test_each_leaf_picture_can_be_rendered_alone(leaves):
    images, labels = leaves
    assert images.shape == (480, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [30] * len(LEAVES)
    bank = scenes.clouds(256, np.random.default_rng(5))
    for i in (0, 7, 479):
        alone, other = (scenes.picture_of_leaves(labels[i], bank, np.random.default_rng((seed, i)))
                        for seed in (5, 6))
        assert np.array_equal(alone, images[i]) and not np.array_equal(other, images[i])


def test_no_two_pictures_of_leaves_are_alike(leaves):
    flat = leaves[0].reshape(480, -1).astype(float)
    squares = np.square(flat).sum(1)
    distances = np.sqrt(squares[:, None] + squares - 2 * flat @ flat.T + 1e9 * np.eye(480))
    assert distances.min() > 0.02 * 255 * np.sqrt(3072)


def test_leaves_use_all_hues_and_the_whole_range_of_brightness(leaves):
    images, _ = leaves
    means = images.mean((1, 2)) / 255
    dark, bright = np.percentile(images, [1, 99], axis=(0, 1, 2))
    assert (dark < 30).all() and (bright > 225).all()
    assert (np.abs(means.mean(0) - 0.45) < 0.1).all() and (means.std(0) > 0.12).all()
    assert set(means.argmax(1)) == set(means.argmin(1)) == {0, 1, 2}


def test_leaves_have_the_statistics_of_photographs(leaves):
    """A power spectrum that falls like f^-2 to f^-3.5, and heavy tails (Ruderman 1994).

    Differences of neighbours have a far larger kurtosis than Gaussian ones, whose is 3.
    """
    grey = leaves[0].mean(-1)
    grey -= grey.mean((1, 2), keepdims=True)
    window = np.outer(np.hanning(32), np.hanning(32))
    power = (np.abs(np.fft.fft2(grey * window))**2).mean(0)
    f = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32))
    band = (f > 0.08) & (f < 0.4)
    assert -3.5 < np.polyfit(np.log(f[band]), np.log(power[band]), 1)[0] < -2
    steps = np.diff(grey, axis=2)
    assert (steps**4).mean() / (steps**2).mean()**2 > 8


def test_a_class_of_leaves_names_hue_and_shape(leaves):
    images, labels = leaves
    sides = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    ground = np.concatenate(sides, 1).mean(1, dtype=float)         # the border's colour
    assert LEAVES[0] == "circle on warm" and LEAVES[-1] == "star on cold"
    redder = ground[:, 0] > ground[:, 2]
    assert np.mean(redder == (labels < len(SHAPES))) > 0.8
    contrast = np.abs(images - ground[:, None, None]).mean(-1)     # where the object is

    def in_the_middle(*shapes: str) -> float:
        """The mean contrast there, compared with the upper edge's."""
        chosen = np.isin(labels % 8, [SHAPES.index(shape) for shape in shapes])
        mean = contrast[chosen].mean(0)
        return mean[8:24, 8:24].mean() / mean[:3].mean()

    assert in_the_middle("circle", "square", "hexagon") > in_the_middle("diamond", "star", "cross")
