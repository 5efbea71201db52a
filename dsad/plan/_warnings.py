"""Traffic that the sharding rule did not mean, and batches larger than the data set."""

import math
import re
from typing import Any

from dsad.assembly.pretrain import Run
from dsad.core.tree import flatten
from dsad.plan._compile import Program

#: Collected arrays below this size are not worth a word.
SMALL = 2**20
#: A batch of raw images from which on collecting it is.
MANY = 2**28


def unintended(run: Run, program: Program) -> list[str]:
    """A line for each: stacks of blocks or all samples on every chip, copies, repeated images.

    Weights that are split over "fsdp" are meant to be collected where they are used, one block of a
    stack at a time; samples are meant to stay where they are.
    """
    lines, samples = [], run.data.samples
    if samples is not None and samples < run.config.batch_size:
        lines.append(
            f"a step takes {run.config.batch_size} images, more than the {samples} of the data "
            "set: images repeat within a step"
        )
    lines += _fetching(run)
    params = flatten({"params": run.abstract.params, "extra": run.abstract.extra})
    stacks, known = {}, set()
    for path, leaf in params.items():
        shape = _plain(leaf.shape)
        # Compilers reshape at will: a kernel of 16 × 16 × 3 pixels is a matrix of 768 rows.
        known |= {math.prod(shape), math.prod(leaf.shape[1:])}
        if "blocks" in path.split("/") and leaf.ndim > 2 and "fsdp" in leaf.sharding.spec:
            stacks[shape] = path
    for row in program.collectives:
        if row["kind"] != "all-gather":
            continue
        for text in row["shapes"].split(", "):
            shape = _plain(int(n) for n in re.findall(r"\d+", text.partition("[")[2]))
            large = math.prod(shape) not in known and row["result_bytes"] >= SMALL
            if shape in stacks:
                lines.append(_line(text, row, f"all blocks of {stacks[shape]} at once"))
            elif large and _all_samples(run, shape):
                lines.append(_line(text, row, "activations of all samples"))
    return list(dict.fromkeys(lines + copies(program)))


def copies(program: Program) -> list[str]:
    """A line for each array that the partitioner copies whole to every chip."""
    return [
        f"the partitioner copies {message} whole to every chip (involuntary full rematerialization)"
        for message in program.messages
    ]


def _fetching(run: Run) -> list[str]:
    """About a data set that is split over the chips, which all pass on the images of a step."""
    if run.store is None or run.store["image"].sharding.is_fully_replicated:
        return []
    moved = run.config.batch_size * math.prod(run.store["image"].shape[1:])
    if moved < MANY:
        return []
    return [
        f"the data set is split over the chips, and each of them handles all images of a step to "
        f"find its own: {moved / 2**20:,.0f} MiB, however many chips there are. "
        "config.data.cache=host brings every chip only its part."
    ]


def _line(text: str, row: dict[str, Any], what: str) -> str:
    return (
        f"every chip collects {what}: {text}, {row['result_bytes'] / 2**20:,.0f} MiB, "
        f"{row['count']} times a step"
    )


def _all_samples(run: Run, shape: tuple[int, ...]) -> bool:
    """Whether an axis is as long as the batch, or a multiple in front (views, patches)."""
    batch = run.config.batch_size // run.config.accumulate
    return len(shape) > 1 and (batch in shape or shape[0] % batch == 0)


def _plain(shape: Any) -> tuple[int, ...]:
    """Without axes of length 1, which the compiler adds and drops."""
    made = tuple(n for n in shape if n != 1)
    return made if math.prod(made) > 1 else ()
