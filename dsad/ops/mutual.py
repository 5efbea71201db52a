"""Mutual scores of a set of images: how far each of their tokens is from the other images'.

Li et al., "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring
of the Unlabeled Images" (ICLR 2024). Distances are those of unit vectors, by their cosines: |a - b|
= √(2 - 2 a·b). One product of two blocks of images serves both: its row maxima are the nearest
tokens of the ones, its column maxima those of the others.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core import hosts
from dsad.core.errors import ConfigError
from dsad.core.types import Progress, silent

#: Tokens on each side of a product, about: what fits a CPU's caches, and what fills an accelerator.
CPU_TOKENS, TOKENS = 1024, 4096
#: Features of one product: the rounding of a long sum is many times that of a few short ones, and
#: next to a distance of 0 there is nothing but rounding.
CHANNELS = 256
#: Bytes of a device's table of cosines, at most; where all do not fit, rows come in turns.
TABLE = 8 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is fixed when the programs are compiled.

    Each of ``parts`` devices has ``blocks`` of ``group`` images with ``tokens`` each, and compares
    ``rows`` of these blocks before it looks for the nearest images; ``count`` images are real.
    """

    count: int
    tokens: int
    group: int
    blocks: int
    rows: int
    kept: int
    parts: int
    mesh: Mesh | None

    @property
    def symmetric(self) -> bool:
        """Whether a product serves both of its sides, as all minima are kept at once."""
        return self.rows == self.blocks

    @property
    def steps(self) -> int:
        """Shards that every device compares its own with."""
        return self.parts // 2 + 1 if self.symmetric else self.parts

    def index(self) -> Any:
        return lax.axis_index(self.mesh.axis_names) if self.mesh else jnp.int32(0)

    def sent(self, values: jax.Array, back: int) -> jax.Array:
        """Values of every device on the one ``back`` places before it."""
        assert self.mesh is not None
        pairs = [(i, (i - back) % self.parts) for i in range(self.parts)]
        return lax.ppermute(values, self.mesh.axis_names, pairs)


def mutual_scores(
    tokens: Any, kept: int, *, mesh: Mesh | None = None, block: int | None = None,
    table: int = TABLE, progress: Progress = silent,
) -> np.ndarray:  # fmt: skip
    """Scores (N, T) float32 of the tokens (N, T, C), of unit length, of N images.

    The distance of a token to another image is that to the nearest of its tokens; the score is the
    mean of the ``kept`` smallest over the other images. Distances are right within float32's
    rounding of a cosine: near 0 they may be wrong by 1e-3 (1e-6 at 1).

    ``mesh`` splits the images; the shards pass round the ring of its devices and what they find
    goes back, so that nothing is reduced and results are the same for every device count up to
    rounding. Over several processes the tokens must be the same on all.

    A device holds, in float32, its images twice (once without a mesh: 4 · N · T · C bytes), a table
    of the nearest tokens of 4 · N² · T bytes over the number of devices (224 MB for 200 images of
    1,369 tokens, 5.5 GB for 1,000), and one product of about ``block``² cosines (4 MB on CPUs,
    67 MB elsewhere; at least T²). Half the products are made, N²/2 · T² · 2C operations. A table
    beyond ``table`` bytes is filled in turns, with all products: twice the operations.

    ``block``: tokens on each side of a product, about. ``progress`` hears of rows of blocks.
    Raises ConfigError.
    """
    shape = jnp.shape(tokens)
    if len(shape) != 3 or 0 in shape:
        raise ConfigError(f"mutual_scores: expected tokens (N, T, C), none empty, found {shape}.")
    if not 1 <= kept < shape[0]:
        raise ConfigError(
            f"mutual_scores: expected 1 <= kept < {shape[0]}, the images, found kept = {kept}. "
            "Each is compared with the others: at least 2 are needed."
        )
    plan = _plan(shape[0], shape[1], kept, mesh, block, table)
    own = _blocks(tokens, plan)
    del tokens  # nor need a caller hold them: one copy less
    total = plan.steps * plan.blocks
    found, done = [], 0
    for base in range(0, plan.blocks, plan.rows):
        cosines, visiting = _empty(plan), own
        for step in range(plan.steps):
            for row in range(base, min(base + plan.rows, plan.blocks)):
                cosines = _compared(own, visiting, cosines, row, base, plan, step)
                cosines.block_until_ready()
                done += 1
                progress(done, total, "mutual scores")
            if step + 1 < plan.steps:
                visiting = _passed(visiting, plan)
        found.append(hosts.whole(_chosen(cosines, base, plan)))
        del cosines
    scores = np.concatenate(found, axis=1)[:, : plan.blocks]
    return scores.reshape(-1, plan.tokens)[: plan.count]


