"""How far a localization run is: images done of all, what is going on, what is compiled."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsad.core.types import Dataset, Progress, Tree
from dsad.evaluation.support import Sets, validation


@dataclasses.dataclass
class Ticks:
    """Tells ``progress`` of the images of a run; ``total`` is known from the start.

    ``compiled`` holds the programs so far, by what they compute and of which shapes.
    """

    progress: Progress
    total: int
    done: int = 0
    compiled: set[Any] = dataclasses.field(default_factory=set)

    def of(
        self,
        category: str,
        what: str,
        program: Any = None,
        cached: Callable[[], bool] = lambda: False,
    ) -> Callable[[int], None]:
        """Advances by images; until the first ones a ``program`` that is new is compiled."""

        def advance(n: int) -> None:
            self.done = min(self.done + n, self.total)
            note = " (cached features)" if n > 0 and cached() else ""
            self.progress(self.done, self.total, f"{what}{note}: {category}")

        if program is not None and program not in self.compiled:
            self.compiled.add(program)
            self.progress(self.done, self.total, f"compiling …  {what}: {category}")
        return advance

    def fitting(self, title: str) -> Progress:
        """Reports of a detector's own work; images done stay as they are."""

        def show(done: int, total: int, text: str) -> None:
            self.progress(self.done, self.total, f"{done}/{total} {text}, {title}")

        return show


def images(
    dataset: Dataset, sets: Sets, categories: Sequence[str], seeds: Sequence[int], *,
    fits: bool, measured: bool,
) -> int:  # fmt: skip
    """Those to read: each seed's support set, what sets thresholds, and test images."""
    total = 0
    for category in categories:
        for own in (sets.by_category[category][seed] for seed in seeds) if fits else ():
            rotations, held = sets.sampling.support.rotations, len(own.held_out)
            passes = 2 * len(own.bank) - held if held else len(own.bank)
            total += passes * rotations + held
            if sets.validated:
                total += len(validation(dataset, category))
        if measured:
            total += sum(len(sets.tested(dataset, category, seed)) for seed in seeds)
    return total


def shapes(tree: Tree) -> Any:
    """What a program that scores with it is compiled for."""
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(tree))


def quiet(images: int) -> None:
    """Of passes over images that were counted before."""
