"""What people read: one plan in full, several as a table."""

from typing import Any, NamedTuple

from rich import box
from rich.console import Console

from dsad.core.chips import CHIPS
from dsad.plan._estimate import ASSUMPTIONS
from dsad.plan._jobs import Kind
from dsad.plan._plan import Plan
from dsad.terminal import console

#: Rows of the table of collectives; the rest is summed up.
ROWS = 12


class Words(NamedTuple):
    """How a kind of job is spoken of: one ``call`` of its program, and what makes it fit.

    ``cost`` heads the column of costs in a sweep, ``beside`` is needed but not planned.
    """

    call: str
    passes: str
    outputs: str
    smaller: str
    cost: str
    beside: str


WORDS: dict[Kind, Words] = {
    "training": Words(
        "step", "forward and backward", "outputs that take no argument's place",
        "Take more chips or a smaller batch, split the weights (config.mesh.fsdp) or, where the "
        "loss does not couple its images, go through the batch in parts (config.accumulate).",
        "hours", "",
    ),
    "features": Words(
        "batch", "forward", "feature maps in float32",
        "Every chip holds all weights: take a smaller batch (config.evaluation.batch_size), or "
        "more chips for the same one.",
        "chip-h\n/1000",
        "Features alone. On top come the detector's state and scores, wrappers of maps, and the "
        "features that stay on the chips (config.evaluation.cache_mb).",
    ),
}  # fmt: skip


def one(plan: Plan, out: Console) -> None:
    """Everything about one plan."""
    words, mesh = WORDS[plan.kind], " × ".join(f"{k} {v}" for k, v in plan.mesh.items())
    out.print(
        f"\n{plan.spec} on {plan.topology}: {plan.chips} × {plan.chip}, mesh {mesh}, "
        f"{plan.batch_size} {plan.unit}s a {words.call}, {plan.batch_size / plan.chips:g} a chip"
    )
    known = "refused" if plan.program.refused else "compiled"
    known += " in an earlier run" if plan.cached else ""
    out.print(f"{known} ({plan.effort} effort, {plan.program.seconds:.0f} s)")
    _memory(plan, out)
    if words.beside:
        out.print(words.beside)
    if not plan.program.refused:
        _work(plan, out)
        _collectives(plan, out)
    if plan.estimate:
        _times(plan, out)
    for line in plan.warnings:
        out.print(f"warning: {line}")
    if plan.estimate:
        out.print("The estimate supposes:")
        chip = CHIPS.get(plan.chip)
        source = chip.source if chip else "measured on this machine"
        first, *others = ASSUMPTIONS
        for line in (first.format(call=words.call), *others, f"figures of the chip: {source}"):
            out.print(f"  - {line}")


def fits(plan: Plan) -> str:
    """One line: whether a chip can hold it."""
    need, limit = plan.program.total, plan.limit
    if plan.program.refused:
        least = f"at least {size(need)}" if need else "more than there is"
        text = f"{least} a chip needed, {size(limit)} there"
    elif not limit:
        return f"{size(need)} a chip; the memory of {plan.chip} is not known to dsad."
    else:
        text = f"{size(need)} of {size(limit)} a chip ({need / limit:.0%})"
    if plan.fits:
        return f"fits: {text}"
    return f"DOES NOT FIT: {text}. {WORDS[plan.kind].smaller}"


