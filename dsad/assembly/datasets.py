"""The data set of a config, with what its index has to say."""

from rich.console import Console

from dsad.core import types
from dsad.data import base as data_base


def loaded(config: data_base.DataConfig, out: Console) -> types.Dataset:
    """The data set of a config; says so when its index has warnings."""
    dataset = data_base.load(config)
    if origin := getattr(dataset, "origin", ""):  # optional: from what it was prepared
        out.print(origin, markup=False)
    warnings = [f for f in getattr(dataset, "faults", ()) if f.severity == "warning"]
    if warnings:
        out.print(
            f"{len(warnings)} warning(s) about the files of {dataset.name}, first: {warnings[0]} "
            "(all: dsad check-data)",
            markup=False,
        )
    return dataset
