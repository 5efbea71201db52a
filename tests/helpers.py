"""Shared by the tests: where real data may lie, and small trees of files made on the spot."""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import ml_collections
import pytest
from etils import epath

from dsad.assembly import pretrain, workdir
from dsad.core.types import EarlierWeights, RunInfo

ROOT = pathlib.Path(__file__).resolve().parent.parent


def real_data(*parts: str) -> pathlib.Path:
    """A path below the real data ($DSAD_DATA, else ../shared/data); skips the test when absent."""
    roots = [os.environ.get("DSAD_DATA"), ROOT.parent / "shared" / "data"]
    for root in roots:
        if root and (path := pathlib.Path(root, *parts)).exists():
            return path
    pytest.skip(f"real data {'/'.join(parts)} is absent; set DSAD_DATA to run this test")


def earlier_weights(objective: Any, params: Any, extra: Any, **facts: Any) -> EarlierWeights:
    """What ``adopt`` gets of an earlier run of an objective."""
    encoder = objective.encoder_weights(params, extra)
    return EarlierWeights(encoder, params, extra, facts, "an earlier run")


def untrained_run(path: pathlib.Path, objective: str, **changes: Any) -> epath.Path:
    """A directory that holds a run of an objective, changed so; its step 0 needs no checkpoint."""
    config = pretrain.default_config(objective)
    with config.unlocked():
        config.objective.update(ml_collections.ConfigDict(changes))
    info = RunInfo(total_steps=7, batch_size=2, samples=5, classes=3)
    return workdir.claim(str(path), "pretrain", config.to_dict(), info=info)


def alone() -> dict[str, str]:
    """Environment of a process with one device, that shares compiled programs with others."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def optimised(jitted: Any, *arguments: Any) -> Any:
    """A call of a jitted function compiled as for users, whatever conftest.py asks for.

    For what holds to the last bit: of two programs, or on any mesh.
    """
    options = {"xla_backend_optimization_level": "3"}
    if jax.__version_info__ < (0, 11):
        options["xla_cpu_use_fusion_emitters"] = "True"
    return jitted.lower(*arguments).compile(options)(*arguments)


def dsad(*argv: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dsad", *argv], cwd=cwd, env=alone(), capture_output=True, text=True
    )


@functools.cache
def _server() -> tuple[subprocess.Popen[str], Any]:
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.commands"], cwd=ROOT, env=alone(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
    )  # fmt: skip
    atexit.register(process.communicate)  # the end of its input is the end of the process
    return process, errors


def command(*argv: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run a command in the one process that serves all such calls, where imports took place."""
    process, errors = _server()
    print(json.dumps([str(cwd), argv]), file=process.stdin, flush=True)
    if not (answer := process.stdout.readline()):
        errors.seek(0)
        pytest.fail(f"the process died during {argv}: {errors.read()}")
    return subprocess.CompletedProcess(argv, *json.loads(answer))
