"""Numbers of several seeds side by side: spreads, differences seed by seed, and what leads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: A number of each seed; None where it is not defined.
BySeed = Mapping[str, float | None]


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1) of ``values`` by seed.

    Without values the mean is None; of a single one there is no deviation.
    """

    mean: float | None
    std: float | None
    values: Mapping[str, float]


def spread(values: BySeed) -> Spread:
    """Of numbers by seed; of those with an undefined one nothing is."""
    defined = {seed: float(v) for seed, v in values.items() if v is not None}
    if not defined or len(defined) < len(values):
        return Spread(None, None, {})
    numbers = np.asarray(list(defined.values()), np.float64)
    std = float(numbers.std(ddof=1)) if numbers.size > 1 else None
    if std and not np.ptp(numbers):
        std = 0.0  # of equal numbers rounding leaves a little
    return Spread(float(numbers.mean()), std, defined)


def difference(values: BySeed, baseline: BySeed) -> Spread:
    """Of ``values`` minus ``baseline``, seed by seed, over the seeds that both have.

    What both owe to a seed (the images that it draws) cancels, so this deviation, not those of the
    two, tells whether they differ.
    """
    shared: dict[str, float | None] = {}
    for seed in values:
        if seed in baseline:
            left, right = values[seed], baseline[seed]
            shared[seed] = None if left is None or right is None else left - right
    return spread(shared)


def leader(rows: Sequence[BySeed]) -> int | None:
    """The row whose number is higher than that of every other by more than its spread.

    That is, by mean and standard deviation of the paired differences. None if there is no such
    row, as with a single seed, where no spread is known, or where the seeds change nothing.
    """
    own = [spread(row) for row in rows]
    means = [row.mean for row in own]
    ranked = [i for i, mean in enumerate(means) if mean is not None]
    if len(ranked) < 2:
        return None
    best = max(ranked, key=lambda i: means[i] or 0.0)
    for other in ranked:
        gap = difference(rows[best], rows[other])
        if other == best:
            continue
        still = not (own[best].std or own[other].std)
        if still or gap.mean is None or gap.std is None or gap.mean <= gap.std:
            return None
    return best
