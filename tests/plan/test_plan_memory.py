"""The planned memory of a step against what it takes, and plans for a TPU that is not there."""

import gc
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys

import pytest

from tests.helpers import ROOT, alone

#: Temporaries of 1.0 GB (attention of 16 × 197 tokens with 16 heads) for little arithmetic.
LARGE = (
    "--config=mae:tiny", "--config.data.name=synthetic", "--config.data.canvas=64",
    "--config.data.synthetic.size=64", "--config.batch_size=16",
    "--config.objective.decoder.depth=2",
)  # fmt: skip


def resident(peak=False):
    if not peak:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) * 1024


def first_step(argv):
    """Runs in a process of its own: planned and measured bytes of the first step."""
    import jax

    from dsad.assembly import training
    from dsad.core.mesh import place_batch
    from dsad.plan import _compile, _jobs
    from dsad.terminal import flags
    from dsad.train.state import initial_state

    config, _, _ = flags.Command("x", "", config="mae").parse(argv)
    built = training.build(config)
    run, store = built.run, built.store
    program = _compile._compile(_jobs.lower(run), "full")
    state = initial_state(run.objective, run.tx, run.abstract, seed=0)
    batch = place_batch(next(built.pipeline.iterator()), run.mesh)
    step = run.step.lower(state, batch, store, run.key).compile()
    jax.block_until_ready((state, batch))
    gc.collect()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts anew
    before = resident()
    jax.block_until_ready(step(state, batch, store, run.key))
    return {
        # The arguments are resident already.
        "planned": program.total - program.arguments - program.code,
        "grown": resident(peak=True) - before,
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_planned_memory_is_what_the_first_step_takes():
    call = f"from tests.plan.test_plan_memory import *; print(json.dumps(first_step({LARGE!r})))"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, env=alone(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] > 1e9
    assert found["grown"] == pytest.approx(found["planned"], rel=0.2), found


@pytest.fixture
def tpu():
    """Calls ``dsad plan`` in a process of its own, with the compiler for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'dsad[plan]'")

    def plan(path, *argv):
        environment = {**alone(), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        flags = (f"--cache={path}", f"--json={path / 'x.json'}")
        done = subprocess.run(
            [sys.executable, "-m", "dsad", "plan", *flags, *argv], cwd=path, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        return done, json.loads((path / "x.json").read_text())[0]

    return plan


@pytest.mark.slow
def test_a_slice_is_planned_without_a_tpu(tpu, tmp_path):
    argv = ("--config=mae:smoke", "--topology=v5e:2x2", "--config.objective.dtype=bfloat16",
            "--config.mesh.fsdp=4", "--config.mesh.min_fsdp_size=2048")  # fmt: skip
    done, found = tpu(tmp_path, *argv)
    assert done.returncode == 0
    assert done.stderr == ""  # the compilers' chatter is kept away
    assert "fits:" in done.stdout
    assert (found["chip"], found["chips"], found["mesh"]) == ("v5e", 4, {"data": 1, "fsdp": 4})
    assert found["limit"] == int(15.75 * 2**30)
    assert found["estimate"]["images_per_s"] > 0
    program = found["program"]
    assert {"all-gather"} <= {row["kind"] for row in program["collectives"]}
    assert program["flops"] >= found["model_flops_per_image"] * 8 / 4
    again, _ = tpu(tmp_path, *argv)
    assert "in an earlier run" in again.stdout


@pytest.mark.slow
def test_a_slice_that_is_too_small_is_named(tpu, tmp_path):
    argv = ("--config=mae_imagenet:large", "--topology=v5e:2x2", "--config.mesh.fsdp=4")
    done, found = tpu(tmp_path, *argv)
    assert done.returncode == 1
    assert "DOES NOT FIT" in done.stdout
    assert not found["fits"]
    assert found["program"]["peak"] > found["limit"]


@pytest.mark.slow
def test_features_are_planned_without_a_tpu(tpu, tmp_path):
    argv = ("--config=superadd:smoke", "--topology=v5e:2x2", "--config.evaluation.image_size=64")
    done, found = tpu(tmp_path, *argv)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "2 a chip" in done.stdout
    assert (found["kind"], found["unit"], found["batch_size"]) == ("features", "window", 8)
    assert found["program"]["collectives"] == []
    # Every chip has its quarter of the windows, and all weights.
    assert found["program"]["flops"] == pytest.approx(2 * found["model_flops_per_image"], rel=0.02)
    assert found["program"]["arguments"] >= found["held"]["weights"] > 20e6
