"""Rendered pictures in colour. No file is needed.

"scenes" and "scenes-private" are 256x256: a letter, digit or shape on a textured background. The
public set has letters and shapes in six colours, on light and dark backgrounds. The private set has
digits, other shapes and other colours, on dark backgrounds. Captions name colour, object and
texture: "a red letter A on a striped background".

"leaves" are 32x32: dead leaves, which have the statistics of photographs.
"""

import string
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from tqdm import tqdm

from datasets.glyphs import shuffled_labels, signed_distance

SIZE = 256
TEXTURES = ("striped", "checked", "dotted", "cloudy")


@dataclass(frozen=True)
class Kind:
    """What the pictures of one source show; colours are RGB from 0 to 1."""
    shapes: tuple[str, ...]
    characters: str
    word: str                           # what captions call a character
    colours: dict[str, tuple[float, float, float]]
    brightness: tuple[float, float]     # range of the background's

    @property
    def classes(self) -> list[str]:
        return [*self.shapes, *self.characters]

    def caption(self, label: int, colour: int, texture: int) -> str:
        name, thing = list(self.colours)[colour], self.classes[label]
        if thing in self.characters:
            thing = f"{self.word} {thing}"
        article = "an" if name[0] in "aeiou" else "a"
        return f"{article} {name} {thing} on a {TEXTURES[texture]} background"


KINDS = {
    "scenes": Kind(
        ("circle", "triangle", "square", "diamond"), "ABEOSTZblq", "letter",
        {"red": (0.90, 0.10, 0.10), "green": (0.10, 0.70, 0.15), "blue": (0.10, 0.20, 0.95),
         "yellow": (0.95, 0.90, 0.10), "cyan": (0.10, 0.90, 0.95), "magenta": (0.95, 0.10, 0.90)},
        (0.2, 0.8)),
    "scenes-private": Kind(
        ("hexagon", "heart", "cross", "star"), string.digits, "digit",
        {"orange": (1.00, 0.55, 0.05), "purple": (0.55, 0.10, 0.85),
         "teal": (0.05, 0.60, 0.55), "pink": (1.00, 0.40, 0.65)}, (0.2, 0.35)),
}


def outline(shape: str) -> np.ndarray:
    """Corners (x, y) [n, 2] of a shape about the origin, y pointing down, at most 1 away."""
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 80)
        y = 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t)
        return np.stack([16 * np.sin(t)**3, y], 1) / 17
    if shape == "cross":
        quarter = np.array([(-0.3, -0.9), (0.3, -0.9), (0.3, -0.3)])
        turned = quarter[:, ::-1]
        return np.concatenate([quarter, turned * [-1, 1], -quarter, turned * [1, -1]])
    return {"circle": star(80), "triangle": star(3), "square": star(4, turn=0.125),
            "diamond": star(4, 0.6), "hexagon": star(6), "star": star(10, 0.4)}[shape]


def star(n: int, inner: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """`n` corners on a circle, every second one moved inwards; turn in turns."""
    angles = 2 * np.pi * (np.arange(n) / n + turn)
    radii = np.where(np.arange(n) % 2, inner, 1.0)[:, None]
    return radii * np.stack([np.sin(angles), -np.cos(angles)], 1)


def distance_map(thing: str) -> np.ndarray:
    """Distance to the outline of a character or shape, positive inside: [256, 256], in pixels."""
    if len(thing) == 1:
        return signed_distance(thing, 128)
    canvas = Image.new("L", (256, 256))
    corners = [(x, y) for x, y in 127.5 + 55 * outline(thing)]
    ImageDraw.Draw(canvas).polygon(corners, fill=1)
    inside = np.asarray(canvas).astype(bool)
    return ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)


