"""``dsad pretrain``: train an encoder on the images of a data set."""

import shlex

from dsad.assembly import datasets, training, workdir
from dsad.assembly.pretrain import parse
from dsad.core import distributed
from dsad.terminal import console, flags
from dsad.train.stop import end_on_sigterm


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command("pretrain", "train an encoder.", config="configs/ds2.py")
    command.string("workdir", "", "Directory of the run: config, checkpoints, metrics.")
    command.switch("resume", "Continue the run in --workdir.")
    command.switch("continue", "Continue the run in --workdir if it holds one, else start it.")
    command.switch("overwrite", "Replace the run in --workdir.")
    command.distributed()
    config, values, _ = command.parse(argv)
    flags.start_distributed(values)
    end_on_sigterm()
    again = bool(values["continue"].value) and workdir.holds_run(values.workdir)
    resume = bool(values.resume) or again
    out = console.console()
    cfg, _, _ = parse(config)
    dataset = distributed.together(lambda: datasets.loaded(cfg.data, out))
    continued = resume and distributed.on_main(lambda: workdir.has_checkpoint(values.workdir))
    prepared = training.prepare(config, out, dataset, continued=continued)
    path = workdir.claim(
        values.workdir, "pretrain", config.to_dict(), info=prepared.run.info, resume=resume,
        overwrite=values.overwrite,
    )  # fmt: skip
    if training.pretrain(prepared, path, out, resume=resume):
        run = shlex.quote(f"run:{path}")
        out.print(f"done; evaluate it with:\n  dsad evaluate --config.backbone={run} --workdir=DIR")
    else:
        out.print(f"stopped and saved; continue with: dsad pretrain ... --workdir={path} --resume")
    return 0
