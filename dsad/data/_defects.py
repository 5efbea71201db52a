"""The defects of the procedural data set.

Each function gets a drawn scene, pixel coordinates and a generator and returns the image with the
defect, (h, w, 3), and its blending weight (h, w) in 0..1. Where the weight is 0 the image equals
the clean one, but for the shadow and bevel around lost metal. The mask is weight >= 0.25.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dsad.data._fields import Noise, Rng, blob, cover, nearness, rotate, smooth, stroke
from dsad.data._scenes import Speckle, Washer

#: Blending weight from which a pixel counts as defective.
MASK_WEIGHT = 0.25
Drawn = tuple[np.ndarray, np.ndarray]


def _place(scene: Any, rng: Rng, margin: float = 0.16) -> tuple[float, float]:
    """Somewhere in the image; on the metal for the object."""
    if isinstance(scene, Washer):
        # Away from the keyway (turn 0), in the middle of the ring.
        return scene.on_metal(rng.uniform(0.23, 0.31), rng.uniform(0.5, 2 * np.pi - 0.5))
    x, y = rng.uniform(margin, 1 - margin, 2)
    return float(x), float(y)


def _on_part(scene: Any, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Keep a surface defect of the object on its metal."""
    if isinstance(scene, Washer):
        return weight * cover(scene.outline(x, y) + 0.006, 0.008)
    return weight


