"""Rendered characters in random looks: thick and thin, leaning, turned, stretched, warped. No file is needed.

`render` draws looks from a Style; `render_captioned` draws weight and slant as a caption says; `render_pen` draws the
middle lines of the characters as a pen would.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm import tqdm

LETTERS = string.ascii_uppercase + string.ascii_lowercase
# Signs of y and x. A turned L looks like a 7, a mirrored E like a 3.
FORMS = {"": (1, 1), "mirrored": (1, -1), "turned": (-1, -1), "flipped": (-1, 1)}
TURNED_LETTERS = [f"{letter} {form}".strip() for form in FORMS for letter in LETTERS]


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

# The same for letters written with a pen: thickness is the stroke's, roundness the corners' (0 to 1), warp and wobble
# are long and short waves of the hand in letter sizes. General knowledge of handwriting: measured on no data.
PEN = {"aspect": (0.45, 1.15), "rotation": (-12, 12), "shear": (-0.3, 0.7), "thickness": (1.2, 4.0),
       "softness": (0.9, 1.4), "roundness": (0.0, 1.0), "warp": (0.0, 0.15), "wobble": (0.0, 0.02)}
VARIED_PEN = {**PEN, "flourishes": (0.0, 1.6)}   # how many bars and loops are added, rounded down

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


def thin(inside: np.ndarray) -> np.ndarray:
    """The lines, about a pixel wide, that the strokes of a shape shrink to: bool [H, W], as `inside`; empty border.

    Zhang and Suen 1984: peels off pixels of the lower right and the upper left edge in turn, but none that ends a
    line or joins two pieces of its ring of neighbours.
    """
    inside, before = inside.copy(), None
    while before is None or (inside != before).any():
        before = inside.copy()
        for turn in (0, 2):
            ring = [np.roll(inside, shift, (0, 1)) for shift in     # above, then clockwise
                    ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))]
            above, right, below, left = np.roll(ring[::2], -turn, axis=0)
            neighbours = np.sum(ring, axis=0)
            pieces = sum(~a & b for a, b in zip(ring, ring[1:] + ring[:1], strict=True))
            edge = ~(right & below & (above | left))
            inside &= ~((neighbours >= 2) & (neighbours <= 6) & (pieces == 1) & edge)
    return inside


def centred(points: np.ndarray) -> np.ndarray:
    """Points [N, 2], moved so that the middle of their box is at the origin."""
    return points - (points.min(0) + points.max(0)) / 2


def middle_lines(name: str) -> np.ndarray:
    """Points [2, N, 2] (y, x) on the middle lines of a character's strokes: as they are, and with corners rounded.

    `name` is the character, or one of TURNED_LETTERS. Its box is centred, its longer side 1. A rounded point is a mean
    of those around it.
    """
    character, _, form = name.partition(" ")
    points = np.argwhere(thin(signed_distance(character) > 0)) * np.array(FORMS[form], float)
    points = centred(points) / np.ptp(points, axis=0).max()
    # Also shortens ends and bends bars towards the strokes that they meet, as a hurried hand does.
    near = np.exp(-((points[:, None] - points) ** 2).sum(-1) / (2 * 0.12**2))
    return np.stack([points, near @ points / near.sum(1, keepdims=True)])


def flourish(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points [N, 2] (y, x) of a letter of size 1 with a bar or, half as often, a loop more: [M, 2].

    Hands differ in such things, so the same letter comes in several forms, of which a model has to learn to pick one.
    """
    any_one = rng.choice(points)
    kind, along = rng.choice(["bar", "bar", "loop"]), np.linspace(-1, 1, 30)[:, None]
    if kind == "bar":     # across a stroke, or a foot or a head
        angle = rng.normal(0, 0.4)
        lowest, highest = points[points[:, 0].argmax()], points[points[:, 0].argmin()]
        centre = (lowest, highest, any_one, any_one)[rng.integers(4)]
        return np.concatenate([points, centre + along * rng.uniform(0.1, 0.35) * [np.sin(angle), np.cos(angle)]])
    radii, where = rng.uniform(0.06, 0.22, 2), rng.uniform(0, 2 * np.pi)
    centre = any_one + radii * [np.sin(where), np.cos(where)]     # the loop touches the letter
    return np.concatenate([points, centre + radii * np.hstack([np.sin(np.pi * along), np.cos(np.pi * along)])])


def render_pen(characters: Sequence[str], looks: dict[str, tuple[float, float]], count: int,
               seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` characters (or TURNED_LETTERS) as written with a pen: images uint8 [count, 28, 28], labels [count].

    `looks` are like PEN or VARIED_PEN.

    The points of the middle lines move, not the image, so a narrow letter's strokes stay as thick as the pen is.
    Size and place are those of MNIST as its authors describe them: 20 pixels for the longer side, then moved by
    whole pixels so that the centre of mass is in the middle.
    """
    rng = np.random.default_rng(seed)
    lines = [middle_lines(c) for c in characters]
    labels = np.arange(count) % len(characters)
    rng.shuffle(labels)
    drawn = {name: rng.uniform(*limits, size=count) for name, limits in looks.items()}
    pixels = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), -1).reshape(784, 2) - 13.5
    pixels = pixels.astype(np.float32)                               # [784, 2]: y, x
    own_squares = (pixels**2).sum(1)[:, None]
    images = np.empty((count, 28, 28), np.uint8)
    for i in tqdm(range(count), desc="writing letters", unit_scale=True, disable=count < 5_000):
        look = {name: values[i] for name, values in drawn.items()}
        angle = np.deg2rad(look["rotation"])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        lean = np.array([[1.0, 0.0], [-look["shear"], 1.0]])         # x grows as y falls
        sharp, rounded = lines[labels[i]]
        points = sharp + look["roundness"] * (rounded - sharp)
        for _ in range(int(look.get("flourishes", 0))):
            points = flourish(points, rng)
        points = points @ (turn @ lean @ np.diag([1.0, look["aspect"]])).T
        for size, frequency in ((look["warp"], 5.0), (look["wobble"], 12.0)):   # at most, in radians per letter size
            waves = rng.uniform(-frequency, frequency, (2, 4))
            points = points + size * np.sin(points @ waves + rng.uniform(0, 2 * np.pi, 4)) @ rng.normal(0, 0.5, (4, 2))
        points *= (20 - look["thickness"]) / np.ptp(points, axis=0).max()
        points = centred(points).astype(np.float32)
        squares = own_squares + (points**2).sum(1) - 2 * pixels @ points.T     # of distances [784, N]
        depth = look["thickness"] / 2 - np.sqrt(np.maximum(squares.min(1), 0))
        ink = np.clip(0.5 + depth / look["softness"], 0.0, 1.0).reshape(28, 28)
        off_centre = np.rint(np.array(ndimage.center_of_mass(ink)) - 13.5).clip(-3, 3)   # 3 is the border
        images[i] = np.roll(ink, tuple(-off_centre.astype(int)), (0, 1)) * 255
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
