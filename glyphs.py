"""Rendered characters in random looks: thick and thin, leaning, turned, stretched, warped. No file is needed.

`render` draws looks from a Style; `render_captioned` draws weight and slant as a caption says.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm import tqdm

LETTERS = string.ascii_uppercase + string.ascii_lowercase


@dataclass(frozen=True)
class Style:
    """Ranges that each glyph's looks are drawn from; lengths in pixels of the 28x28 image."""
    height: tuple[float, float]     # size of the longer side
    aspect: tuple[float, float]     # width is multiplied by this
    rotation: tuple[float, float]   # degrees
    shear: tuple[float, float]      # 0.3 leans right by 0.3 pixel per pixel of height
    weight: tuple[float, float]     # added to each side of the stroke
    softness: tuple[float, float]   # width of the stroke's blurred edge
    warp: tuple[float, float]       # standard deviation of the elastic displacement


STYLES = {
    "letters": Style((16, 21), (0.7, 1.2), (-15, 15), (-0.35, 0.45), (-0.5, 1.0), (0.8, 2.0), (0.0, 1.6)),
    "digits": Style((20, 21), (0.9, 1.1), (-5, 5), (0.15, 0.35), (0.4, 1.0), (1.2, 2.0), (0.3, 0.8)),   # bold, leaning
}

# Words of captions, and what they mean for the weight and the shear of a glyph. The ranges do not touch.
WEIGHTS = {"thin": (-0.6, -0.3), "medium": (0.15, 0.45), "bold": (1.0, 1.4)}
SLANTS = {"leaning left": (-0.5, -0.3), "upright": (-0.08, 0.08), "leaning right": (0.3, 0.5)}
COMBINATIONS = [(weight, slant) for weight in WEIGHTS for slant in SLANTS]
CAPTIONED_STYLE = Style((17, 20), (0.85, 1.15), (-3, 3), (0, 0), (0, 0), (1.0, 1.6), (0.0, 0.8))


def signed_distance(character: str, size: int = 80) -> np.ndarray:
    """Distance to the outline of a rendered character, positive inside, in pixels of a 2*size canvas."""
    font = ImageFont.load_default(size)
    canvas = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size, size), character, fill=255, font=font, anchor="mm")
    inside = np.asarray(canvas) > 127
    rows, columns = np.nonzero(inside)
    centre = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    inside = ndimage.shift(inside.astype(np.uint8), [size - c for c in centre], order=0).astype(bool)
    return ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)


def render(characters: Sequence[str], style: Style, count: int,
           seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`count` glyphs of random characters in random looks: images uint8 [count, 28, 28], labels [count].

    Every image looks up its character's distance map at the affinely and elastically displaced pixel
    positions; the distance, shifted by the stroke weight, becomes ink through a soft edge.
    """
    rng = np.random.default_rng(seed)
    maps = [signed_distance(c) for c in characters]
    extents = [np.ptp(np.argwhere(m > 0), axis=0) + 1 for m in maps]
    labels = np.arange(count) % len(characters)
    rng.shuffle(labels)
    looks = {name: rng.uniform(*limits, size=count) for name, limits in vars(style).items()}
    pixels = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), 0) - 13.5     # [2, 28, 28]: y, x
    images = np.empty((count, 28, 28), np.uint8)
    for i in tqdm(range(count), desc="rendering glyphs", unit_scale=True, disable=count < 5_000):
        look = {name: values[i] for name, values in looks.items()}
        distance, extent = maps[labels[i]], extents[labels[i]]
        scale = extent.max() / look["height"]                        # map pixels per image pixel
        angle = np.deg2rad(look["rotation"])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        lean = np.array([[1.0, 0.0], [look["shear"], 1.0]])          # x of the map grows as y falls
        stretch = np.diag([1.0, 1.0 / look["aspect"]])
        warp = ndimage.gaussian_filter(rng.standard_normal((2, 28, 28), np.float32), (0, 5, 5), truncate=2.0)
        moved = pixels + warp * (look["warp"] / warp.std()) - rng.uniform(-1.5, 1.5, (2, 1, 1))
        where = np.tensordot(stretch @ lean @ turn, moved, axes=1) * scale + len(distance) / 2 - 0.5
        depth = ndimage.map_coordinates(distance, where, order=1, mode="nearest") / scale
        ink = 0.5 + (depth + look["weight"]) / look["softness"]
        images[i] = np.clip(ink, 0.0, 1.0) * 255
    return images, labels


def caption(kind: str, character: str, weight: str, slant: str) -> str:
    """Content and style in words: "a thin digit 7 leaning right"; kind is "letter" or "digit"."""
    return f"a {weight} {kind} {character} {slant}"


def held_out(digit: str, weight: str, slant: str) -> bool:
    """Whether the private training data lack this combination: of each digit's nine it is two, not always the same."""
    return (COMBINATIONS.index((weight, slant)) - int(digit)) % 9 in (0, 4)


def render_captioned(kind: str, count: int, seed: int, complete: bool) -> tuple[np.ndarray, ...]:
    """`count` captioned glyphs, of letters or digits: images uint8 [count, 28, 28], labels [count], captions [count].

    All nine combinations of weight and slant are equally frequent. `complete` False leaves out what is held_out.
    """
    characters = LETTERS if kind == "letter" else string.digits
    parts = []
    for number, (weight, slant) in enumerate(tqdm(COMBINATIONS, desc="rendering captioned glyphs")):
        chosen = [c for c in characters if complete or not held_out(c, weight, slant)]
        style = replace(CAPTIONED_STYLE, weight=WEIGHTS[weight], shear=SLANTS[slant])
        images, labels = render(chosen, style, (count + number) // 9, (seed, number))
        labels = np.array([characters.index(c) for c in chosen])[labels]
        parts.append((images, labels, [caption(kind, characters[k], weight, slant) for k in labels]))
    images, labels, captions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.random.default_rng(seed).permutation(count)
    return images[order], labels[order], captions[order]