def texture(name: str, rng: np.random.Generator) -> np.ndarray:
    """A random background of that name, float32 [SIZE, SIZE] from 0 to 1."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(40, 72)
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    if name == "cloudy":
        noise = Image.fromarray(rng.standard_normal((8, 8), np.float32))
        blobs = noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return np.clip(0.5 + 0.3 * np.asarray(blobs), 0, 1)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    steps = np.arange(SIZE, dtype=np.float32) * np.float32(2 * np.pi / period)
    y, x = steps[:, None], steps[None, :]
    along = cosine * x + sine * y + phase[0]
    across = cosine * y - sine * x + phase[1]
    if name == "striped":
        wave = np.sin(along)
    elif name == "checked":
        wave = np.sin(along) * np.sin(across)
    else:
        wave = np.sin(along) + np.sin(across) - 0.9
    return np.clip(0.5 + 3 * wave, 0, 1)


def render(kind: Kind, count: int,
           seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`count` pictures: uint8 [count, 256, 256, 3], and their labels, colours and textures.

    The last three are int64 [count], as `Kind.caption` takes them.
    """
    rng = np.random.default_rng(seed)
    maps = [distance_map(thing) for thing in kind.classes]
    extents = [np.ptp(np.argwhere(m > 0), axis=0).max() + 1 for m in maps]
    labels = shuffled_labels(count, len(maps), rng)
    colours = rng.integers(len(kind.colours), size=count)
    textures = rng.integers(len(TEXTURES), size=count)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(count), desc="rendering scenes", unit_scale=True, disable=count < 500):
        ink = draw_object(maps[labels[i]], extents[labels[i]], rng)
        light = rng.uniform(*kind.brightness) + rng.uniform(0.06, 0.12) * np.array([[-1], [1]])
        dark_tone, light_tone = (light + rng.uniform(-0.04, 0.04, (2, 3))).astype(np.float32)
        paint = np.array(list(kind.colours.values())[colours[i]]) + rng.uniform(-0.05, 0.05, 3)
        pattern = texture(TEXTURES[textures[i]], rng)[..., None]
        ground = dark_tone + pattern * (light_tone - dark_tone)
        images[i] = (ground + ink * (paint.clip(0, 1).astype(np.float32) - ground)) * 255
    return images, labels, colours, textures


def draw_object(distance: np.ndarray, extent: int, rng: np.random.Generator) -> np.ndarray:
    """Where there is paint, [SIZE, SIZE, 1] from 0 to 1: an object whose longer side is `extent`.

    There is paint where the distance map is positive after it was turned, moved and scaled.
    """
    scale = extent / rng.uniform(125, 175)   # map pixels per image pixel
    angle = rng.uniform(-0.2, 0.2)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (SIZE - 1) / 2 + rng.uniform(-20, 20, 2)
    depth = ndimage.affine_transform(distance, turn, 127.5 - turn @ centre, (SIZE, SIZE),
                                     np.float32, order=1, mode="nearest") / np.float32(scale)
    bolder = np.float32(rng.uniform(2, 6))   # image pixels, on either side of a stroke
    return np.clip(0.5 + (depth + bolder) / 2, 0, 1)[..., None]


# ---- dead leaves -------------------------------------------------------------------------------

SHAPES = ("circle", "triangle", "square", "diamond", "hexagon", "heart", "cross", "star")
GROUNDS = {"warm": (-0.15, 0.30), "cold": (0.30, 0.85)}   # hues in turns: red 0, green 1/3
LEAVES = [f"{shape} on {ground}" for ground in GROUNDS for shape in SHAPES]
OUTLINES = [outline(shape) for shape in SHAPES]
CANVAS = 64   # drawn at twice the size, then halved, which smooths the edges


def clouds(count: int, rng: np.random.Generator) -> np.ndarray:
    """Coloured noise, float32 [count, CANVAS, CANVAS, 3].

    Its amplitude is 1/f^a with a random a, its mean 0, its deviation 1; it is periodic.
    """
    fy, fx = np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS)
    f = np.hypot(fy, fx)
    f[0, 0] = np.inf
    white = rng.standard_normal((count, CANVAS, CANVAS, 4))
    falloff = f[..., None] ** rng.uniform(0.6, 1.8, (count, 1, 1, 1))
    noise = np.fft.irfft2(np.fft.rfft2(white, axes=(1, 2)) / falloff, axes=(1, 2))
    # Grey more than coloured.
    noise = noise[..., :1] + rng.exponential(0.3, (count, 1, 1, 1)) * noise[..., 1:]
    return (noise / noise.std((1, 2, 3), keepdims=True)).astype(np.float32)


