"""``dsad prepare``: one folder of ArrayRecord files from a data set of many files."""

import shlex
import time

from dsad.assembly import datasets
from dsad.cli.check_data import data_config
from dsad.data import records, records_builder
from dsad.terminal import console, flags


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "prepare", "write a data set as ArrayRecord files, for config.data.name=records.",
        config="configs/data.py",
    )  # fmt: skip
    command.string("out", "", "Folder for the records.")
    command.integer("canvas", 0, "Store decoded canvases of this side instead of the files.")
    command.switch("overwrite", "Replace the records in --out.")
    config, values, _ = command.parse(argv)
    data = data_config(config)
    out = console.console()
    records.tfds()
    records_builder.target(values.out, values.overwrite)  # before anything is read
    dataset = datasets.loaded(data, out)
    with console.progress("measuring", out) as tell:
        planned = records_builder.plan(dataset, values.canvas, tell)
    out.print(f"{dataset.protocol['dataset']}: {planned}")
    start = time.monotonic()
    with console.progress("writing", out) as tell:
        folder = records_builder.write(
            planned, values.out, overwrite=values.overwrite, progress=tell, say=out.print
        )
    out.print(records.described(records.read_about(folder)))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    use = ["--config.data.name=records", f"--config.data.root={values.out}"]
    use += [f"--config.data.canvas={values.canvas}"] if values.canvas else []
    took = f"{size / 1e9:.3g} GB in {time.monotonic() - start:.0f} s"
    out.print(f"{took}; use it with\n  {shlex.join(use)}")
    return 0
