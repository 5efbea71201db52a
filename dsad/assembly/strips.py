"""What a run trains on, as pictures in its directory: a strip of a few images for every title.

DIR/pictures/STEP NUMBER TITLE.png: the same images at the first step and at the last, drawn as in
the first epoch.
"""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath

from dsad.core import distributed, hosts, paths, rng
from dsad.core.batch import Batch
from dsad.core.types import HasPictures, Tree
from dsad.evaluation.report.training import FOLDER
from dsad.train.state import TrainState

#: Pixels between two images of a strip.
GAP = 4


class Strips:
    """Writes the pictures of one batch for any state of a run; nothing else of the run changes.

    ``key`` is the run's; ``count`` images of the batch are drawn, on one device of process 0. The
    one before the first of them is there as well: some views are filled from it.
    """

    def __init__(
        self, objective: HasPictures, batch: Batch, key: jax.Array, folder: epath.Path, count: int
    ) -> None:
        # An argument of what is drawn: XLA would compute with a constant while it compiles.
        self._batch = jax.tree.map(lambda x: hosts.whole(x)[: count + 1], batch)
        words = hosts.whole(jax.random.key_data(key))
        self.folder, self._titles = folder / FOLDER, list[str]()

        def draw(params: Tree, extra: Tree, batch: Batch) -> list[jax.Array]:
            views = rng.named(
                jax.random.wrap_key_data(jnp.asarray(words)), "views"
            )  # as the step draws them
            drawn = objective.pictures(params, extra, batch, views)
            self._titles = list(drawn)  # a compiled function would sort them
            return [jnp.clip(x[-count:], 0, 1) for x in drawn.values()]

        # What runs twice is compiled in a hurry; other devices keep the options of the step.
        hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self._draw = jax.jit(draw, compiler_options=hurry)

    def write(self, state: TrainState) -> None:
        """Every process calls; the first one draws and writes."""
        step, *trees = jax.tree.map(hosts.whole, (state.step, state.params, state.extra))
        if not distributed.is_main():
            return
        for number, drawn in enumerate(jax.device_get(self._draw(*trees, self._batch))):
            name = f"{int(step):08d} {number} {self._titles[number]}.png"
            paths.write_whole(self.folder / name, _strip(drawn))


def _strip(images: Any) -> bytes:
    """Images (n, h, w, 3) in [0, 1] beside each other, as a PNG."""
    space = np.full((images.shape[1], GAP, 3), 255, np.uint8)
    pixels = np.rint(np.asarray(images) * 255).astype(np.uint8)
    row = [part for image in pixels for part in (image, space)][:-1]
    file = io.BytesIO()
    PIL.Image.fromarray(np.concatenate(row, axis=1)).save(file, "PNG")
    return file.getvalue()
