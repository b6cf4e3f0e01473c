"""Street scenes made by code: the built-in data set, in two domains of one geometry.

A scene is a street seen by a camera 1.5 m above the ground: road, pavements, house fronts, fences, trees, poles, signs,
people, cars and trucks, drawn far to near as polygons in perspective. The `source` domain is clean and flat, like a
simple simulator; the `target` domain has other colours, textures, shadows, haze, clutter, blur and sensor noise.
Everything follows from (seed, index, domain); nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ecocseg.data.classes import CLASS_LISTS

CLASSES = CLASS_LISTS["demo"]
HEIGHT, WIDTH = 128, 256
ROAD, SIDEWALK, BUILDING, FENCE, POLE, VEGETATION, SKY, PERSON, CAR, TRUCK, SIGN = range(11)
CAMERA_HEIGHT = 1.5  # metres
FINE = 2  # pictures are drawn this much finer, then averaged down
DOMAINS = {"source": 0, "target": 1}

Domain = Literal["source", "target"]
Point = tuple[float, float]
Rng = np.random.Generator


@dataclass
class Scene:
    """A picture being drawn: each polygon has a class and an entry in a table of colours and depths."""

    rng: Rng
    domain: Domain
    horizon: float
    centre: float
    focal: float
    colours: list[tuple[float, float, float]] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.canvas = Image.new("I", (WIDTH * FINE, HEIGHT * FINE))
        self.pen = ImageDraw.Draw(self.canvas)

    def at(self, x: float, up: float, z: float) -> Point:
        """Pixel of a point x metres to the right, `up` metres above the ground, z metres ahead."""
        return (FINE * (self.centre + self.focal * x / z), FINE * (self.horizon + self.focal * (CAMERA_HEIGHT - up) / z))

    def _entry(self, kind: int, colour: tuple[float, ...], z: float) -> int:
        self.colours.append((colour[0], colour[1], colour[2]))
        self.depths.append(z)
        self.classes.append(kind)
        return len(self.colours) - 1

    def fill(self, points: list[Point], kind: int, colour: tuple[float, ...], z: float) -> None:
        self.pen.polygon([(round(x), round(y)) for x, y in points], fill=self._entry(kind, colour, z))

    def blob(self, x: float, up: float, z: float, width: float, height: float, kind: int, colour: tuple[float, ...]) -> None:
        (left, top), (right, bottom) = self.at(x - width / 2, up + height / 2, z), self.at(x + width / 2, up - height / 2, z)
        self.pen.ellipse([round(left), round(top), round(right), round(bottom)], fill=self._entry(kind, colour, z))

    def upright(self, x: float, z: float, width: float, low: float, high: float, kind: int, colour: tuple[float, ...]) -> None:
        """A rectangle facing the camera."""
        self.fill([self.at(x - width / 2, low, z), self.at(x + width / 2, low, z), self.at(x + width / 2, high, z),
                   self.at(x - width / 2, high, z)], kind, colour, z)


# Typical colour of each class, and how far it varies: (source colour, source spread, target colour, target spread).
LOOKS: dict[int, tuple[tuple[int, int, int], int, tuple[int, int, int], int]] = {
    ROAD: ((98, 98, 104), 10, (94, 90, 88), 18),
    SIDEWALK: ((176, 160, 164), 14, (152, 142, 136), 20),
    BUILDING: ((172, 120, 96), 30, (146, 118, 102), 34),
    FENCE: ((150, 128, 84), 16, (128, 112, 82), 24),
    POLE: ((116, 122, 128), 12, (98, 98, 98), 18),
    VEGETATION: ((70, 138, 58), 20, (74, 104, 52), 24),
    SKY: ((128, 182, 232), 16, (170, 188, 204), 22),
    PERSON: ((206, 92, 88), 38, (150, 84, 80), 42),
    CAR: ((52, 82, 176), 44, (72, 88, 132), 46),
    TRUCK: ((214, 182, 60), 34, (176, 152, 92), 42),
    SIGN: ((232, 214, 36), 18, (204, 174, 50), 32),
}


def _look(scene: Scene, kind: int) -> tuple[float, ...]:
    source, source_spread, target, target_spread = LOOKS[kind]
    colour, spread = (source, source_spread) if scene.domain == "source" else (target, target_spread)
    light = scene.rng.normal(0, spread * 0.7)
    return tuple(float(np.clip(c + light + scene.rng.normal(0, spread * 0.5), 5, 250)) for c in colour)


def _shade(colour: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(min(255.0, c * factor) for c in colour)


def _ground(scene: Scene, road: float, pavement: float) -> None:
    far, near = 400.0, 1.0
    scene.fill([(0, 0), (WIDTH * FINE, 0), (WIDTH * FINE, HEIGHT * FINE), (0, HEIGHT * FINE)], SKY, _look(scene, SKY), 1000)
    verge = VEGETATION if scene.rng.random() < 0.35 else SIDEWALK
    for half, kind in ((300.0, verge), (road + pavement, SIDEWALK), (road, ROAD)):
        colour = _look(scene, kind)
        scene.fill([scene.at(-half, 0, far), scene.at(half, 0, far), scene.at(half, 0, near), scene.at(-half, 0, near)],
                   kind, colour, 0)
    paint = _shade(scene.colours[-1], 1.9 if scene.domain == "source" else 1.5)
    gap, shift = scene.rng.uniform(5, 8), scene.rng.uniform(0, 4)
    for number in range(12):
        z = 3 + shift + gap * number
        scene.fill([scene.at(-0.1, 0, z), scene.at(0.1, 0, z), scene.at(0.1, 0, z + 2.5), scene.at(-0.1, 0, z + 2.5)],
                   ROAD, paint, 0)


def _house(scene: Scene, side: int, wall: float, z: float, length: float) -> None:
    """A house front along the street, and the gable that closes it towards the camera."""
    height, colour = scene.rng.uniform(4.5, 13), _look(scene, BUILDING)
    x, end = side * wall, z + length
    depth = scene.rng.uniform(4, 9)
    scene.fill([scene.at(x, 0, end), scene.at(x, height, end), scene.at(x, height, z), scene.at(x, 0, z)],
               BUILDING, _shade(colour, 0.8), z + length / 2)
    scene.fill([scene.at(x, 0, z), scene.at(x, height, z), scene.at(x + side * depth, height, z),
                scene.at(x + side * depth, 0, z)], BUILDING, colour, z)
    glass = _shade(colour, 0.5 if scene.rng.random() < 0.7 else 1.25)
    step, high = scene.rng.uniform(2.2, 3.4), scene.rng.uniform(1.2, 1.8)
    for up in np.arange(1.2, height - high - 0.3, 3.0):
        for a in np.arange(z + 0.8, end - 1.2, step):
            scene.fill([scene.at(x, up, a), scene.at(x, up + high, a), scene.at(x, up + high, a + 1.1),
                        scene.at(x, up, a + 1.1)], BUILDING, glass, a)
        for out in np.arange(0.7, depth - 1.2, step):
            b = x + side * out
            scene.fill([scene.at(b, up, z), scene.at(b, up + high, z), scene.at(b + side, up + high, z),
                        scene.at(b + side, up, z)], BUILDING, glass, z)


def _fence(scene: Scene, side: int, wall: float, z: float, length: float) -> None:
    height, colour, x = scene.rng.uniform(1.0, 1.7), _look(scene, FENCE), side * wall
    scene.fill([scene.at(x, 0, z + length), scene.at(x, height, z + length), scene.at(x, height, z), scene.at(x, 0, z)],
               FENCE, colour, z + length / 2)
    for a in np.arange(z, z + length, 0.8):
        scene.fill([scene.at(x, 0, a), scene.at(x, height, a), scene.at(x, height, a + 0.15), scene.at(x, 0, a + 0.15)],
                   FENCE, _shade(colour, 0.75), a)


def _tree(scene: Scene, x: float, z: float) -> None:
    colour, trunk = _look(scene, VEGETATION), (84.0, 62.0, 44.0)
    height, crown = scene.rng.uniform(3.5, 7), scene.rng.uniform(2, 3.6)
    scene.upright(x, z, 0.3, 0, height - crown / 3, VEGETATION, trunk)
    for _ in range(6):
        dx, dy, size = scene.rng.normal(0, crown / 5), scene.rng.normal(0, crown / 5), scene.rng.uniform(0.5, 0.9) * crown
        scene.blob(x + dx, height + dy, z, size, size, VEGETATION, _shade(colour, scene.rng.uniform(0.75, 1.2)))


def _bush(scene: Scene, x: float, z: float) -> None:
    colour = _look(scene, VEGETATION)
    for _ in range(4):
        size = scene.rng.uniform(0.8, 1.6)
        scene.blob(x + scene.rng.normal(0, 0.6), size * 0.4, z, size * 1.3, size, VEGETATION,
                   _shade(colour, scene.rng.uniform(0.8, 1.15)))


def _pole(scene: Scene, x: float, z: float) -> None:
    colour, height = _look(scene, POLE), scene.rng.uniform(3.5, 6.5)
    scene.upright(x, z, scene.rng.uniform(0.14, 0.24), 0, height, POLE, colour)
    if scene.rng.random() < 0.5:  # a street lamp's arm
        arm = -math.copysign(scene.rng.uniform(0.8, 1.6), x)
        scene.fill([scene.at(x, height, z), scene.at(x + arm, height, z), scene.at(x + arm, height - 0.16, z),
                    scene.at(x, height - 0.16, z)], POLE, colour, z)


def _sign(scene: Scene, x: float, z: float) -> None:
    height, size, colour = scene.rng.uniform(2.1, 2.8), scene.rng.uniform(0.7, 1.1), _look(scene, SIGN)
    scene.upright(x, z, 0.12, 0, height, POLE, _look(scene, POLE))
    shape = scene.rng.integers(3)
    if shape == 0:
        scene.blob(x, height, z, size, size, SIGN, colour)
        scene.blob(x, height, z, size * 0.55, size * 0.55, SIGN, _shade(colour, 1.4))
    elif shape == 1:
        scene.fill([scene.at(x - size / 2, height - size / 2, z), scene.at(x + size / 2, height - size / 2, z),
                    scene.at(x, height + size / 2, z)], SIGN, colour, z)
    else:
        scene.upright(x, z, size, height - size / 2, height + size / 2, SIGN, colour)
        scene.upright(x, z, size * 0.6, height - 0.1, height + 0.1, SIGN, _shade(colour, 0.5))


def _person(scene: Scene, x: float, z: float) -> None:
    coat, height = _look(scene, PERSON), scene.rng.uniform(1.5, 1.9)
    legs, skin = _shade(coat, scene.rng.uniform(0.4, 0.8)), (198.0, 150.0, 122.0)
    stride = scene.rng.uniform(0.05, 0.25)
    for leg in (-stride, stride):
        scene.fill([scene.at(x + leg - 0.09, 0, z), scene.at(x + leg + 0.09, 0, z), scene.at(x + 0.12, height * 0.5, z),
                    scene.at(x - 0.12, height * 0.5, z)], PERSON, legs, z)
    scene.upright(x, z, 0.5, height * 0.45, height * 0.83, PERSON, coat)
    scene.blob(x, height * 0.91, z, 0.26, height * 0.17, PERSON, skin if scene.domain == "source" else _shade(skin, 0.7))


def _vehicle(scene: Scene, x: float, z: float, kind: int) -> None:
    """A car or truck seen from behind, with the side that faces the street's middle."""
    rng, colour = scene.rng, _look(scene, kind)
    wide, low, length = (1.8, 0.25, 4.2) if kind == CAR else (2.4, 0.4, 7.5)
    high = rng.uniform(1.35, 1.6) if kind == CAR else rng.uniform(2.7, 3.5)
    inner, dark = (x + wide / 2 if x < 0 else x - wide / 2), (32.0, 34.0, 40.0)
    scene.fill([scene.at(inner, low, z), scene.at(inner, high * 0.96, z + 0.4), scene.at(inner, high * 0.9, z + length),
                scene.at(inner, low, z + length)], kind, _shade(colour, 0.75), z + 1)
    for a in (z + 0.7, z + length - 1.2):
        scene.fill([scene.at(inner, 0, a), scene.at(inner, 0.6, a), scene.at(inner, 0.6, a + 0.7), scene.at(inner, 0, a + 0.7)],
                   kind, dark, a)
    scene.upright(x, z, wide, low, high * 0.62, kind, colour)
    scene.fill([scene.at(x - wide / 2, high * 0.62, z), scene.at(x + wide / 2, high * 0.62, z),
                scene.at(x + wide * 0.42, high, z), scene.at(x - wide * 0.42, high, z)], kind, colour, z)
    if kind == CAR:
        scene.upright(x, z, wide * 0.72, high * 0.64, high * 0.92, kind, _shade(dark, 1.8))
    else:
        scene.upright(x, z, wide * 0.04, low + 0.3, high * 0.95, kind, _shade(colour, 0.6))
    for wheel in (-0.36, 0.36):
        scene.upright(x + wheel * wide, z, 0.25, 0, 0.4, kind, dark)
        scene.upright(x + wheel * wide, z, 0.25, high * 0.42, high * 0.52, kind, (176.0, 38.0, 34.0))