def _plan(
    count: int, tokens: int, kept: int, mesh: Mesh | None, block: int | None, table: int
) -> _Plan:
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    parts = mesh.size if mesh is not None else 1
    own = math.ceil(count / parts)
    group = max(min((block or (CPU_TOKENS if platform == "cpu" else TOKENS)) // tokens, own), 1)
    blocks = math.ceil(own / group)
    row = 4 * group * tokens * group * blocks * parts
    return _Plan(
        count=count, tokens=tokens, group=group, blocks=blocks, kept=kept, parts=parts,
        rows=min(max(table // row, 1), blocks), mesh=mesh if parts > 1 else None,
    )  # fmt: skip


def _blocks(tokens: Any, plan: _Plan) -> jax.Array:
    """The blocks (devices · blocks, group · T, C), each device's own on it; padding is 0."""
    missing = plan.parts * plan.blocks * plan.group - plan.count
    pad = jnp.pad if isinstance(tokens, jax.Array) and plan.mesh is None else np.pad
    if missing:
        tokens = pad(tokens, ((0, missing), (0, 0), (0, 0)))
    tokens = tokens.reshape(-1, plan.group * plan.tokens, tokens.shape[-1])
    if plan.mesh is None:
        return jnp.asarray(tokens, jnp.float32)
    return hosts.split(np.asarray(tokens, np.float32), plan.mesh)


def _mapped(call: Any, plan: _Plan, inputs: int, numbers: int = 0) -> Any:
    """``call`` on every device's part of its first ``inputs``, and the same ``numbers``."""
    if plan.mesh is None:
        return call
    split, same = PartitionSpec(plan.mesh.axis_names), PartitionSpec()
    specs = (split,) * inputs + (same,) * numbers
    return jax.shard_map(
        call, mesh=plan.mesh, in_specs=specs, out_specs=split, check_vma=False
    )  # fmt: skip


def _empty(plan: _Plan) -> jax.Array:
    """Cosines (rows, all blocks, group, group · T): of the tokens of a row's block, by image."""
    shape = (
        plan.parts * plan.rows, plan.parts * plan.blocks, plan.group, plan.group * plan.tokens,
    )  # fmt: skip
    where = None
    if plan.mesh is not None:
        where = NamedSharding(plan.mesh, PartitionSpec(plan.mesh.axis_names))
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=where)()


@functools.partial(jax.jit, static_argnames=("plan", "step"), donate_argnames="cosines")
def _compared(
    own: jax.Array, visiting: jax.Array, cosines: jax.Array, row: Any, base: Any, plan: _Plan,
    step: int,
) -> jax.Array:  # fmt: skip
    """The table with what one row of the own blocks and the visitors are to each other.

    The visitors are those of the device ``step`` places before. At step 0 they are the own blocks,
    of which the later ones are left; half way round a ring of even length both devices compare, and
    before it the visitors' part is sent to them. None of this where products serve one side.
    """

    def part(
        own: jax.Array, visiting: jax.Array, cosines: jax.Array, row: jax.Array, base: jax.Array
    ) -> jax.Array:
        me = plan.index()
        owner = (me - step) % plan.parts
        both = plan.symmetric and 2 * step != plan.parts
        theirs = jnp.zeros((plan.blocks if both and step else 0, 1, *cosines.shape[2:]))
        start = row if both and step == 0 else 0

        def one(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> Any:
            cosines, theirs = found
            mine, other = _nearest(own[row], visiting[number], plan)
            cosines = _put(cosines, mine, row - base, owner * plan.blocks + number)
            if both and step == 0:
                cosines = _put(cosines, other, number, me * plan.blocks + row)
            elif both:
                theirs = _put(theirs, other, number, 0)
            return cosines, theirs

        cosines, theirs = lax.fori_loop(start, plan.blocks, one, (cosines, theirs))
        if both and step:
            sender = (me + step) % plan.parts
            place = (0, sender * plan.blocks + row, 0, 0)
            cosines = lax.dynamic_update_slice(cosines, plan.sent(theirs, step), place)
        return cosines

    numbers = (jnp.asarray(row, jnp.int32), jnp.asarray(base, jnp.int32))
    return _mapped(part, plan, 3, 2)(own, visiting, cosines, *numbers)


def _nearest(one: jax.Array, other: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Highest cosines (group, group · T) of the tokens of two blocks, by image of the other."""
    cosines = jnp.zeros((len(one), len(other)))
    for at in range(0, one.shape[1], CHANNELS):
        some = slice(at, at + CHANNELS)
        cosines += lax.dot_general(
            one[:, some], other[:, some], (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
    ours = jnp.max(cosines.reshape(-1, plan.group, plan.tokens), axis=2).T
    return ours, jnp.max(cosines.reshape(plan.group, plan.tokens, -1), axis=1)


def _put(table: jax.Array, values: jax.Array, row: Any, column: Any) -> jax.Array:
    return lax.dynamic_update_slice(table, values[None, None], (row, column, 0, 0))


@functools.partial(jax.jit, static_argnames="plan")
def _passed(visiting: jax.Array, plan: _Plan) -> jax.Array:
    """Every shard on the next device of the ring."""
    return _mapped(lambda x: plan.sent(x, -1), plan, 1)(visiting)


@functools.partial(jax.jit, static_argnames="plan")
def _chosen(cosines: jax.Array, base: Any, plan: _Plan) -> jax.Array:
    """Scores (devices, rows, group · T): mean distance to the nearest images."""

    def part(cosines: jax.Array, base: jax.Array) -> jax.Array:
        first = (plan.index() * plan.blocks + base) * plan.group
        images = jnp.arange(plan.parts * plan.blocks * plan.group)[None]

        def one(given: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, found = given
            found = found.reshape(-1, found.shape[-1]).T
            own = first + row * plan.group + jnp.arange(len(found))[:, None] // plan.tokens
            others = (images != own) & (images < plan.count)
            nearest, _ = lax.top_k(jnp.where(others, found, -jnp.inf), plan.kept)
            # The root before the mean: they do not commute.
            return jnp.mean(jnp.sqrt(jnp.maximum(2.0 - 2.0 * nearest, 0.0)), axis=1)

        return lax.map(one, (jnp.arange(plan.rows), cosines))[None]

    return _mapped(part, plan, 1, 1)(cosines, jnp.asarray(base, jnp.int32))
