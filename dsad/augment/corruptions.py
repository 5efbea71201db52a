"""Small corruptions of views with pixel labels, for learning to see where an image was changed.

One to a few shapes an image: rectangles, thin turned rectangles (scars) and soft irregular blobs,
filled with pixels of another place of the image, of another image, or with noise, whose gain,
offset and colour are changed.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsad.augment._draws import between, integers, uniforms
from dsad.augment.isstad_corruption import HALF_STEP
from dsad.core.config import Refused, Settings, field

RECTANGLE, SCAR, BLOB = range(3)
KINDS = {"rectangle": RECTANGLE, "scar": SCAR, "blob": BLOB}
#: Waves around a blob's outline.
WAVES = (2, 3, 5)
#: Softness in pixels of an edge that is hard.
_HARD = 1e-3


class ShapesConfig(Settings, place="shapes"):
    """What is done to an image; lengths are pixels of the view, and all draws are uniform.

    Attributes:
      probability: of an image to be corrupted at all.
      most: shapes of a corrupted image: from 1 to so many.
      kinds: of the shapes, equally likely; they may cover each other.
      rectangle: height and width of a rectangle, from and to.
      scar_width, scar_length: sides of a scar, which lies at any angle.
      blob: radius of a blob where it is widest.
      irregularity: share of the radius by which a blob's outline may come closer to its centre.
      soft: width of a shape's edge, within which it fades in; 0 is a hard edge.
      sources: what shapes are filled with, equally likely: another place of the "own" image, a
        place of the "other" image, or "noise", grey and uniform in [0, 1] for each pixel.
      gain, offset: filled pixels are multiplied by the one, then raised by the other.
      colour: most by which each channel is raised or lowered besides.

    """

    probability: float = field(2 / 3, within=(0, 1))
    most: int = field(3, at_least=1)
    kinds: tuple[Literal["rectangle", "scar", "blob"], ...] = field(
        ("rectangle", "scar", "blob"), distinct=True, filled=True
    )
    rectangle: tuple[float, float] = field((6.0, 27.0), above=0, rising=True)
    scar_width: tuple[float, float] = field((2.0, 4.0), above=0, rising=True)
    scar_length: tuple[float, float] = field((12.0, 49.0), above=0, rising=True)
    blob: tuple[float, float] = field((4.0, 13.0), above=0, rising=True)
    irregularity: float = field(0.4, at_least=0, below=1)
    soft: tuple[float, float] = field((0.0, 2.0), at_least=0, rising=True)
    sources: tuple[Literal["own", "other", "noise"], ...] = field(
        ("own", "other"), distinct=True, filled=True
    )
    gain: tuple[float, float] = field((0.5, 1.5), at_least=0, rising=True)
    offset: tuple[float, float] = field((-0.2, 0.2), rising=True)
    colour: float = field(0.0, at_least=0)

    def fits(self, side: int) -> None:
        """Refuse shapes that may be longer than a view's side in pixels; raises Refused."""
        longest = {
            "rectangle": self.rectangle[1],
            "scar": math.hypot(self.scar_width[1], self.scar_length[1]),
            "blob": 2 * self.blob[1],
        }
        keys = {"rectangle": "rectangle", "scar": "scar_length", "blob": "blob"}
        for kind in self.kinds:
            if longest[kind] > side:
                key, expected = f"shapes.{keys[kind]}", f"shapes within a view of {side} pixels"
                raise Refused(key, expected, getattr(self, keys[kind]))


class Shapes(NamedTuple):
    """Shapes of each sample in the order in which they are painted; x to the right, y down.

    ``kind`` (b, n); ``centre`` (b, n, 2): y, x in pixels, where the first pixel's centre is 0.5;
    ``semi`` (b, n, 2): half of the sides across and along ``angle`` (b, n), radii of a blob;
    ``phase`` (b, n, 3): of the ``WAVES`` of a blob; ``soft`` (b, n): width of the edge; ``source``
    (b, n): place in the config's ``sources``; ``shift`` (b, n, 2): from a pixel to the one that
    fills it; ``gain`` (b, n); ``offset`` (b, n, 3) by channel; ``used`` (b, n) bool.
    """

    kind: jax.Array
    centre: jax.Array
    semi: jax.Array
    angle: jax.Array
    phase: jax.Array
    soft: jax.Array
    source: jax.Array
    shift: jax.Array
    gain: jax.Array
    offset: jax.Array
    used: jax.Array


def _one_of(uniform: jax.Array, values: list[int]) -> jax.Array:
    return jnp.array(values, jnp.int32)[integers(uniform, 0, len(values) - 1)]


