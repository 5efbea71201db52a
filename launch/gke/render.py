"""Fills in launch/gke/jobset.yaml and prints it; needs Python alone, changes nothing.

python launch/gke/render.py --name=ds2 --image=IMAGE --topology=v5e:16x16 --data-bucket=BUCKET \
    --workdir=gs://BUCKET/ds2 -- pretrain --config=configs/ds2.py --config.data.root=/data/mvtec \
    | kubectl apply -f -

What comes after -- are dsad's arguments; --distributed, --workdir and, for pretrain, --continue are
added. The topology is written as for dsad plan. Costs nothing before kubectl applies it.
"""

import argparse
import json
import math
import pathlib
import re
import string
import sys

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
#: Generations as dsad plan names them, and the labels that GKE gives their nodes.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
#: Exit code of run.sh for a run that saved and stopped before its end.
STOPPED = 75
#: What this program adds itself.
OWN = ("--workdir", "--distributed", "--continue", "--resume", "--overwrite")


def main(argv: list[str]) -> str:
    """The manifest for command-line arguments; exits with a message for unusable ones."""
    parser = argparse.ArgumentParser(
        prog="render.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--name", required=True, help="of the run, for Kubernetes")
    parser.add_argument("--image", required=True, help="container with dsad, see launch/Dockerfile")
    parser.add_argument("--topology", required=True, help="for example v5e:16x16 or v5p:2x2x1")
    parser.add_argument("--workdir", required=True, help="of the run: gs://BUCKET/RUN")
    parser.add_argument("--data-bucket", required=True, help="its contents appear under /data")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="default", help="of Kubernetes")
    parser.add_argument("--chips-per-host", type=int, default=4, help="1, 4 or 8 (machine type)")
    parser.add_argument("--max-restarts", type=int, default=3, help="after crashes")
    parser.add_argument("--grace", type=int, default=300, help="seconds to save in after SIGTERM")
    own, arguments = split(argv)
    values = parser.parse_args(own)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values.name):
        parser.error(f"--name={values.name}: expected at most 40 of a-z, 0-9 and - (a-z first).")
    generation, shape, chips = topology(values.topology, parser)
    if values.chips_per_host not in (1, 4, 8) or chips % values.chips_per_host:
        parser.error(
            f"--chips-per-host={values.chips_per_host}: expected 1, 4 or 8, and a divisor of the "
            f"{chips} chips of {values.topology}."
        )
    fields = {
        **{key: json.dumps(value) for key, value in vars(values).items()},
        "accelerator": ACCELERATORS[generation],
        "shape": json.dumps(shape),
        "hosts": chips // values.chips_per_host,
        "stopped": STOPPED,
        "args": json.dumps(dsad_arguments(arguments, values.workdir, parser)),
    }
    return string.Template(TEMPLATE.read_text()).substitute(fields)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after ``--``."""
    where = argv.index("--") if "--" in argv else len(argv)
    return argv[:where], argv[where + 1 :]


def topology(text: str, parser: argparse.ArgumentParser) -> tuple[str, str, int]:
    """(generation, shape, number of chips) of ``v5e:16x16``."""
    generation, _, shape = text.partition(":")
    if generation not in ACCELERATORS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        parser.error(
            f"--topology={text}: expected one of {', '.join(ACCELERATORS)}, a colon and a shape: "
            "v5e:16x16."
        )
    return generation, shape, math.prod(map(int, shape.split("x")))


def dsad_arguments(
    arguments: list[str], workdir: str, parser: argparse.ArgumentParser
) -> list[str]:
    """The user's arguments with those that every run on a slice has."""
    if not arguments:
        parser.error("the dsad command is missing: ... -- pretrain --config=...")
    for argument in arguments[1:]:
        if argument.partition("=")[0] in OWN:
            parser.error(f"{argument.partition('=')[0]} is set by this program; see --workdir.")
    added = ["--distributed", f"--workdir={workdir}"]
    if arguments[0] == "pretrain":
        added += ["--continue"]
    return [*arguments, *added]


if __name__ == "__main__":
    print(main(sys.argv[1:]), end="")