def _street(scene: Scene) -> None:
    rng = scene.rng
    road, pavement = rng.uniform(2.8, 4.5), rng.uniform(1.6, 3.0)
    wall = road + pavement + rng.uniform(0.0, 1.5)
    _ground(scene, road, pavement)
    things: list[tuple[float, Callable[[], None]]] = []

    def place(z: float, draw: Callable[..., None], *args: float) -> None:
        things.append((z, lambda: draw(scene, *args)))

    for side in (-1, 1):
        z = rng.uniform(2, 8)
        while z < 120:
            length, what = rng.uniform(6, 16), rng.random()
            if what < 0.55:
                place(z, _house, side, wall, z, length)
            elif what < 0.75:
                place(z, _fence, side, wall, z, length)
                place(z + length, _tree, side * (wall + rng.uniform(1, 4)), z + length)
            else:
                for _ in range(3):
                    at = z + rng.uniform(0, length)
                    place(at, _tree if rng.random() < 0.6 else _bush, side * (wall + rng.uniform(0.3, 4)), at)
            z += length + rng.uniform(0, 3)
        for draw, count, near in ((_pole, 4, 5.0), (_sign, 3, 5.0), (_person, 4, 4.5), (_tree, 1, 9.0)):
            for _ in range(rng.poisson(count * 0.75)):
                at = near + rng.gamma(1.6, 9)
                place(at, draw, side * (road + rng.uniform(0.3, 0.9) * pavement), at)
    for _ in range(rng.poisson(3.2)):
        at, kind = 6 + rng.gamma(1.7, 9), CAR if rng.random() < 0.68 else TRUCK
        lane = rng.choice([-1, 1]) * road * rng.uniform(0.35, 0.72)
        place(at, _vehicle, lane, at, kind)
    if rng.random() < 0.3:
        at = 6 + rng.gamma(1.6, 8)
        place(at, _person, rng.uniform(-road, road), at)
    for _, draw_one in sorted(things, key=lambda pair: -pair[0]):
        draw_one()


