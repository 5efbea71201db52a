"""The defects for development, drawn by other procedures than any corruption.

A crack is a branching line, where corruptions have straight scars; it is darker than its place, and
a fold shows pixels from beside it, as fillings may be and do. Absent elements and blur are neither.

Each function gets a drawn ``Development`` scene and returns what those of ``_defects`` do: the
image with the defect, (h, w, 3), and its blending weight (h, w) in 0..1. Where the weight is 0 the
image equals the clean one, but for the shadow and the soft rims of an absent element.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dsad.data._defects import Drawn
from dsad.data._fields import Rng, cover, mix, nearness, rotate, smooth


def absent(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """One element of the regular structure left out."""
    element = scene.element(rng)
    weight = scene.extent(element, x, y)
    scene.absent = element
    without = scene.colour(x, y)
    scene.absent = None
    return without, weight


def blur(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """Out of focus: the mean over a disc that grows towards the middle of the defect."""
    near = nearness(x, y, scene.place(rng), rng.uniform(0.09, 0.14))
    weight = np.clip(3 * near, 0, 1)
    inside = near > 0
    reach = rng.uniform(0.011, 0.016) * smooth(2 * near[inside])
    picture = scene.colour(x, y)
    total = picture[inside]
    for ring, count in ((0.5, 6), (1.0, 12)):
        for angle in 2 * math.pi * np.arange(count, dtype=np.float32) / count:
            u, v = ring * reach * np.cos(angle), ring * reach * np.sin(angle)
            total = total + scene.colour(x[inside] + u, y[inside] + v)
    picture[inside] = mix(picture[inside], total / 19, weight[inside])
    return picture, weight


def fold(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A slip along a line of finite length: one of its sides is moved along, less further away."""
    along, across = rotate(x, y, angle := rng.uniform(0, 2 * np.pi), scene.place(rng))
    length, depth = rng.uniform(0.14, 0.20), rng.uniform(0.10, 0.15)
    near = np.clip(np.minimum(1 - (along / length) ** 2, 1 - across / depth), 0, 1)
    near = np.where(across >= 0, near, 0)
    push = rng.uniform(0.035, 0.050) * float(rng.choice([-1.0, 1.0])) * smooth(1.3 * near)
    moved = scene.colour(x + push * math.cos(angle), y + push * math.sin(angle))
    weight = np.clip(2 * near, 0, 1)
    return mix(scene.colour(x, y), moved, (near > 0).astype(np.float32)), weight


def crack(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A dark thin line that walks at random, forks and runs out."""
    x0, y0 = scene.place(rng)
    heading, distance = rng.uniform(0, 2 * np.pi), np.full_like(x, np.inf)
    half = rng.uniform(0.005, 0.007)
    tips = [(x0, y0, heading, 1.0), (x0, y0, heading + math.pi + rng.uniform(-0.5, 0.5), 1.0)]
    while tips:
        x0, y0, heading, left = tips.pop()
        while left > 0:
            heading += rng.normal(0, 0.35)
            step = rng.uniform(0.015, 0.025)
            x1, y1 = x0 + step * math.cos(heading), y0 + step * math.sin(heading)
            distance = np.fmin(distance, _segment(x, y, x0, y0, x1, y1) + half * (0.6 - 0.6 * left))
            x0, y0, left = x1, y1, left - rng.uniform(0.10, 0.18)
            if rng.uniform() < 0.16:
                tips.append((x0, y0, heading + float(rng.choice([-0.8, 0.8])), 0.6 * left))
    pixel = 1.0 / x.shape[0]
    weight = cover(distance - max(half, 0.6 * pixel), max(pixel, 0.004))
    clean = scene.colour(x, y)
    return mix(clean, rng.uniform(0.30, 0.50) * clean, weight), weight


def _segment(
    x: np.ndarray, y: np.ndarray, x0: float, y0: float, x1: float, y1: float
) -> np.ndarray:
    """Distance to a straight piece."""
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - x0 - t * dx, y - y0 - t * dy)


#: The kinds of every category.
KINDS: dict[str, Callable[..., Drawn]] = {d.__name__: d for d in (absent, blur, crack, fold)}