def _blend(clean: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return clean + (other - clean) * weight[..., None]


def scratch(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A thin bent scratch: dark groove with a bright lip, fading towards its ends."""
    clean = scene.colour(x, y)
    pixel = 1.0 / x.shape[0]
    length = rng.uniform(0.14, 0.22) if isinstance(scene, Washer) else rng.uniform(0.2, 0.42)
    distance, t = stroke(rng, x, y, _place(scene, rng, 0.25), length)
    half = max(rng.uniform(0.0055, 0.0095), 0.6 * pixel)
    taper = 0.45 + 0.55 * smooth(4 * t) * smooth(4 * (1 - t))
    weight = cover(distance - half * taper, max(pixel, 0.004))
    weight = _on_part(scene, x, y, weight)
    strength = rng.uniform(0.40, 0.65) * (1 if rng.uniform() < 0.35 else -1)
    lip = 1 + strength * (1 - 0.5 * np.clip(distance / half, 0, 1))
    return _blend(clean, clean * lip[..., None], weight), weight


def spot(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A foreign particle or drop: a small raised blob with its own colour, shading and texture."""
    clean = scene.colour(x, y)
    centre = _place(scene, rng)
    radius = rng.uniform(0.028, 0.055)
    distance = blob(rng, x, y, centre, radius)
    weight = _on_part(scene, x, y, cover(distance, 0.010))
    inside = distance < radius
    tone = float(clean[inside].mean()) if inside.any() else float(clean.mean())
    shade = tone + rng.uniform(0.17, 0.32) * float(rng.choice([-1.0, 1.0]))
    colour = np.float32(max(shade, 0.08)) * (1 + rng.normal(0, 0.10, 3).astype(np.float32))
    relief = 1 + 0.3 * ((x - centre[0]) + (y - centre[1])) / radius * -0.7
    grain = 1 + 0.12 * Noise(rng, 64)(60 * x, 60 * y)
    body = colour * (relief * grain)[..., None]
    return _blend(clean, body, 0.85 * weight), weight


def stain(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A translucent stain: a shift of colour with a darker rim, the material shows through."""
    clean = scene.colour(x, y)
    radius = rng.uniform(0.055, 0.08) if isinstance(scene, Washer) else rng.uniform(0.07, 0.13)
    distance = blob(rng, x, y, _place(scene, rng, 0.2), radius)
    weight = _on_part(scene, x, y, cover(distance, 0.02))
    tints = [(0.90, 0.72, 0.46), (0.72, 0.86, 0.98), (0.98, 0.80, 0.76), (0.80, 0.84, 0.70)]
    tint = np.asarray(tints[rng.integers(len(tints))], np.float32)
    depth = rng.uniform(0.6, 1.0)
    rim = 1 - 0.16 * smooth(1 + distance / 0.022)
    cloud = 1 + 0.10 * Noise(rng)(14 * x, 14 * y)
    other = clean * (1 + depth * (tint - 1)) * (rim * cloud)[..., None]
    return _blend(clean, other, weight), weight


def patch(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A piece of the same material set in turned and shifted: only the structure is wrong."""
    clean = scene.colour(x, y)
    centre = _place(scene, rng, 0.22)
    radius = rng.uniform(0.07, 0.12)
    weight = cover(blob(rng, x, y, centre, radius), 0.010)
    turn = rng.uniform(0.5, 1.1) * float(rng.choice([-1.0, 1.0]))
    dx, dy = rotate(x, y, turn, centre)
    shift = (rng.uniform(0.25, 0.45, 2) * rng.choice([-1.0, 1.0], 2)).tolist()
    # Granite looks the same from all sides: only another grain size is foreign to it.
    zoom = rng.uniform(0.45, 0.6) if isinstance(scene, Speckle) else 1.0
    other = scene.colour(zoom * dx + centre[0] + shift[0], zoom * dy + centre[1] + shift[1])
    return _blend(clean, other, weight), weight


def _swirl(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], near: np.ndarray, turn: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates turned about ``centre`` by ``turn`` times the square of ``near``."""
    dx, dy = x - centre[0], y - centre[1]
    c, s = np.cos(turn * near * near), np.sin(turn * near * near)
    inside = near > 0  # outside nothing moves, not even by rounding
    u, v = centre[0] + c * dx + s * dy, centre[1] - s * dx + c * dy
    return np.where(inside, u, x), np.where(inside, v, y)


def warp(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A local displacement of a texture: pulled threads, a buckled board."""
    centre, radius = _place(scene, rng, 0.22), rng.uniform(0.09, 0.14)
    angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.4, 0.65) * radius
    near = nearness(x, y, centre, radius)
    u, v = _swirl(x, y, centre, near, rng.uniform(0.4, 0.9))
    push = reach * near * near
    return scene.colour(u - push * math.cos(angle), v - push * math.sin(angle)), near


def bent(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A tooth bent aside; the mask is the metal where it is and where it should be."""
    tooth = 2 * math.pi * int(rng.integers(1, scene.teeth)) / scene.teeth
    centre, radius = scene.on_metal(0.40, tooth), 0.10
    angle = tooth + scene.angle + math.pi / 2 * float(rng.choice([-1.0, 1.0]))
    near = nearness(x, y, centre, radius)
    push = rng.uniform(0.45, 0.7) * radius * near * near
    u, v = x - push * math.cos(angle), y - push * math.sin(angle)
    metal = np.maximum(cover(scene.outline(x, y), 0.02), cover(scene.outline(u, v), 0.02))
    weight = np.clip(4 * near, 0, 1) * metal
    return _blend(scene.colour(x, y), scene.colour(u, v), weight), weight


def missing(scene: Any, x: np.ndarray, y: np.ndarray, rng: Rng) -> Drawn:
    """A tooth or a piece of the rim broken away: the belt shows; the mask is the lost metal."""
    clean = scene.colour(x, y)
    tooth = 2 * math.pi * int(rng.integers(1, scene.teeth)) / scene.teeth
    centre = scene.on_metal(rng.uniform(0.40, 0.42), tooth + rng.uniform(-0.08, 0.08))
    radius = rng.uniform(0.06, 0.08)
    before = scene.outline(x, y)
    state = rng.bit_generator.state

    def bite(px: np.ndarray, py: np.ndarray) -> np.ndarray:
        rng.bit_generator.state = state  # the same blob at every coordinate it is asked for
        return blob(rng, px, py, centre, radius)

    scene.missing = bite
    broken = scene.colour(x, y)
    gone = bite(x, y)
    scene.missing = None
    lost = np.minimum(cover(before, 0.008), cover(gone, 0.008))
    return _blend(clean, broken, cover(gone - 0.02, 0.03)), lost


_KINDS: dict[str, tuple[Callable[..., Drawn], ...]] = {
    "washer": (bent, missing, scratch, spot, stain),
    # A displacement of irregular grains is no visible defect.
    "speckle": (patch, scratch, spot, stain),
}


def kinds(category: str) -> dict[str, Callable[..., Drawn]]:
    """Defect kinds of a category by name."""
    drawn = _KINDS.get(category, (patch, scratch, spot, stain, warp))
    return {defect.__name__: defect for defect in drawn}
