"""Rendered characters in random looks: thick, thin, leaning, turned, warped. No file is needed.

`render` draws looks from a Style. `render_captioned` draws weight and slant as a caption says.
`render_pen` draws the middle lines of the characters as a pen would.
"""

import functools
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

Range = tuple[float, float]
Look = dict[str, float]


@dataclass(frozen=True)
class Style:
    """Ranges that each glyph's looks are drawn from; lengths in pixels of the 28x28 image."""
    height: Range     # size of the longer side
    aspect: Range     # width is multiplied by this
    rotation: Range   # degrees
    shear: Range      # 0.3 leans right by 0.3 pixel per pixel of height
    weight: Range     # added to each side of the stroke
    softness: Range   # width of the stroke's blurred edge
    warp: Range       # standard deviation of the elastic displacement


STYLES = {
    "letters": Style(height=(16, 21), aspect=(0.7, 1.2), rotation=(-15, 15), shear=(-0.35, 0.45),
                     weight=(-0.5, 1.0), softness=(0.8, 2.0), warp=(0.0, 1.6)),
    "digits": Style(height=(20, 21), aspect=(0.9, 1.1), rotation=(-5, 5), shear=(0.15, 0.35),
                    weight=(0.4, 1.0), softness=(1.2, 2.0), warp=(0.3, 0.8)),   # bold, leaning
}

# Ranges of looks of letters written with a pen. They are general knowledge of handwriting and were
# measured on no data. thickness is the stroke's. roundness is the corners', from 0 to 1. warp and
# wobble are long and short waves of the hand, in letter sizes.
PEN = {"aspect": (0.45, 1.15), "rotation": (-12, 12), "shear": (-0.3, 0.7),
       "thickness": (1.2, 4.0), "softness": (0.9, 1.4), "roundness": (0.0, 1.0),
       "warp": (0.0, 0.15), "wobble": (0.0, 0.02)}
VARIED_PEN = {**PEN, "flourishes": (0.0, 1.6)}   # how many bars and loops to add, rounded down

# Words of captions, and what they mean for a glyph's weight and shear. The ranges do not touch.
WEIGHTS = {"thin": (-0.6, -0.3), "medium": (0.15, 0.45), "bold": (1.0, 1.4)}
SLANTS = {"leaning left": (-0.5, -0.3), "upright": (-0.08, 0.08), "leaning right": (0.3, 0.5)}
COMBINATIONS = [(weight, slant) for weight in WEIGHTS for slant in SLANTS]
CAPTIONED_STYLE = Style(height=(17, 20), aspect=(0.85, 1.15), rotation=(-3, 3), shear=(0, 0),
                        weight=(0, 0), softness=(1.0, 1.6), warp=(0.0, 0.8))

# (y, x) of each pixel from the middle of the 28x28 image, [2, 28, 28].
PIXELS = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), 0) - 13.5


@functools.cache   # treat the array as read-only
def signed_distance(character: str, size: int = 80) -> np.ndarray:
    """Distance to the outline of a character in a font `size` pixels high, positive inside.

    float64 [2 size, 2 size], in pixels, with the character in the middle.
    """
    font = ImageFont.load_default(size)
    canvas = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size, size), character, fill=255, font=font, anchor="mm")
    inside = np.asarray(canvas) > 127
    rows, columns = np.nonzero(inside)
    centre = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    shift = [size - c for c in centre]
    inside = ndimage.shift(inside.astype(np.uint8), shift, order=0).astype(bool)
    return ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)


