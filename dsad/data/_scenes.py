"""The normal scenes of the procedural data set: four textures and one object.

A scene is drawn once from a generator and is then a function of coordinates, so that a defect can
look up the same material elsewhere: displaced, turned or missing.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from dsad.data._fields import Noise, Rng, cover, mix, rgb, rotate, smooth


class Scene(Protocol):
    """A drawn scene; ``colour`` maps coordinates (h, w) to linear RGB (h, w, 3) float32."""

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray: ...


class Weave:
    """Plain weave of a warm warp and a grey-blue weft, threads of varying tone and width."""

    def __init__(self, rng: Rng):
        self.count = rng.uniform(15.0, 17.0)
        self.angle = rng.uniform(-0.05, 0.05)
        self.shift = rng.uniform(0, 1, 2).tolist()
        self.wobble, self.tone, self.fibre = Noise(rng), Noise(rng, 64), Noise(rng, 64)
        self.warp = rgb(0.66, 0.60, 0.50) + rng.normal(0, 0.006, 3).astype(np.float32)
        self.weft = rgb(0.47, 0.49, 0.53) + rng.normal(0, 0.006, 3).astype(np.float32)

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        u, v = rotate(x, y, self.angle)
        u = u * self.count + self.shift[0] + 0.22 * self.wobble(3 * x + 5, 5 * y)
        v = v * self.count + self.shift[1] + 0.22 * self.wobble(5 * x, 3 * y + 11)
        i, j = np.floor(u), np.floor(v)
        across_u, across_v = np.sin(np.pi * (u - i)), np.sin(np.pi * (v - j))
        over = 1 - 2 * np.abs((i + j) % 2)
        height_u = across_u**0.7 + 0.55 * over * across_v
        height_v = across_v**0.7 - 0.55 * over * across_u
        top = smooth((height_u - height_v) / 0.4 + 0.5)
        tone_u = 1 + 0.10 * self.tone.cell(i, 0 * i) + 0.07 * self.fibre(u * 6, v * 1.2)
        tone_v = 1 + 0.10 * self.tone.cell(0 * j + 7, j) + 0.07 * self.fibre(u * 1.2, v * 6)
        shade_u = (0.50 + 0.50 * across_u * (0.75 + 0.25 * over * across_v)) * tone_u
        shade_v = (0.50 + 0.50 * across_v * (0.75 - 0.25 * over * across_u)) * tone_v
        return mix(self.weft * shade_v[..., None], self.warp * shade_u[..., None], top)


class Wood:
    """A planed board: wavy growth rings, fibres along the grain, fine dark pores."""

    def __init__(self, rng: Rng):
        self.angle = rng.uniform(-0.12, 0.12)
        self.rings = rng.uniform(6.0, 10.0)
        self.bend = rng.uniform(0.25, 0.6)
        self.wave, self.fibre, self.pore = Noise(rng), Noise(rng, 128), Noise(rng, 128)
        self.light = rgb(0.80, 0.62, 0.42) + rng.normal(0, 0.008, 3).astype(np.float32)
        self.dark = rgb(0.55, 0.37, 0.22) + rng.normal(0, 0.008, 3).astype(np.float32)
        self.offset = rng.uniform(0, 30, 2).tolist()

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        along, across = rotate(x, y, self.angle)
        warp = self.wave(1.6 * along + self.offset[0], 3.2 * across + self.offset[1])
        ring = self.rings * (across + 0.16 * self.bend * warp) + 0.35 * warp
        phase = ring - np.floor(ring)
        late = smooth(phase / 0.75) * (1 - smooth((phase - 0.86) / 0.14))
        fibre = self.fibre(5 * along, 70 * across) + 0.6 * self.fibre(13 * along + 9, 130 * across)
        pores = smooth((self.pore(9 * along, 90 * across + 40) - 0.55) / 0.3)
        tone = 1 + 0.055 * fibre - 0.16 * pores * (0.4 + late)
        return mix(self.light, self.dark, 0.15 + 0.65 * late) * tone[..., None]


class Tiles:
    """Ceramic mosaic: bevelled glossy tiles of slightly different glaze, rough grout between."""

    def __init__(self, rng: Rng):
        self.count = rng.uniform(5.3, 6.0)
        self.angle = rng.uniform(-0.06, 0.06)
        self.shift = rng.uniform(0, 1, 2).tolist()
        self.tone, self.hue, self.mottle = Noise(rng), Noise(rng), Noise(rng, 64)
        self.glaze = rgb(0.36, 0.55, 0.58) + rng.normal(0, 0.006, 3).astype(np.float32)
        self.grout = rgb(0.72, 0.70, 0.66) + rng.normal(0, 0.006, 3).astype(np.float32)
        self.light = rng.uniform(0.5, 1.1)

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        u, v = rotate(x, y, self.angle)
        u, v = u * self.count + self.shift[0], v * self.count + self.shift[1]
        i, j = np.floor(u), np.floor(v)
        du, dv = np.abs(u - i - 0.5), np.abs(v - j - 0.5)
        corner = 0.42 - 0.10
        distance = np.hypot(np.maximum(du - corner, 0), np.maximum(dv - corner, 0)) - 0.10
        distance = np.where(np.maximum(du, dv) < corner, -0.2, distance)
        inside = cover(distance, 0.035)
        slope = smooth(1 + distance / 0.09)
        facing = math.cos(self.light) * (u - i - 0.5) + math.sin(self.light) * (v - j - 0.5)
        bevel = -0.55 * slope * facing
        tone = 1 + 0.10 * self.tone.cell(i, j) + 0.05 * self.mottle(9 * u, 9 * v) + bevel
        tint = self.hue.cell(i + 3, j + 5)[..., None] * rgb(0.03, -0.005, -0.035)
        rough = 1 + 0.10 * self.mottle(30 * x + 7, 30 * y) - 0.22 * cover(distance - 0.03, 0.05)
        return mix(self.grout * rough[..., None], self.glaze * tone[..., None] + tint, inside)


class Speckle:
    """Polished granite: light, grey and dark grains of two sizes and small glints."""

    def __init__(self, rng: Rng):
        self.large, self.small = Noise(rng, 64), Noise(rng, 64)
        self.dark, self.glint = Noise(rng, 64), Noise(rng, 128)
        self.offset = rng.uniform(0, 50, 2).tolist()
        self.scale = rng.uniform(1.30, 1.42)
        tint = rng.normal(0, 0.005, 3).astype(np.float32)
        grains = (0.62, 0.58, 0.55), (0.73, 0.69, 0.65), (0.50, 0.47, 0.46), (0.33, 0.31, 0.32)
        self.colours = [rgb(*grain) + tint for grain in grains]

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = self.scale * x + self.offset[0], self.scale * y + self.offset[1]
        bend = 0.35 * self.small(21 * x + 3, 21 * y)
        base, light, grey, black = self.colours
        coarse = self.large(15 * x + bend, 15 * y - bend)
        fine = self.small(31 * x - bend, 31 * y + bend)
        out = mix(np.broadcast_to(base, (*x.shape, 3)), light, smooth(3 * coarse + 0.6))
        out = mix(out, grey, smooth(5 * (fine - 0.28)))
        flakes = self.dark(24 * x + 2 * bend, 24 * y - bend)
        out = mix(out, black, smooth(7 * (flakes - 0.47)))
        glint = smooth(6 * (self.glint(57 * x, 57 * y) - 0.72))
        return out * (1 + 0.05 * fine)[..., None] + 0.16 * glint[..., None]


class Washer:
    """A toothed lock washer with a keyway, turned anyhow, on a dark conveyor belt.

    ``missing`` is a signed distance (negative inside) of material that broke away.
    """

    teeth = 9

    def __init__(self, rng: Rng):
        self.angle = rng.uniform(0, 2 * np.pi)
        self.centre = (0.5 + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.03, 0.03))
        self.scale = rng.uniform(0.98, 1.02)
        self.light = rng.uniform(3.6, 4.2)
        self.belt, self.brush, self.dust = Noise(rng, 64), Noise(rng, 128), Noise(rng, 64)
        self.metal = rgb(0.62, 0.62, 0.60) + rng.normal(0, 0.006, 3).astype(np.float32)
        self.rubber = rgb(0.155, 0.165, 0.175) + rng.normal(0, 0.004, 3).astype(np.float32)
        self.missing: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    def outline(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance to the metal, in image sides, negative inside."""
        dx, dy = rotate(x, y, self.angle, self.centre)
        radius, turn = np.hypot(dx, dy) / self.scale, np.arctan2(dy, dx)
        tooth = np.tanh(3.5 * np.cos(self.teeth * turn)) / math.tanh(3.5)
        outer = radius - (0.375 + 0.030 * tooth)
        inner = 0.165 - radius
        keyway = np.maximum(np.abs(dy) - 0.034, np.abs(dx - 0.19) - 0.045)
        shape = np.maximum(np.maximum(0.8 * outer, inner), -keyway)
        if self.missing is not None:
            shape = np.maximum(shape, -self.missing(x, y))
        return shape

    def on_metal(self, radius: float, turn: float) -> tuple[float, float]:
        """The image position of a point of the part, by its polar coordinates."""
        angle = turn + self.angle
        reach = radius * self.scale
        return self.centre[0] + reach * math.cos(angle), self.centre[1] + reach * math.sin(angle)

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        distance = self.outline(x, y)
        shadow = self.outline(x + 0.018 * math.cos(self.light), y + 0.018 * math.sin(self.light))
        ridge = 0.5 + 0.5 * np.sin(2 * np.pi * 21 * (x + 0.004 * self.belt(6 * x, 6 * y)))
        ground = 0.86 + 0.16 * ridge + 0.16 * self.belt(44 * x, 44 * y)
        ground += 0.10 * self.dust(9 * x, 9 * y)
        ground *= 1 - 0.5 * cover(shadow - 0.012, 0.05)
        dx, dy = x - self.centre[0], y - self.centre[1]
        radius, turn = np.hypot(dx, dy), np.arctan2(dy, dx)
        rings = self.brush(150 * radius, 3.0 * np.cos(turn - self.angle) + 60)
        sheen = np.cos(2 * (turn - self.light + 0.5)) * 0.13 + 0.05 * np.cos(turn - self.light)
        # Light on the bevel: the slope of the outline towards the lamp, near the edge only.
        edge = smooth(1 + distance / 0.028)
        slope = (self.outline(x + 0.004, y) - distance) * math.cos(self.light)
        slope += (self.outline(x, y + 0.004) - distance) * math.sin(self.light)
        bevel = 0.42 * edge * np.clip(slope / 0.004, -1, 1)
        tone = 1 + 0.10 * rings + sheen + bevel + 0.03 * self.dust(20 * x, 20 * y)
        metal = self.metal * tone[..., None]
        return mix(self.rubber * ground[..., None], metal, cover(distance, 0.008))


SCENES = {scene.__name__.lower(): scene for scene in (Speckle, Tiles, Washer, Weave, Wood)}