def size(count: float) -> str:
    """Bytes for people: GiB, or MiB below a tenth of one."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


def _memory(plan: Plan, out: Console) -> None:
    program = plan.program
    table = console.table("memory per chip", "")
    for name, held in plan.held.items():
        table.add_row(f"  {name}", size(held))
    if not program.refused:
        arguments = "all of these, as the compiler lays them out"
        table.add_row(arguments, size(program.arguments), end_section=True)
        table.add_row("temporaries", size(program.temporaries))
        outputs = size(program.outputs - program.alias)
        table.add_row(WORDS[plan.kind].outputs, outputs)
        table.add_row("generated code", size(program.code), end_section=True)
        table.add_row("sum, which has to be there", size(program.total))
        if program.peak:
            table.add_row("live at the fullest moment, says the compiler", size(program.peak))
    out.print(table)
    out.print(fits(plan), style="bold green" if plan.fits else "bold red")
    if program.refused:
        out.print(f"the compiler says: {program.refused}")


def _work(plan: Plan, out: Console) -> None:
    program = plan.program
    needed = plan.model_flops_per_image * plan.batch_size / plan.chips
    words = WORDS[plan.kind]
    table = console.table(f"work per chip and {words.call}", "")
    table.add_row("matrix products and convolutions", f"{program.flops / 1e9:,.1f} GFLOP")
    table.add_row("what the model needs", f"{needed / 1e9:,.1f} GFLOP")
    table.add_row("memory traffic", f"{program.bytes / 1e9:,.2f} GB")
    sent = sum(row["sent"] for row in program.collectives)
    table.add_row("sent to other chips", f"{sent / 1e9:,.3f} GB")
    out.print(table)
    out.print(
        f"model: {plan.model_flops_per_image / 1e9:,.2f} GFLOP per {plan.unit}, {words.passes}; "
        f"XLA itself counts {program.xla_flops / 1e9:,.1f} GFLOP and {program.xla_bytes / 1e9:,.2f}"
        " GB a chip, every loop as one pass"
    )


def _collectives(plan: Plan, out: Console) -> None:
    rows = plan.program.collectives
    if not rows:
        out.print("collectives: none")
        return
    table = console.table(
        "collectives", "result", "of chips", f"a {WORDS[plan.kind].call}", "MB each", "MB sent"
    )
    for row in rows[:ROWS]:
        shapes = row["shapes"] if len(row["shapes"]) < 44 else f"{row['shapes'][:40]} ..."
        table.add_row(
            row["kind"], shapes, str(row["group_size"]), str(row["count"]),
            f"{row['result_bytes'] / 1e6:,.2f}", f"{row['sent'] / 1e6:,.1f}",
        )  # fmt: skip
    if rest := rows[ROWS:]:
        table.add_section()
        table.add_row(
            f"{len(rest)} more kinds", "", "", str(sum(r["count"] for r in rest)), "",
            f"{sum(r['sent'] for r in rest) / 1e6:,.1f}",
        )  # fmt: skip
    out.print(table)


def _times(plan: Plan, out: Console) -> None:
    made = plan.estimate
    assert made is not None
    call, unit = WORDS[plan.kind].call, plan.unit
    table = console.table(f"a {call} at best", "ms")
    for name in ("compute", "memory", "interconnect"):
        mark = " ←" if name == made.bound_by else ""
        table.add_row(name + mark, f"{getattr(made, name) * 1e3:,.2f}")
    table.add_section()
    table.add_row(f"{call}, bound by {made.bound_by}", f"{made.step * 1e3:,.2f}")
    out.print(table)
    out.print(
        f"{_few(made.images_per_s)} {unit}s/s, {made.images_per_s_per_chip:,.1f} {unit}s/s/chip, "
        f"MFU {made.mfu:.1%}"
    )
    if plan.kind == "features":
        chip_hours = _few(made.chip_hours_per_thousand)
        out.print(f"1,000 {unit}s: {_few(1000 / made.images_per_s)} s, {chip_hours} chip-hours")
        return
    if made.hours is None:
        out.print("hours: the number of images is not known; give --samples=N or config.data.root.")
        return
    length = f"{plan.epochs:g} epochs" if plan.epochs else "the steps"
    samples = f" of {plan.samples:,} images ({plan.samples_from})" if plan.samples else ""
    out.print(
        f"{length}{samples}: {plan.steps:,} steps, {_few(made.hours)} hours, "
        f"{_few(made.chip_hours or 0.0)} chip-hours"
    )


def sweep(plans: list[Plan | str], out: Console) -> Plan | None:
    """A line for each, the fastest that fits marked; returns that one.

    Texts among the plans say why a combination could not be built.
    """
    made = [p for p in plans if not isinstance(p, str)]
    best = max((p for p in made if p.fits and p.estimate), key=_speed, default=None)
    unit, words = (made[0].unit, WORDS[made[0].kind]) if made else ("image", WORDS["training"])
    columns = (f"{unit}s", "GiB", f"{words.call} ms", "bound by", f"{unit}s/s", "MFU", words.cost,
               "")  # fmt: skip
    limit = f"GiB: on a chip, of {made[0].limit / 2**30:.4g}" if made else None
    looks = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    table = console.table("mesh", *columns, caption=limit, **looks)
    for column in table.columns:
        column.no_wrap = True
    for plan in made:
        mark = "← best" if plan is best else "" if plan.fits else "too big"
        table.add_row(*_cells(plan), mark)
    out.print(table)
    if words.beside:
        out.print(words.beside)
    for plan in plans:
        if isinstance(plan, str):
            out.print(f"left out: {plan}")
        elif plan.warnings:
            first, *others = plan.warnings
            more = f" (and {len(others)} more)" if others else ""
            line = f"warning: {_mesh(plan)}, {plan.batch_size} {unit}s: {first}{more}"
            out.print(line)
    if best is None:
        out.print("none of them fits", style="bold red")
    return best


def _cells(plan: Plan) -> list[str]:
    memory, made = f"{plan.program.total / 2**30:,.3g}", plan.estimate
    cells = [_mesh(plan), str(plan.batch_size), memory]
    if made is None:
        return [*cells, "", "", "", "", ""]
    cost = made.hours if plan.kind == "training" else made.chip_hours_per_thousand
    told = "?" if cost is None else _few(cost)
    speed = _few(made.images_per_s)
    return [*cells, _few(made.step * 1e3), made.bound_by, speed, f"{made.mfu:.1%}", told]


def _few(number: float) -> str:
    """Three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _mesh(plan: Plan) -> str:
    return " × ".join(map(str, plan.mesh.values()))


def _speed(plan: Any) -> float:
    return plan.estimate.images_per_s
