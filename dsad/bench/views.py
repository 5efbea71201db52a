"""``dsad bench views``: views/s of every recipe and of SPD's triplets, beside Pillow."""

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from dsad.augment import recipes
from dsad.augment.smooth_blend import draw_pieces, smooth_blend
from dsad.augment.triplets import TripletConfig, make_triplet
from dsad.augment.views import ViewConfig, make_view
from dsad.bench import _host_views, _measure
from dsad.core.rng import sample_keys
from dsad.objectives import ds2
from dsad.terminal import console, flags

TRIPLET, BLEND = "SPD triplet", "SmoothBlend alone"
#: Images that a triplet gives; any other row gives one.
EACH = {TRIPLET: 3}
#: What stands before a recipe's name in the rounds when the peer makes it.
PEER = "peer: "


def main(argv: list[str]) -> int:
    """The command: ``dsad bench views``."""
    command = flags.Command(
        "bench views", "views/s of every recipe and of SPD's triplets, beside Pillow."
    )
    command.integer("side", 224, "Pixels of a view.", at_least=8)
    command.integer("canvas", 256, "Pixels of the images.", at_least=8)
    command.integer("batch", 32, "Images of a batch.", at_least=1)
    command.integer("rounds", 5, "Timed rounds of everything; medians are shown.", at_least=1)
    _, values, _ = command.parse(argv)
    views(values.side, values.canvas, values.batch, values.rounds)
    return 0


def views(side: int, canvas: int, batch: int, rounds: int) -> dict[str, float]:
    """Time everything once a round, in turns; prints a table, returns median seconds by name."""
    out, configs = console.console(), view_configs(side)
    images = np.random.default_rng(0).integers(0, 256, (batch, canvas, canvas, 3), dtype=np.uint8)
    ours, peers = programs(images, configs, side), _peers(images, configs)
    out.print(f"compiling {len(ours)} programs ...")
    timings = _measure.interleaved({**ours, **peers}, rounds, first=ours)
    _print(out, timings, batch)
    median = {name: timing.median for name, timing in timings.items()}
    device = jax.devices()[0]
    out.print(
        f"SmoothBlend takes {median[BLEND] / median[TRIPLET]:.1%} of a triplet's time. Views of "
        f"{side} px of images of {canvas} px, {batch} a batch, on {device.device_kind} beside "
        f"{os.cpu_count()} CPUs; medians of {rounds} interleaved rounds. A triplet counts as three "
        "views. The batch lies where the views are made. The peer: "
        f"{_kind()} views, one after the other on one thread. A core: views by CPU seconds of all "
        f"threads. × peer compares {'views a core' if _on_cpu() else 'views/s'}."
    )
    return median


def view_configs(side: int) -> dict[str, ViewConfig]:
    """Every recipe of ``augment.recipes`` and the two views of DS2, at this side."""
    named = {n.lower(): v for n, v in vars(recipes).items() if isinstance(v, ViewConfig)}
    method = ds2.Config()
    named |= {"ds2, view 1": method.view1, "ds2, view 2": method.view2}
    return {name: dataclasses.replace(view, side=side) for name, view in named.items()}


def programs(
    images: np.ndarray, configs: Mapping[str, ViewConfig], side: int
) -> dict[str, Callable[[], Any]]:
    """Compiled calls by the name of their row, all on the same images (b, c, c, 3) uint8."""
    count, canvas = images.shape[:2]
    batch = jax.device_put(
        {
            "image": images,
            "size": np.full((count, 2), canvas, np.int32),
            "index": np.arange(count, dtype=np.int32),
            "epoch": np.zeros(count, np.int32),
        }
    )
    key, triplet = jax.random.key(0), TripletConfig()
    triplet = dataclasses.replace(triplet, view=dataclasses.replace(triplet.view, side=side))

    def only_image(batch: Any, key: jax.Array, config: ViewConfig) -> jax.Array:
        return make_view(batch, key, config)["image"]

    def blended(pixels: jax.Array, key: jax.Array) -> jax.Array:
        pieces = draw_pieces(sample_keys(key, batch["epoch"], batch["index"]), side, triplet.blend)
        return smooth_blend(pixels, pieces, triplet.blend)[0]

    calls = {}
    for name, config in configs.items():
        calls[name] = functools.partial(
            jax.jit(functools.partial(only_image, config=config)), batch, key
        )
    make = jax.jit(functools.partial(make_triplet, config=triplet))
    calls[TRIPLET] = functools.partial(make, batch, key)
    pixels = jax.jit(lambda k: jax.random.uniform(k, (count, side, side, 3)))(key)
    calls[BLEND] = functools.partial(jax.jit(blended), pixels, key)
    return calls


def _on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def _kind() -> str:
    return "torchvision" if _measure.installed("torchvision") else "Pillow"


def _peers(
    images: np.ndarray, configs: Mapping[str, ViewConfig]
) -> dict[str, Callable[[], list[Any]]]:
    maker = _host_views.torchvision_view if _kind() == "torchvision" else _host_views.PillowView
    pictures = [Image.fromarray(image) for image in images]

    def call(view: _host_views.View) -> list[Any]:
        return [view(picture) for picture in pictures]

    return {f"{PEER}{n}": functools.partial(call, maker(c)) for n, c in configs.items()}


def _print(out: Any, timings: Mapping[str, _measure.Timing], batch: int) -> None:
    columns = ("recipe", "ms a batch", "views/s", "/s a core", "peer/s", "peer a core", "× peer")
    table = console.table(*columns, whole=True)
    for name, timing in timings.items():
        if name.startswith(PEER):
            continue
        if name == TRIPLET:
            table.add_section()
        speeds = _speeds(timing, batch * EACH.get(name, 1))
        peer = _speeds(timings[PEER + name], batch) if PEER + name in timings else ()
        ratio = (speeds[_on_cpu()] / peer[_on_cpu()],) if peer else ()
        table.add_row(
            name, f"{timing.median * 1e3:,.1f}", *(f"{speed:,.0f}" for speed in (*speeds, *peer)),
            *(f"{x:.2f}" for x in ratio),
        )  # fmt: skip
    out.print(table)


def _speeds(timing: _measure.Timing, count: int) -> tuple[float, float]:
    """Views by seconds and by CPU seconds, from the medians of rounds that make ``count``."""
    busy = statistics.median(run.cpu for run in timing.rounds)
    return count / timing.median, count / busy if busy else float("inf")
