"""``dsad compare``: detectors × backbones × data sets × seeds, to one table."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from dsad.assembly.compare import compare, prepare
from dsad.core import paths
from dsad.evaluation.compared import ALL, FILE, NONE, TABLE, commercial_words, shots_words, told
from dsad.evaluation.report.page import metric_label
from dsad.terminal import console, flags


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "compare", "evaluate detectors × backbones × data sets × seeds, each once; the same "
        "command goes on where it was stopped.", config="configs/compare.py",
    )  # fmt: skip
    command.string("workdir", "", "Directory of the comparison, with one for each evaluation.")
    command.switch("overwrite", "Measure again what was measured with other settings.")
    command.switch("allow_different", "Compare numbers although their protocols differ.")
    command.distributed()
    config, values, _ = command.parse(argv)
    flags.start_distributed(values)
    out = console.console()
    made = prepare(
        config, values.workdir, out, overwrite=values.overwrite,
        allow_different=values.allow_different,
    )  # fmt: skip
    for note in made.notes:
        out.print(note)
    out.print(f"{len(made.cells)} evaluations, {len(made.done)} of them finished")
    if made.bytes:
        free = paths.free(paths.directory(made.features))
        out.print(
            f"features: about {paths.size(made.bytes)} to compute and to keep in {made.features}"
            + (f" ({paths.size(free)} free)" if free is not None else "")
        )
    content = compare(made, values.workdir, out, config.to_dict())
    for name in content["datasets"]:
        for made_table in tables(content, name):
            out.print(made_table)
    for line in _licences(content):
        out.print(line)
    folder = values.workdir.rstrip("/")
    out.print(
        f"written: {folder}/{FILE}, {TABLE}; page:\n  dsad report {shlex.quote(values.workdir)}"
    )
    return 0


#: So many columns of numbers of shots, with their deviations, fit 80 columns.
_BESIDE = 4


def tables(content: Mapping[str, Any], name: str) -> list[Table]:
    """A data set's numbers, a row for each backbone and detector, with the paired differences.

    A table of the metrics, or, of several numbers of shots, one for each metric with a column for
    each number. Below a number is its difference to the baseline; a table fits 80 columns, and
    the last one explains itself.
    """
    found, main = content["datasets"][name], content["main"]
    shots, captions = found["shots"], _captions(content, found)
    if len([s for s in shots if s != NONE]) < 2:
        columns = [metric_label(m) for m in main]
        own = "" if shots[0] in (ALL, NONE) else f", {shots_words(shots[0])}"
        made = console.table(
            "backbone\ndetector", *columns, title=f"{name}{own}", title_justify="left"
        )
        rows = [
            (row["backbone"], _detector(row), [_cell(found, number, m) for m in main])
            for number, row in enumerate(found["rows"])
        ]
        return [_filled(made, rows, captions)]
    made_tables = []
    for metric in main:
        for start in range(0, len(shots), _BESIDE):
            some = shots[start : start + _BESIDE]
            columns = [shots_words(s) for s in some]
            made = console.table(
                "backbone\ndetector", *columns, title=f"{name}: {metric_label(metric)}",
                title_justify="left", show_edge=False, padding=(0, 0, 0, 1),
            )  # fmt: skip
            made_tables.append(_filled(made, _beside(found, metric, some), []))
    made_tables[-1].caption = "\n".join(captions) or None
    return made_tables


def _beside(found: Mapping[str, Any], metric: str, shots: Any) -> list[tuple[str, str, list[Text]]]:
    """Rows of one metric with a cell for each of the numbers of shots; none without any."""
    cells: dict[tuple[str, str], dict[Any, Text]] = {}
    for number, row in enumerate(found["rows"]):
        if row["shots"] in shots:
            own = cells.setdefault((row["backbone"], row["detector"]), {})
            own[row["shots"]] = _cell(found, number, metric)
    return [(*pair, [own.get(s, Text()) for s in shots]) for pair, own in cells.items()]


def _filled(made: Table, rows: Any, captions: list[str]) -> Table:
    """The table with its rows; a line parts those of a backbone from the next one's."""
    for number, (backbone, detector, cells) in enumerate(rows):
        last = rows[number + 1 : number + 2]
        parts = bool(last) and last[0][0] != backbone
        made.add_row(Text.assemble(backbone, "\n", (detector, "dim")), *cells, end_section=parts)
    made.caption = "\n".join(captions) or None
    return made


def _detector(row: Mapping[str, Any]) -> str:
    return f"{row['detector']} ({shots_words(NONE)})" if row["shots"] == NONE else row["detector"]


def _cell(found: Mapping[str, Any], number: int, metric: str) -> Text:
    row, leads = found["rows"][number], number in found["leads"][metric]
    own, gap = row["numbers"][metric], row["differences"].get(metric)
    text = Text(told(own) + ("*" if leads else ""), "bold" if leads else "")
    if row["baseline"]:
        text.append("\nbaseline", "dim")
    elif gap:
        text.append(f"\n{told(gap, '+.3f')}", "dim")
    return text


def _captions(content: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    several = max(len(row["seeds"]) for row in found["rows"]) > 1
    lines = [found["defects"]] if found["defects"] else []
    if len(found["categories"]) > 1:
        lines.append(f"means over {len(found['categories'])} categories")
    if several:
        seeds = dict.fromkeys(s for row in found["rows"] for s in row["seeds"])
        lines.append(f"mean ± sample standard deviation over {len(seeds)} seeds")
        numbers = [row["numbers"][m] for row in found["rows"] for m in content["main"]]
        if any(own["std"] == 0 for own in numbers):
            lines.append("without ±: the same with every seed")
    against = "/".join(filter(None, content["baseline"].values()))
    if against:
        lines.append(f"below: {'paired ' if several else ''}difference to {against}")
    if any(found["leads"].values()):
        alike = " of as many shots" if len(found["shots"]) > 1 else ""
        lines.append(f"* higher than all others{alike}, beyond the difference's deviation")
    if NONE in found["shots"]:
        lines.append("0-shot: fitted on the test images, which score each other")
    if found["notices"]:
        lines.append("these numbers do not mean the same; the report says why")
    return lines


def _licences(content: Mapping[str, Any]) -> list[str]:
    """A line for the weights of each backbone."""
    lines = []
    for name, own in content["backbones"].items():
        may = commercial_words(own["commercial"])
        lines.append(f"weights of {name}: {own['licence']}; commercial use: {may}")
    return lines