def paints(hues: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random colours of these hues [n], RGB [n, 3] from 0 to 1.

    They are pale more often than not, and light as often as dark.
    """
    saturation = rng.beta(1.2, 2.6, (len(hues), 1))
    value = rng.uniform(0.08, 1, (len(hues), 1))
    k = (6 * hues[:, None] + np.array([5, 3, 1])) % 6
    return value - value * saturation * np.minimum(k, 4 - k).clip(0, 1)


def corners_of(shape: np.ndarray, radius: float, centre: np.ndarray, turn: float,
               rng: np.random.Generator) -> list[float]:
    """A shape [n, 2] from `outline`, `radius` pixels large, turned and stretched at random.

    turn: radians by which it may turn either way. Returns x, y, x, y, ... in pixels of the canvas,
    about `centre` (x, y).
    """
    angle, stretch = rng.uniform(-turn, turn), rng.uniform(0.6, 1)
    lying = rng.random() < 0.7
    size = [radius, radius * stretch] if lying else [radius * stretch, radius]
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (shape * size @ rotation + centre).ravel().tolist()


def dead_leaves(count: int, hue: float, bank: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`count` shapes fallen on each other, most of about one hue, in turns.

    float64 [CANVAS, CANVAS, 3], not clipped; `bank` is from `clouds`. Radii have the density r^-3:
    then occluding shapes look alike at all scales, as photographs do (Lee, Mumford and Huang 2001).
    Each leaf has a colour with a gradient, and clouds or stripes of its own on it.
    """
    leaf = fallen_leaves(count, rng)
    n = count + 1
    hues = np.where(rng.random(n) < 0.8, hue + rng.normal(0, 0.06, n), rng.random(n))
    hues[0] = hue
    y, x = np.indices(leaf.shape)
    shift = rng.integers(CANVAS, size=(2, n))
    slope_y, slope_x = rng.normal(0, 0.2 / CANVAS, (2, n))
    shifted = (y + shift[0][leaf]) % CANVAS, (x + shift[1][leaf]) % CANVAS
    grain = bank[(rng.integers(len(bank), size=n)[leaf], *shifted)]
    wave_y, wave_x = rng.normal(0, 0.5, (2, n))
    stripes = np.sin(wave_y[leaf] * y + wave_x[leaf] * x)
    stripes = stripes * np.where(rng.random(n) < 0.2, 0.12, 0)[leaf]
    shade = slope_y[leaf] * (y - CANVAS / 2) + slope_x[leaf] * (x - CANVAS / 2) + stripes
    colours = paints(hues, rng)[leaf] + shade[..., None]
    return colours + rng.exponential(0.07, n)[leaf][..., None] * grain


def fallen_leaves(count: int, rng: np.random.Generator) -> np.ndarray:
    """The number of the leaf on top, uint8 [CANVAS, CANVAS]; 0 is the ground."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(canvas)
    radii = 3 / np.sqrt(1 - rng.random(count) * (1 - (3 / 32) ** 2))   # from 3 to 32
    for k, radius in enumerate(radii, 1):
        shape = OUTLINES[rng.integers(len(OUTLINES))]
        draw.polygon(corners_of(shape, radius, rng.uniform(0, CANVAS, 2), np.pi, rng), fill=k)
    return np.asarray(canvas)


def picture_of_leaves(label: int, bank: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One picture of the class `label`, uint8 [32, 32, 3]; `bank` is from `clouds`.

    A large shape, filled with leaves, stands before other leaves, which are out of focus.
    """
    ground, shape = divmod(label, len(SHAPES))
    hue = rng.uniform(*list(GROUNDS.values())[ground])
    behind = dead_leaves(int(60 * rng.random() ** 2), hue, bank, rng)
    before = dead_leaves(int(15 * rng.random() ** 2), rng.random(), bank, rng)
    behind, before = (Image.fromarray((255 * layer.clip(0, 1)).astype(np.uint8))
                      for layer in (behind, before))
    mask, centre = Image.new("L", (CANVAS, CANVAS)), CANVAS / 2 + rng.normal(0, 5, 2)
    corners = corners_of(OUTLINES[shape], rng.uniform(18, 34), centre, 0.4, rng)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    behind = behind.filter(ImageFilter.GaussianBlur(rng.exponential(1.2)))
    soft = ImageFilter.GaussianBlur(rng.exponential(0.6))
    behind.paste(before.filter(soft), mask=mask.filter(soft))
    return np.asarray(behind.reduce(2))


def render_leaves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 32, 32, 3] and labels int64 [count], indices into LEAVES.

    Dead leaves (Ruderman 1997) are a known stand-in for photographs in pre-training (Baradad et al.
    2021). The label names the shape in front and the ground's hue, so a class decides form as well
    as colour. Picture i depends on the seed, its label and i only: any one can be rendered alone.
    """
    rng = np.random.default_rng(seed)
    bank = clouds(256, rng)
    labels = shuffled_labels(count, len(LEAVES), rng)
    progress = tqdm(labels, desc="rendering leaves", unit_scale=True, disable=count < 2_000)
    images = [picture_of_leaves(label, bank, np.random.default_rng((seed, i)))
              for i, label in enumerate(progress)]
    return np.stack(images), labels
