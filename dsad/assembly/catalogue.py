"""What is known of published data sets, for people: all in a table, or one in full."""

from rich import box
from rich.console import Console
from rich.table import Table

from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError
from dsad.data import about

#: Variants that are told by name; of more the first and the last.
_VARIANTS = 4


def print_all(out: Console) -> None:
    """A table of the published data sets, 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True, width=80)
    table.add_column("name", no_wrap=True)
    table.add_column("data set: licence, citation, masks, published images, what to know of it")
    for name, item in about.every().items():
        counts = [f"{n:,} {column}" for column, n in item.totals.items()]
        categories = item.categories or len(item.counts)
        numbers = [f"{categories} categor{'ies' if categories > 1 else 'y'}"] if categories else []
        text = f"{item.title}: {item.licence}\n{item.citation}\nmasks: {item.masks}\n"
        text += ", ".join([*numbers, *counts]) or "published counts: not known"
        text += "".join(f"\nnote: {remark}" for remark in item.remarks)
        table.add_row("\n".join(_names(name, item)), text)
    out.print(table)
    out.print(
        "More of one: dsad check-data --list --config.data.name=NAME\n"
        "Own images need no name: dsad check-data FOLDER"
    )


def _names(name: str, item: about.About) -> list[str]:
    names = item.names(name)
    return names if len(names) <= _VARIANTS else [*names[:2], "...", names[-1]]


def print_one(name: str, out: Console) -> None:
    """All that is known of one data set; ConfigError for a name that is none of a published one."""
    known, module = about.every(), name.partition(":")[0]
    if module not in known:
        raise ConfigError(
            f"config.data.name: {name!r} is no published data set."
            f"{suggestion(module, known)} There is: {listed(known)}."
        )
    item = known[module]
    out.print(item.title, style="bold")
    for title, text in (
        ("licence", item.licence), ("citation", item.citation), ("address", item.address),
        ("masks", item.masks),
    ):  # fmt: skip
        if text:
            out.print(f"{title + ':':10}{text}")
    out.print("names:")
    for full, split in zip(item.names(module), item.protocols.values(), strict=True):
        out.print(f"  {full}: {split}")
    for remark in item.remarks:
        out.print(f"note: {remark}")
    if item.counts:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("published images of")
        for column in item.columns:
            table.add_column(column, justify="right")
        for category, counts in item.counts.items():
            table.add_row(category, *(f"{n:,}" for n in counts))
        if len(item.counts) > 1 and not any(name.startswith("all") for name in item.counts):
            table.add_section()
            table.add_row("together", *(f"{n:,}" for n in item.totals.values()))
        out.print(table)