def render(index: int, domain: Domain, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A scene: image uint8 [128, 256, 3] and class ids uint8 [128, 256]. Scenes of the two domains are never the same."""
    rng = np.random.default_rng([seed, DOMAINS[domain], index])
    scene = Scene(rng, domain, horizon=rng.uniform(46, 66), centre=rng.uniform(96, 160), focal=rng.uniform(115, 155))
    _street(scene)
    entries = np.asarray(scene.canvas)
    mask = np.asarray(scene.classes, dtype=np.uint8)[entries]
    colour = np.asarray(scene.colours, dtype=np.float32)[entries]
    if domain == "source":
        picture = _clean(scene, colour)
    else:
        picture = _real(scene, colour, mask, np.asarray(scene.depths, dtype=np.float32)[entries])
    return picture, mask[FINE // 2::FINE, FINE // 2::FINE].copy()


def _average(image: NDArray[np.float32]) -> NDArray[np.float32]:
    return image.reshape(HEIGHT, FINE, WIDTH, FINE, 3).mean((1, 3))


def _finish(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _clean(scene: Scene, colour: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Even light, a slight gradient of the whole picture, almost no noise."""
    down = np.linspace(1.04, 0.96, HEIGHT, dtype=np.float32)[:, None, None]
    return _finish(_average(colour) * down * scene.rng.uniform(0.92, 1.08) + scene.rng.normal(0, 1.5, (HEIGHT, WIDTH, 3)))


def _noise(rng: Rng, cell: int) -> NDArray[np.float32]:
    """Smooth noise in [-1, 1] with lumps of `cell` fine pixels. Shape: [256, 512]."""
    height, width = HEIGHT * FINE, WIDTH * FINE
    small = rng.uniform(-1, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


# Strength of fine grain and of lumps in the target domain, by class.
TEXTURE = {ROAD: (0.16, 0.16), SIDEWALK: (0.2, 0.2), BUILDING: (0.14, 0.22), FENCE: (0.22, 0.14), POLE: (0.1, 0.14),
           VEGETATION: (0.5, 0.34), SKY: (0.01, 0.08), PERSON: (0.2, 0.24), CAR: (0.06, 0.24), TRUCK: (0.08, 0.2),
           SIGN: (0.08, 0.18)}


def _real(scene: Scene, colour: NDArray[np.float32], mask: NDArray[np.uint8],
          depth: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Textures, courses of bricks and slabs, shadows, haze, uneven light, blur, vignette and sensor noise."""
    rng = scene.rng
    rows, columns = np.mgrid[0:HEIGHT * FINE, 0:WIDTH * FINE].astype(np.float32)
    grain, lumps = (np.array([TEXTURE[c][i] for c in range(11)], dtype=np.float32)[mask] for i in (0, 1))
    light = 1 + 0.8 * grain * (0.6 * _noise(rng, 2) + 0.6 * _noise(rng, 5))
    light += 0.8 * lumps * (_noise(rng, 14) + 0.7 * _noise(rng, 36))
    courses = (rows % rng.integers(5, 9) < 1.5) & (mask == BUILDING)
    light[courses] *= rng.uniform(0.72, 0.9)
    light *= _shadows(rng, scene, mask)
    across, down = columns / (WIDTH * FINE) - 0.5, 0.5 - rows / (HEIGHT * FINE)
    light *= 1 + rng.uniform(-0.25, 0.25) * across + rng.uniform(0, 0.2) * down
    image = colour * light[..., None]
    stains = (_noise(rng, 9) > 0.72) & ((mask == ROAD) | (mask == SIDEWALK))
    image[stains] = image[stains] * 0.62 + np.array([40, 36, 22], dtype=np.float32) * rng.uniform(0.3, 1)
    ground = CAMERA_HEIGHT * scene.focal / np.maximum(rows / FINE - scene.horizon, 0.35)
    distance = np.where(depth > 0, depth, ground)
    haze = 1 - np.exp(-distance.astype(np.float64) * rng.uniform(0.001, 0.010))  # see SCENES_HASH
    air = np.array([188, 188, 186], dtype=np.float32) * rng.uniform(0.7, 1.08)
    image += (air - image) * np.where(mask == SKY, 0.35, haze)[..., None].astype(np.float32)
    image *= np.array([rng.uniform(0.95, 1.08), rng.uniform(0.97, 1.03), rng.uniform(0.86, 1.04)], dtype=np.float32)
    photo: NDArray[np.floating] = _average(image).astype(np.float64)
    ring = np.hypot(np.linspace(-1, 1, HEIGHT)[:, None], np.linspace(-1, 1, WIDTH)[None])
    photo = 255 * np.clip(photo / 255, 0, 1) ** rng.uniform(0.85, 1.15) * (1 - rng.uniform(0.05, 0.28) * ring[..., None] ** 2)
    soft = Image.fromarray(_finish(photo)).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.8))))
    return _finish(np.asarray(soft, dtype=np.float32) * rng.uniform(0.86, 1.1) + rng.normal(0, rng.uniform(2, 6), photo.shape))


def _shadows(rng: Rng, scene: Scene, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Shadows of houses and trees across the ground, and of one side of the street. Factors of light, [256, 512]."""
    layer = Image.new("L", (WIDTH * FINE, HEIGHT * FINE), 255)
    pen, dark = ImageDraw.Draw(layer), int(rng.uniform(110, 190))
    slant = rng.uniform(-3, 3)
    for _ in range(rng.integers(1, 6)):
        z, deep = 3 + rng.gamma(1.5, 7), rng.uniform(1, 5)
        left, right = sorted(rng.uniform(-9, 9, 2))
        pen.polygon([scene.at(left, 0, z), scene.at(right, 0, z + abs(slant)),
                     scene.at(right + slant, 0, z + deep + abs(slant)), scene.at(left + slant, 0, z + deep)], fill=dark)
    factor = np.asarray(layer.filter(ImageFilter.GaussianBlur(2)), dtype=np.float32) / 255
    return np.where((mask == ROAD) | (mask == SIDEWALK) | (mask == CAR), factor, 1).astype(np.float32)


SCENES_HASH = "07d23009d280f3b6e35f341e70c165acb1730967af435f32992c0b3eadc54d06"
"""sha256 over the first scenes of both domains, before any encoding; changing the scenes changes what every published demo
number means. They were calibrated with source-only runs (600 steps, two models: 72 and 78 mIoU on source scenes, 28 and 31 on
target ones) and have not changed since. One self-training run, 30 steps to try the launcher, ended a minute before this hash
was committed, on these same scenes: the data hashes it and the source-only runs recorded are equal. What was hashed then,
3f3c377a..., had powers and exponentials in float32, whose last bit depends on the processor: in float64 at most two of a
picture's 98,304 numbers differ from it (of the first twelve scenes of each domain), by one grey level, and the hash is the same
on all."""


def scenes_hash(count: int = 3) -> str:
    """The hash of the first `count` scenes of both domains, in hex."""
    digest = hashlib.sha256()
    for domain in DOMAINS:
        for index in range(count):
            for array in render(index, domain):  # type: ignore[arg-type]
                digest.update(array.tobytes())
    return digest.hexdigest()
