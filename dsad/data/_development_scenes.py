"""The normal scenes for development: three textures and one object unlike those of the demo.

Like the others they are drawn once and are then functions of coordinates. Each is made of elements
of which one can be ``absent``: a stitch, a crease, a printed dot, a component.
"""

import math
from typing import Any

import numpy as np

from dsad.data._fields import Noise, Rng, cover, mix, rgb, rotate, smooth


def _tint(rng: Rng, *values: float) -> np.ndarray:
    return rgb(*values) + rng.normal(0, 0.006, 3).astype(np.float32)


class Development:
    """A scene of elements; ``absent`` is the one that is left out, None: none.

    ``extent(element, x, y)`` is how much of an element there is at coordinates (h, w), 0..1: its
    absence changes nothing elsewhere.
    """

    absent: Any = None

    def place(self, rng: Rng) -> tuple[float, float]:
        """Somewhere on the material, for the middle of a defect."""
        x, y = rng.uniform(0.2, 0.8, 2)
        return float(x), float(y)

    def element(self, rng: Rng) -> Any:
        """One of the elements, drawn: column and row of a lattice, if nothing else."""
        x, y = self.place(rng)
        column, row, *_ = self._cells(np.full(1, x), np.full(1, y))
        return float(column[0]), float(row[0])

    def _cells(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        raise NotImplementedError


class Knit(Development):
    """Stocking stitch: columns of V-shaped stitches of a plied yarn; an element is two of them."""

    def __init__(self, rng: Rng):
        self.columns, self.rows = rng.uniform(10.5, 11.5), rng.uniform(13.0, 14.0)
        self.angle, self.slope = rng.uniform(-0.06, 0.06), rng.uniform(1.0, 1.2)
        self.shift = rng.uniform(0, 1, 2).tolist()
        self.wobble, self.tone, self.fibre = Noise(rng), Noise(rng), Noise(rng, 64)
        self.yarn, self.back = _tint(rng, 0.40, 0.58, 0.36), _tint(rng, 0.10, 0.15, 0.10)

    def _cells(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Column and row of the stitch, offset -0.5..0.5 from its middle, phase 0..1 along it."""
        u, v = rotate(x, y, self.angle)
        u = u * self.columns + self.shift[0] + 0.16 * self.wobble(4 * x + 5, 4 * y)
        v = v * self.rows + self.shift[1] + 0.16 * self.wobble(4 * x, 4 * y + 11)
        column = np.floor(u)
        offset = u - column - 0.5
        v = v + self.slope * np.abs(offset)
        return column, np.floor(v), offset, v - np.floor(v)

    def extent(self, element: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        i, j, _, _ = self._cells(x, y)
        return ((i == element[0]) & ((j == element[1]) | (j == element[1] + 1))).astype(np.float32)

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        i, j, offset, phase = self._cells(x, y)
        height = np.sin(np.pi * phase) ** 0.8 * np.abs(np.sin(2 * np.pi * offset)) ** 0.6
        ply = 0.10 * np.sin(2 * np.pi * (2 * phase + 3 * np.abs(offset)))
        if self.absent is not None:  # only a slack thread crosses the gap
            gone = self.extent(self.absent, x, y)
            height = height * (1 - gone) + 0.6 * gone * cover(np.abs(phase - 0.5) - 0.2, 0.3)
        fibre = self.fibre(3 * phase + 7 * i, 9 * offset + j)
        tone = 1 + 0.09 * self.tone.cell(i, j) + 0.08 * fibre
        yarn = self.yarn * ((0.45 + 0.55 * height) * (tone + ply))[..., None]
        return mix(np.broadcast_to(self.back, yarn.shape), yarn, smooth(height / 0.35))


class Leather(Development):
    """Pebbled leather: convex cells of many shapes; an element is the creases between three."""

    def __init__(self, rng: Rng):
        self.stretch, self.angle = rng.uniform(1.0, 1.12), rng.uniform(0, 2 * np.pi)
        self.count, self.light = rng.uniform(9.5, 10.5), rng.uniform(0.5, 1.1)
        self.jitter = Noise(rng, 64), Noise(rng, 64)
        self.tone, self.grain, self.cloud = Noise(rng, 64), Noise(rng, 128), Noise(rng)
        self.offset = rng.uniform(0, 30, 2).tolist()
        self.hide, self.crease = _tint(rng, 0.50, 0.25, 0.20), _tint(rng, 0.15, 0.07, 0.06)

    def _cells(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Number of the nearest cell and of the next, and how much farther that one is."""
        u, v = rotate(x, y, self.angle)
        u = u * self.count * self.stretch + self.offset[0]
        v = v * self.count / self.stretch + self.offset[1]
        first, second = np.full((2, *x.shape), np.inf, np.float32)
        name, other = np.full((2, *x.shape), np.nan)
        for step in range(9):
            i, j = np.floor(u) + step % 3 - 1, np.floor(v) + step // 3 - 1
            du, dv = (0.5 + 0.36 * noise.cell(i, j) for noise in self.jitter)
            distance, cell = np.hypot(i + du - u, j + dv - v), i + 1000.0 * j
            if self.absent is not None:
                cell = np.where(np.isin(cell, self.absent), self.absent[0], cell)
            nearer = distance < first
            behind, runner = np.where(nearer, first, distance), np.where(nearer, name, cell)
            ahead = (cell != name) & (behind < second)
            second, other = np.where(ahead, behind, second), np.where(ahead, runner, other)
            first, name = np.where(nearer, distance, first), np.where(nearer, cell, name)
        return name, other, np.asarray(second - first)

    def element(self, rng: Rng) -> list[float]:
        x, y = np.asarray(self.place(rng))[:, None] + rng.uniform(-0.08, 0.08, (2, 512))
        name, other, beyond = self._cells(x, y)
        cell = name[0]
        beside, length = np.unique(other[(name == cell) & (beyond < 0.3)], return_counts=True)
        return [float(cell), *beside[np.argsort(-length)[:2]].tolist()]

    def extent(self, element: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        name, other, beyond = self._cells(x, y)
        between = np.isin(name, element) & np.isin(other, element)
        return between * cover(beyond - 0.2, 0.1)

    def _height(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return smooth(self._cells(x, y)[2] / 0.32)

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        height = self._height(x, y)
        ahead = self._height(x + 0.006 * math.cos(self.light), y + 0.006 * math.sin(self.light))
        tone = 1 + 0.30 * (ahead - height) + 0.10 * self.grain(48 * x, 48 * y)
        tone += 0.06 * self.cloud(5 * x, 5 * y) + 0.06 * self.tone(9 * x + 3, 9 * y)
        return mix(self.crease, self.hide * tone[..., None], 0.12 + 0.88 * height)


class Sheet(Development):
    """Brushed metal with printed dots in staggered rows; an element is a dot."""

    def __init__(self, rng: Rng):
        self.count, self.radius = rng.uniform(8.5, 9.2), rng.uniform(0.26, 0.28)
        self.angle, self.shift = rng.uniform(-0.08, 0.08), rng.uniform(0, 1, 2).tolist()
        self.brush, self.haze, self.print = Noise(rng, 128), Noise(rng), Noise(rng, 64)
        self.jitter, self.sheen = (Noise(rng), Noise(rng)), rng.uniform(-0.4, 0.4)
        self.metal, self.ink = _tint(rng, 0.66, 0.67, 0.69), _tint(rng, 0.20, 0.27, 0.52)

    def _cells(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Column and row of the nearest dot, and the signed distance to it in spacings."""
        u, v = rotate(x, y, self.angle)
        v = v * self.count * 1.1 + self.shift[1]
        row = np.floor(v)
        u = u * self.count + self.shift[0] + 0.5 * (row % 2)
        column = np.floor(u)
        du, dv = (0.05 * noise.cell(column, row) for noise in self.jitter)
        distance = np.hypot(u - column - 0.5 - du, (v - row - 0.5 - dv) / 1.1)
        return column, row, distance - self.radius

    def extent(self, element: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        column, row, distance = self._cells(x, y)
        return ((column == element[0]) & (row == element[1])) * cover(distance, 0.12)

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        along, across = rotate(x, y, self.angle)
        ink = cover(self._cells(x, y)[2], 0.12)
        if self.absent is not None:
            ink = ink - self.extent(self.absent, x, y)
        ink = ink * (0.9 + 0.1 * self.print(40 * x, 40 * y))
        brush = self.brush(3 * along, 55 * across) + 0.6 * self.brush(5 * along + 9, 110 * across)
        sheen = 0.10 * np.cos(3 * (across - self.sheen)) + 0.05 * self.haze(3 * x, 3 * y)
        metal = self.metal * (1 + 0.11 * brush + sheen)[..., None]
        return mix(metal, self.ink * (1 + 0.10 * brush)[..., None], ink)


#: Components of the board in its coordinates: x, y, half width and half height in image sides.
_COMPONENTS = [
    *((x, y, 0.036, 0.019) for x in (0.13, 0.26) for y in (-0.20, -0.12, -0.04)),
    *((x, 0.20, 0.019, 0.036) for x in (0.05, 0.13, 0.21, 0.29)),
]
_CHIP = (-0.16, -0.03, 0.12, 0.10)
#: Where there is something to see: components, the legs of the chip, conductors.
_BUSY = [*(part[:2] for part in _COMPONENTS), (-0.03, -0.03), (0.07, 0.05), (-0.15, 0.13)]


class Board(Development):
    """A printed circuit on a pale bench: chip, contacts, conductors; an element is a component."""

    def __init__(self, rng: Rng):
        self.centre = (0.5 + rng.uniform(-0.025, 0.025), 0.5 + rng.uniform(-0.025, 0.025))
        self.angle, self.light = rng.uniform(-0.10, 0.10), rng.uniform(3.7, 4.1)
        self.bench, self.glass, self.body = Noise(rng, 64), Noise(rng, 64), Noise(rng)
        self.table, self.resist = _tint(rng, 0.74, 0.72, 0.68), _tint(rng, 0.10, 0.30, 0.36)
        self.gold, self.black = _tint(rng, 0.80, 0.66, 0.34), _tint(rng, 0.13, 0.13, 0.14)

    def place(self, rng: Rng) -> tuple[float, float]:
        dx, dy = np.asarray(_BUSY[rng.integers(len(_BUSY))]) + rng.uniform(-0.02, 0.02, 2)
        x, y = rotate(dx, dy, -self.angle, (0, 0))
        return float(x + self.centre[0]), float(y + self.centre[1])

    def element(self, rng: Rng) -> int:
        return int(rng.integers(len(_COMPONENTS)))

    def extent(self, element: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = rotate(x, y, self.angle, self.centre)
        return cover(_box(dx, dy, *_COMPONENTS[element]), 0.008)

    def _conductors(self, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """Lines from the chip to the right, which fall at 45 degrees, and upright ones below."""
        fall = dy - np.clip(dx + 0.02, 0, 0.06)
        across = np.maximum(_stripes(fall, 0.032) - 0.006, _box(dx, fall, 0.12, -0.06, 0.20, 0.16))
        below = np.maximum(_stripes(dx, 0.04) - 0.007, _box(dx, dy, -0.17, 0.18, 0.16, 0.12))
        return cover(np.minimum(across, below), 0.006)

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = rotate(x, y, self.angle, self.centre)
        sx, sy = dx + 0.012 * math.cos(self.light), dy + 0.012 * math.sin(self.light)
        weave = 0.05 * np.sin(2 * np.pi * 26 * dx) * np.sin(2 * np.pi * 26 * dy)
        resist = self.resist * (1 + weave + 0.08 * self.glass(24 * x, 24 * y))[..., None]
        out = mix(resist, 1.45 * resist, self._conductors(dx, dy))
        gold = self.gold * (1 + 0.06 * self.glass(9 * x, 9 * y))[..., None]
        black = self.black * (1 + 0.10 * self.body(20 * dx, 20 * dy))[..., None]
        pads = np.maximum(_stripes(dx, 0.04) - 0.013, _box(dx, dy, -0.17, 0.29, 0.16, 0.03))
        legs = np.maximum(_stripes(dy, 0.032) - 0.008, _box(dx, dy, -0.16, -0.03, 0.145, 0.095))
        hole = np.hypot(np.abs(dx) - 0.37, np.abs(dy) - 0.28) - 0.018
        out = mix(out, gold, cover(np.minimum(np.minimum(pads, legs), hole - 0.012), 0.006))
        for number, part in enumerate([*_COMPONENTS, _CHIP]):
            box = body = _box(dx, dy, *part)
            if part != _CHIP:  # with contacts at its ends, which stay where it is absent
                px, py, width, height = part
                ends = np.abs(dx - px) - width if width > height else np.abs(dy - py) - height
                out = mix(out, gold, cover(np.maximum(box, -0.022 - ends), 0.006))
                body = np.maximum(box, ends + 0.014)
            if number != self.absent:
                shadow = cover(_box(sx, sy, *part), 0.012) * (1 - cover(box, 0.006))
                out = mix(out * (1 - 0.45 * shadow)[..., None], black, cover(body, 0.006))
        bench = self.table * (1 + 0.05 * self.bench(30 * x, 30 * y))[..., None]
        bench = bench * (1 - 0.35 * cover(_box(sx, sy, 0, 0, 0.41, 0.32), 0.03))[..., None]
        return mix(bench, out, cover(np.maximum(_box(dx, dy, 0, 0, 0.41, 0.32), -hole), 0.008))


def _box(
    dx: np.ndarray, dy: np.ndarray, x: float, y: float, width: float, height: float
) -> np.ndarray:
    """Signed distance to an upright rectangle of these halves, negative inside."""
    return np.maximum(np.abs(dx - x) - width, np.abs(dy - y) - height)


def _stripes(t: np.ndarray, period: float) -> np.ndarray:
    """Distance to the nearest of parallel lines."""
    return np.abs((t / period) % 1 - 0.5) * period


SCENES = {scene.__name__.lower(): scene for scene in (Board, Knit, Leather, Sheet)}
