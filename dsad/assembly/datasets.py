"""The data set of a config, with what its index has to say."""

from rich.console import Console

from dsad.data import base as data_base


def loaded(config: data_base.DataConfig, out: Console) -> data_base.IndexedDataset:
    """The data set of a config; says so when its index has warnings."""
    dataset = data_base.load(config)
    if dataset.origin:
        out.print(dataset.origin)
    warnings = [f for f in dataset.faults if f.severity == "warning"]
    if warnings:
        out.print(
            f"{len(warnings)} warning(s) about the files of {dataset.name}, first: {warnings[0]} "
            f"(all: {data_base.check_command(config)})"
        )
    return dataset
