"""Noise and shapes as functions of coordinates: the vocabulary of the procedural data set.

Coordinates are in image sides (0..1 inside the image), so content does not depend on resolution.
"""

import math

import numpy as np

Rng = np.random.Generator


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x and y, each (size, size) float32."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def smooth(t: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, a smooth step between."""
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


class Noise:
    """Value noise: random numbers on a periodic lattice, interpolated; values within -1..1.

    ``cells`` is the period in lattice cells, a power of two.
    """

    def __init__(self, rng: Rng, cells: int = 32):
        self.lattice = rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32)
        self.flat = self.lattice.ravel()
        self.cells = cells

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The noise at x, y in units of lattice cells."""
        last = np.int32(self.cells - 1)
        x0, y0 = np.floor(x), np.floor(y)
        fx, fy = x - x0, y - y0
        fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
        i, j = x0.astype(np.int32), y0.astype(np.int32)
        left, right = i & last, (i + 1) & last
        row, below = (j & last) * self.cells, ((j + 1) & last) * self.cells
        top = self.flat.take(row + left)
        top += fx * (self.flat.take(row + right) - top)
        bottom = self.flat.take(below + left)
        bottom += fx * (self.flat.take(below + right) - bottom)
        top += fy * (bottom - top)
        return top

    def cell(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The lattice value of an integer cell: one number per tile or thread."""
        last = np.int32(self.cells - 1)
        return self.lattice[j.astype(np.int32) & last, i.astype(np.int32) & last]


def rotate(
    x: np.ndarray, y: np.ndarray, angle: float, centre: tuple[float, float] = (0.5, 0.5)
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates turned by ``angle`` radians about ``centre``, relative to it."""
    dx, dy = x - centre[0], y - centre[1]
    c, s = math.cos(angle), math.sin(angle)
    return c * dx + s * dy, -s * dx + c * dy


def blob(
    rng: Rng, x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radius: float
) -> np.ndarray:
    """Signed distance (negative inside) to an irregular, slightly elongated blob."""
    dx, dy = rotate(x, y, rng.uniform(0, np.pi), centre)
    stretch = rng.uniform(1.0, 1.6)
    dx, dy = dx / stretch, dy * stretch
    angle = np.arctan2(dy, dx)
    edge = np.full_like(x, radius)
    for order in (2, 3, 5):
        bump = rng.uniform(0.03, 0.16) * radius
        edge += bump * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(dx, dy) - edge


def stroke(
    rng: Rng, x: np.ndarray, y: np.ndarray, centre: tuple[float, float], length: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to a bent line of ``length`` through ``centre``, and the position 0..1 along it."""
    along, across = rotate(x, y, rng.uniform(0, np.pi), centre)
    t = along / length + 0.5
    bend = rng.uniform(-0.25, 0.25) * length
    wiggle = rng.uniform(0.0, 0.03) * length
    phase = rng.uniform(0, 2 * np.pi)
    curve = bend * ((2 * t - 1) ** 2 - 0.5) + wiggle * np.sin(9 * t + phase)
    beyond = np.maximum(np.abs(along) - length / 2, 0)
    return np.hypot(across - curve * (beyond == 0), beyond), t


def cover(distance: np.ndarray, soft: float) -> np.ndarray:
    """Blending weight 0..1 of a signed distance: 1 inside, falling to 0 over ``soft`` about 0."""
    return np.clip(0.5 - distance / soft, 0.0, 1.0)


def nearness(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radius: float
) -> np.ndarray:
    """1 at ``centre``, falling with the square of the distance to 0 at ``radius``."""
    return np.clip(1 - ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius**2, 0, 1)


def mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Colours of two materials, blended by the weight (h, w) of the second."""
    return first * (1 - weight[..., None]) + second * weight[..., None]


def rgb(*values: float) -> np.ndarray:
    """A colour."""
    return np.asarray(values, np.float32)
