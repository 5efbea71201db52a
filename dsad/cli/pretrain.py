"""``dsad pretrain``: train an encoder on the images of a data set."""

import functools
import shlex

from dsad.assembly import datasets, run_config, training, workdir
from dsad.assembly.pretrain import parse
from dsad.core import distributed
from dsad.core.errors import StoppedError
from dsad.core.types import HasProjectors
from dsad.data.base import read_as
from dsad.terminal import console, flags
from dsad.train.stop import StopSignal


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command("pretrain", "train an encoder.", config="configs/ds2.py")
    command.string("workdir", "", "Directory of the run: config, checkpoints, metrics.")
    command.switch("resume", "Continue the run in --workdir.")
    command.switch("continue", "Continue the run in --workdir if it holds one, else start it.")
    command.switch("overwrite", "Replace the run in --workdir.")
    command.distributed()
    early = command.early(argv)
    stored = (early.resume or early["continue"].value) and workdir.holds_run(early.workdir)
    if stored and not command.chooses_config(argv):
        command.config = f"{run_config.__file__}:{early.workdir}"
    config, values, _ = command.parse(argv)
    flags.start_distributed(values)
    again = bool(values["continue"].value) and workdir.holds_run(values.workdir)
    resume = bool(values.resume) or again
    out = console.console()
    claim = functools.partial(
        workdir.claim, values.workdir, "pretrain", config.to_dict(), resume=resume,
        overwrite=values.overwrite,
    )  # fmt: skip
    claim(dry=True)
    cfg, _, _ = parse(config)
    dataset = distributed.together(lambda: datasets.loaded(cfg.data, out))
    continued = resume and distributed.on_main(lambda: workdir.has_checkpoint(values.workdir))
    with read_as(cfg.data):
        prepared = training.prepare(config, out, dataset, continued=continued)
        path = claim(info=prepared.run.info)
        finished = training.pretrain(prepared, path, out, resume=resume)
    if finished:
        objective, parts = prepared.run.objective, [f"--config.backbone=run:{path}"]
        if isinstance(objective, HasProjectors):
            names = tuple(objective.projectors(prepared.run.abstract.params))
            layers = str(names).replace("'", '"')
            parts = [
                f"--config.backbone=projected:{path}:run:{path}",
                f"--config.detector.layers={layers}",
            ]
        use = shlex.join(["dsad", "evaluate", *parts, "--workdir=DIR"])
        out.print(f"done; evaluate it with:\n  {use}")
        return 0
    again = shlex.join(["dsad", "pretrain", "--resume", f"--workdir={path}"])
    out.print(f"stopped and saved; continue with:\n  {again}")
    # Schedulers take 0 for a run that they may continue; a shell must not go on after Ctrl-C.
    return StopSignal.code if StopSignal.code == StoppedError.code else 0