def shuffled_labels(count: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [count]: every class as often as the others, to one, in random order."""
    labels = np.arange(count) % classes
    rng.shuffle(labels)
    return labels


def random_looks(ranges: dict[str, Range], count: int, rng: np.random.Generator) -> list[Look]:
    """Of each of `count` glyphs every look, uniform in its range."""
    drawn = {name: rng.uniform(*limits, size=count) for name, limits in ranges.items()}
    return [{name: values[i] for name, values in drawn.items()} for i in range(count)]


def rotation(degrees: float) -> np.ndarray:
    """The 2x2 matrix that rotates by this angle."""
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


# ---- characters of a font ----------------------------------------------------------------------

def render(characters: Sequence[str], style: Style, count: int,
           seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`count` glyphs of random characters in random looks.

    Returns images uint8 [count, 28, 28] and labels int64 [count].
    """
    rng = np.random.default_rng(seed)
    maps = [signed_distance(c) for c in characters]
    extents = [int(max(np.ptp(np.argwhere(m > 0), axis=0) + 1)) for m in maps]
    labels = shuffled_labels(count, len(characters), rng)
    looks = random_looks(vars(style), count, rng)
    images = np.empty((count, 28, 28), np.uint8)
    progress = tqdm(looks, desc="rendering glyphs", unit_scale=True, disable=count < 5_000)
    for i, look in enumerate(progress):
        images[i] = draw_glyph(maps[labels[i]], extents[labels[i]], look, rng)
    return images, labels


def draw_glyph(distance: np.ndarray, extent: int, look: Look,
               rng: np.random.Generator) -> np.ndarray:
    """One glyph, float64 [28, 28] from 0 to 255, of a distance map whose longer side is `extent`.

    Every pixel looks up the map at its affinely and elastically displaced position. The distance
    there, shifted by the stroke's weight, becomes ink through a soft edge.
    """
    scale = extent / look["height"]                              # map pixels per image pixel
    lean = np.array([[1.0, 0.0], [look["shear"], 1.0]])          # x of the map grows as y falls
    stretch = np.diag([1.0, 1.0 / look["aspect"]])
    noise = rng.standard_normal((2, 28, 28), np.float32)
    warp = ndimage.gaussian_filter(noise, (0, 5, 5), truncate=2.0)
    moved = PIXELS + warp * (look["warp"] / warp.std()) - rng.uniform(-1.5, 1.5, (2, 1, 1))
    where = np.tensordot(stretch @ lean @ rotation(look["rotation"]), moved, axes=1) * scale
    where = where + len(distance) / 2 - 0.5
    depth = ndimage.map_coordinates(distance, where, order=1, mode="nearest") / scale
    return np.clip(0.5 + (depth + look["weight"]) / look["softness"], 0.0, 1.0) * 255


# ---- characters written with a pen -------------------------------------------------------------

def thin(inside: np.ndarray) -> np.ndarray:
    """The lines, about a pixel wide, that the strokes of a shape shrink to.

    bool [H, W], as `inside`, whose border must be empty. Zhang and Suen 1984: pixels of the lower
    right and the upper left edge are peeled off in turn, except where a pixel ends a line or joins
    two pieces of its ring of neighbours.
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


@functools.cache   # treat the array as read-only
def middle_lines(name: str) -> np.ndarray:
    """Points [2, N, 2] (y, x) on the middle lines of a character: sharp, and with round corners.

    `name` is a character or one of TURNED_LETTERS. Its box is centred, its longer side 1. A rounded
    point is the mean of the points around it.
    """
    character, _, form = name.partition(" ")
    points = np.argwhere(thin(signed_distance(character) > 0)) * np.array(FORMS[form], float)
    points = centred(points) / np.ptp(points, axis=0).max()
    # A hurried hand, too, shortens ends and bends bars towards the strokes that they meet.
    near = np.exp(-((points[:, None] - points) ** 2).sum(-1) / (2 * 0.12**2))
    return np.stack([points, near @ points / near.sum(1, keepdims=True)])


def flourish(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The points [N, 2] (y, x) of a letter of size 1, and a bar or loop more: [M, 2].

    A bar comes twice as often as a loop. Hands differ in such strokes. So one letter comes in
    several forms, and a model has to learn to pick one.
    """
    any_one = rng.choice(points)
    kind, along = rng.choice(["bar", "bar", "loop"]), np.linspace(-1, 1, 30)[:, None]
    if kind == "bar":     # across a stroke, or a foot or a head
        angle = rng.normal(0, 0.4)
        lowest, highest = points[points[:, 0].argmax()], points[points[:, 0].argmin()]
        centre = (lowest, highest, any_one, any_one)[rng.integers(4)]
        bar = along * rng.uniform(0.1, 0.35) * [np.sin(angle), np.cos(angle)]
        return np.concatenate([points, centre + bar])
    radii, where = rng.uniform(0.06, 0.22, 2), rng.uniform(0, 2 * np.pi)
    centre = any_one + radii * [np.sin(where), np.cos(where)]     # the loop touches the letter
    loop = radii * np.hstack([np.sin(np.pi * along), np.cos(np.pi * along)])
    return np.concatenate([points, centre + loop])


def render_pen(characters: Sequence[str], ranges: dict[str, Range], count: int,
               seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` characters, or TURNED_LETTERS, as written with a pen; `ranges` as PEN, VARIED_PEN.

    Returns images uint8 [count, 28, 28] and labels int64 [count].
    """
    rng = np.random.default_rng(seed)
    lines = [middle_lines(c) for c in characters]
    labels = shuffled_labels(count, len(characters), rng)
    looks = random_looks(ranges, count, rng)
    images = np.empty((count, 28, 28), np.uint8)
    progress = tqdm(looks, desc="writing letters", unit_scale=True, disable=count < 5_000)
    for i, look in enumerate(progress):
        images[i] = ink_of(pen_path(*lines[labels[i]], look, rng), look)
    return images, labels


def pen_path(sharp: np.ndarray, rounded: np.ndarray, look: Look,
             rng: np.random.Generator) -> np.ndarray:
    """The points [N, 2] (y, x) that the pen passes, in pixels, from `middle_lines`.

    The points move, not the image. So a narrow letter's strokes stay as thick as the pen is. With
    the pen's thickness the longer side is 20 pixels, as MNIST's authors describe it.
    """
    lean = np.array([[1.0, 0.0], [-look["shear"], 1.0]])         # x grows as y falls
    points = sharp + look["roundness"] * (rounded - sharp)
    for _ in range(int(look.get("flourishes", 0))):
        points = flourish(points, rng)
    points = points @ (rotation(look["rotation"]) @ lean @ np.diag([1.0, look["aspect"]])).T
    # The highest frequency is in radians per letter size.
    for size, highest in ((look["warp"], 5.0), (look["wobble"], 12.0)):
        waves = rng.uniform(-highest, highest, (2, 4))
        phases = rng.uniform(0, 2 * np.pi, 4)
        points = points + size * np.sin(points @ waves + phases) @ rng.normal(0, 0.5, (4, 2))
    points *= (20 - look["thickness"]) / np.ptp(points, axis=0).max()
    return centred(points).astype(np.float32)


def ink_of(points: np.ndarray, look: Look) -> np.ndarray:
    """The ink of a pen that passes the points [N, 2]: float64 [28, 28] from 0 to 255.

    The image moves by whole pixels until its centre of mass is in the middle, as in MNIST.
    """
    pixels = np.moveaxis(PIXELS, 0, -1).reshape(784, 2).astype(np.float32)
    own_squares = (pixels**2).sum(1)[:, None]
    squares = own_squares + (points**2).sum(1) - 2 * pixels @ points.T     # of distances [784, N]
    depth = look["thickness"] / 2 - np.sqrt(np.maximum(squares.min(1), 0))
    ink = np.clip(0.5 + depth / look["softness"], 0.0, 1.0).reshape(28, 28)
    centre = np.array(ndimage.center_of_mass(ink))
    off_centre = np.rint(centre - 13.5).clip(-3, 3)   # 3 is the border
    return np.roll(ink, tuple(-off_centre.astype(int)), (0, 1)) * 255


# ---- characters with captions ------------------------------------------------------------------

def caption(kind: str, character: str, weight: str, slant: str) -> str:
    """Content and style in words: "a thin digit 7 leaning right"; kind is "letter" or "digit"."""
    return f"a {weight} {kind} {character} {slant}"


def held_out(digit: str, weight: str, slant: str) -> bool:
    """Whether the private training data lack this combination.

    Each digit lacks two of its nine combinations, and digits differ in which.
    """
    return (COMBINATIONS.index((weight, slant)) - int(digit)) % 9 in (0, 4)


def render_captioned(kind: str, count: int, seed: int,
                     complete: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` captioned glyphs; kind is "letter" or "digit".

    Returns images uint8 [count, 28, 28], labels int64 [count] and captions str [count]. All nine
    combinations of weight and slant are equally frequent. Unless `complete`, what is held_out is
    left out.
    """
    characters = LETTERS if kind == "letter" else string.digits
    parts = []
    progress = tqdm(COMBINATIONS, desc="rendering captioned glyphs")
    for number, (weight, slant) in enumerate(progress):
        chosen = [c for c in characters if complete or not held_out(c, weight, slant)]
        style = replace(CAPTIONED_STYLE, weight=WEIGHTS[weight], shear=SLANTS[slant])
        images, labels = render(chosen, style, (count + number) // 9, (seed, number))
        labels = np.array([characters.index(c) for c in chosen])[labels]
        captions = [caption(kind, characters[k], weight, slant) for k in labels]
        parts.append((images, labels, captions))
    images, labels, captions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.random.default_rng(seed).permutation(count)
    return images[order], labels[order], captions[order]
