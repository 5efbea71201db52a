"""``dsad bench mutual``: MuSc's mutual scores beside the published pass, time and memory."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.bench import _measure
from dsad.ops.mutual import mutual_scores
from dsad.terminal import console, flags


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "bench mutual", "MuSc's mutual scores beside the published computation, time and memory."
    )
    command.integer("images", 83, "Images that score each other (bottle has 83).", at_least=2)
    command.integer("tokens", 784, "Tokens of an image.", at_least=1)
    command.integer("depth", 384, "Features of a token.", at_least=1)
    command.integer("peer_images", 8, "Images that the peer scores, 0 for all.", at_least=0)
    command.integer("rounds", 3, "Timed rounds of everything; medians are shown.", at_least=1)
    _, values, _ = command.parse(argv)
    mutual(values.images, values.tokens, values.depth, values.peer_images, values.rounds)
    return 0


def mutual(
    images: int, tokens: int, depth: int, peer_images: int, rounds: int
) -> dict[str, _measure.Timing]:
    """Time both on tokens around common centres; prints a table, returns the timings."""
    out = console.console()
    made, kept = tokens_of(images, tokens, depth), max(1, int(0.3 * (images - 1)))
    scored = min(peer_images or images, images)
    torch = _measure.installed("torch")
    peer = f"published pass, {'torch' if torch else 'numpy'}"
    placed = jnp.asarray(made)
    calls: dict[str, Any] = {
        "dsad": functools.partial(mutual_scores, placed, kept),
        peer: functools.partial(_by_torch if torch else _by_numpy, made, kept, scored),
    }
    timed = _measure.interleaved(calls, rounds, keep=True)
    own, theirs = (timed[n].result for n in ("dsad", peer))
    columns = ("", "images", "s an image", "CPU s an image", "times dsad", "CPU times", "memory MB")
    table = console.table(*columns, whole=True)
    pace = {}
    for name, count in (("dsad", images), (peer, scored)):
        cpu = float(np.median([run.cpu for run in timed[name].rounds]))
        first, pace[name] = timed[name].first, (timed[name].median / count, cpu / count)
        assert first is not None  # every call was made apart once
        table.add_row(
            name, str(count), *(f"{x:.3f}" for x in pace[name]),
            *(f"{x / y:.2f}" for x, y in zip(pace[name], pace["dsad"], strict=True)),
            f"{first.growth / 1e6:.0f}",
        )  # fmt: skip
    out.print(table)
    if not torch:
        out.print(f"{_measure.missing('torch', 'torch')}; its pass was made in numpy.")
    operations = images * (images - 1) * tokens**2 * depth
    machine = _measure.machine()
    out.print(
        f"{images} images × {tokens} tokens × {depth}, {os.cpu_count()} CPUs, "
        f"{jax.devices()[0].device_kind}; medians of {rounds} interleaved rounds. Floor: half the "
        f"products, {operations / 1e9:,.0f} GFLOP at {machine.operations / 1e9:.0f} GFLOP/s "
        f"{operations / machine.operations / images:.3f} s an image. Largest difference of the "
        f"scores: {np.abs(own[:scored] - theirs).max():.1e}. Memory: growth of the resident set in "
        "the first call, compilation included."
    )
    return timed


def tokens_of(images: int, tokens: int, depth: int) -> np.ndarray:
    """Unit tokens (n, t, c) near one random direction for each place."""
    rng = np.random.default_rng(0)
    made = rng.standard_normal((images, tokens, depth), np.float32)
    made += rng.standard_normal((tokens, depth), np.float32)
    return made / np.linalg.norm(made, axis=-1, keepdims=True)


def _by_torch(tokens: np.ndarray, kept: int, images: int) -> np.ndarray:
    """The public code's pass: each image against all tokens of all others."""
    import torch  # type: ignore[import-not-found]

    every, found = torch.from_numpy(tokens), []
    count, side, depth = every.shape
    with torch.no_grad():
        for i in range(images):
            others = torch.cat([every[:i], every[i + 1 :]]).reshape(-1, depth)
            gaps = torch.cdist(every[i], others).reshape(side, count - 1, side).min(-1).values
            found.append(gaps.topk(kept, largest=False).values.mean(1))
    return torch.stack(found).numpy()


def _by_numpy(tokens: np.ndarray, kept: int, images: int) -> np.ndarray:
    """The same by numpy."""
    count, side, depth = tokens.shape
    found = np.empty((images, side), np.float32)
    for i in range(images):
        others = np.delete(tokens, i, axis=0).reshape(-1, depth)
        squares = np.maximum(2.0 - 2.0 * (tokens[i] @ others.T), 0.0)
        gaps = np.sqrt(squares).reshape(side, count - 1, side).min(-1)
        found[i] = np.partition(gaps, kept - 1, axis=1)[:, :kept].mean(1)
    return found