def draw_shapes(keys: jax.Array, config: ShapesConfig, side: int) -> Shapes:
    """Shapes for views of ``side`` pixels, with one key per sample (b,).

    Every shape lies inside the view, and so does the place that it is filled from.
    """
    n = config.most
    u = uniforms(keys, "shapes", (n, 9))
    kind = _one_of(u[..., 0], [KINDS[name] for name in config.kinds])[..., None]
    across = jnp.stack([u[..., 1], u[..., 2]], axis=-1)
    scar = jnp.stack(
        [between(u[..., 1], config.scar_width), between(u[..., 2], config.scar_length)], axis=-1
    )
    rectangle = between(across, config.rectangle)
    radius = between(across[..., :1], config.blob)
    semi = jnp.where(kind == RECTANGLE, rectangle / 2, jnp.where(kind == SCAR, scar / 2, radius))
    kind = kind[..., 0]
    angle = jnp.where(kind == SCAR, jnp.pi * u[..., 3], 0.0)
    cosine, sine = jnp.abs(jnp.cos(angle)), jnp.abs(jnp.sin(angle))
    reach = jnp.stack(
        [semi[..., 0] * cosine + semi[..., 1] * sine, semi[..., 1] * cosine + semi[..., 0] * sine],
        axis=-1,
    )
    room = side - 2 * reach
    centre, place = reach + room * u[..., 4:6], reach + room * u[..., 6:8]
    more = uniforms(keys, "filling", (n, 8 + len(WAVES)))
    offset = between(more[..., 2:3], config.offset)
    number = integers(uniforms(keys, "number", ()), 1, n)
    corrupted = uniforms(keys, "corrupted", ()) < config.probability
    return Shapes(
        kind=kind,
        centre=centre,
        semi=semi,
        angle=angle,
        phase=2 * jnp.pi * more[..., 8:],
        soft=between(u[..., 8], config.soft),
        source=integers(more[..., 0], 0, len(config.sources) - 1),
        shift=jnp.round(place - centre).astype(jnp.int32),
        gain=between(more[..., 1], config.gain),
        offset=offset + config.colour * (2 * more[..., 3:6] - 1),
        used=(jnp.arange(n)[None, :] < number[:, None]) & corrupted[:, None],
    )


def coverage(shape: Shapes, side: int, irregularity: float) -> jax.Array:
    """How far each pixel is replaced, (side, side) in [0, 1], by one shape (without leading axes).

    0 outside of it, or where it is not used; 1 from ``soft`` pixels inside its outline on.
    """
    at = jnp.arange(side, dtype=jnp.float32) + 0.5
    y, x = (at - shape.centre[0])[:, None], (at - shape.centre[1])[None, :]
    cosine, sine = jnp.cos(shape.angle), jnp.sin(shape.angle)
    along, across = x * cosine + y * sine, y * cosine - x * sine
    box = jnp.minimum(shape.semi[0] - jnp.abs(across), shape.semi[1] - jnp.abs(along))
    turn = jnp.arctan2(y, x)
    waves = sum(jnp.cos(k * turn + shape.phase[i]) for i, k in enumerate(WAVES))
    dent = irregularity * (1 + waves / len(WAVES)) / 2
    blob = shape.semi[0] * (1 - dent) - jnp.sqrt(jnp.square(x) + jnp.square(y))
    inside = jnp.where(shape.kind == BLOB, blob, box)
    share = jnp.clip(inside / jnp.maximum(shape.soft, _HARD), 0, 1)
    return jnp.where(shape.used, share, 0)


def _source(name: str, images: jax.Array, others: jax.Array, keys: jax.Array) -> jax.Array:
    if name == "noise":
        return jnp.broadcast_to(uniforms(keys, "noise", (*images.shape[1:3], 1)), images.shape)
    return images if name == "own" else others


def corrupt_shapes(
    images: jax.Array, others: jax.Array, keys: jax.Array, config: ShapesConfig
) -> tuple[jax.Array, jax.Array]:
    """Corrupted images (b, S, S, 3) float32 in [0, 1], and labels (b, S, S) bool.

    The label is True where a channel differs by more than half of an 8-bit step; everywhere else
    the image is exactly as it came. Pure and jittable with a static ``config``.

    Args:
      images: (b, S, S, 3) float32 in [0, 1].
      others: likewise, another image for each.
      keys: (b,), one per sample; nothing else is drawn from.
      config: what to do; its shapes have to fit S pixels, see ``ShapesConfig.fits``.

    """
    side = images.shape[1]
    shapes = draw_shapes(keys, config, side)
    pool = jnp.stack([
        _source(name, images, others, keys) for name in config.sources
    ], axis=1)  # fmt: skip
    at = jnp.arange(side)

    def painted_on(painted: jax.Array, pool: jax.Array, shape: Shapes) -> jax.Array:
        rows, columns = (jnp.clip(at + shape.shift[i], 0, side - 1) for i in range(2))
        pixels = pool[shape.source, rows[:, None], columns[None, :]]
        filling = jnp.clip(shape.gain * pixels + shape.offset[None, None], 0, 1)
        share = coverage(shape, side, config.irregularity)[..., None]
        return painted + share * (filling - painted)

    def paint(painted: jax.Array, shape: Shapes) -> tuple[jax.Array, None]:
        return jax.vmap(painted_on)(painted, pool, shape), None

    painted, _ = lax.scan(paint, images, jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), shapes))
    label = jnp.any(jnp.abs(painted - images) > HALF_STEP, axis=-1)
    return jnp.where(label[..., None], painted, images), label
