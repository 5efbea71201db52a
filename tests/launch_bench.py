"""A place in which the scripts of launch/ run with stand-ins instead of clouds and clusters.

PATH holds tests/launch_fake.py under many names and a few plain tools, nothing else: the real
gcloud and kubectl are out of reach. What the scripts send to workers is executed in directories
of the test.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

from tests.helpers import ROOT

LAUNCH = ROOT / "launch"
FAKES = [
    "gcloud", "git", "python3", "python", "dsad", "srun", "scontrol", "sbatch", "xpk", "kubectl",
    "docker", "pip", "ssh-add", "squeue", "tensorboard",
]  # fmt: skip
#: What else the scripts may call.
TOOLS = [
    "bash", "cat", "cksum", "cut", "date", "dirname", "grep", "gzip", "head", "hostname", "mkdir",
    "mktemp", "mv", "rm", "sed", "setsid", "sleep", "sort", "tail", "tar", "touch", "tr",
]  # fmt: skip
SLICE = {"PROJECT": "my-project", "ZONE": "us-west4-b", "NAME": "ds2"}
RUN = {**SLICE, "TOPOLOGY": "v5e:4x4", "WORKDIR": "gs://my bucket/ds2", "POLL": "0.1"}
#: Arguments that every shell on the way has to leave alone.
HARD = ["--config.objective.layers=('layer3', 'layer4')", "--config.data.root=~/a b/$HOME/*"]


class Bench:
    """A directory in which launch/ runs with fakes on PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "bin").mkdir()
        # Imported rather than copied: compiled once for the thousands of calls.
        source = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\n"
        source += "import launch_fake\nlaunch_fake.main()\n"
        for name in FAKES:
            path = folder / "bin" / name
            path.write_text(f"#!{sys.executable} -IS\n{source}")
            path.chmod(0o755)
        for name in TOOLS:
            (folder / "bin" / name).symlink_to(str(shutil.which(name)))
        (folder / "launch").symlink_to(LAUNCH)
        self.env = {
            "PATH": str(folder / "bin"), "HOME": str(folder), "FAKE": str(folder),
            "FAKE_LAUNCH": str(LAUNCH), "FAKE_PYTHON": sys.executable,
        }  # fmt: skip

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip

    def tpu(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", "launch/tpu_vm.sh", *argv, **{**RUN, **env})

    def calls(self, name: str) -> list[list[str]]:
        """Arguments of every call of a program so far."""
        path = self.folder / "calls"
        lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return [args for program, *args in lines if program == name]

    def tpus(self) -> list[str]:
        """What was done to the slice, without looking: create, install, pretrain, delete, ..."""
        out = []
        for args in self.calls("gcloud"):
            command = next((a for a in args if a.startswith("--command=")), "")
            word = re.search(r"worker\.sh (\w+)", command)
            out.append(word[1] if word else args[3])
        return [x for x in out if x not in ("list", "status", "scp")]


def container_of(manifest):
    """The only container of a JobSet."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]
