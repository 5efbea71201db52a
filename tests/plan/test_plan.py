"""``dsad plan``: what it prints of a compiled step, and that it is the step of the run."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly import pretrain, training
from dsad.assembly.pretrain import DataFacts, assemble
from dsad.cli import main
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.platform import planned_for, platform
from dsad.models import transformer
from dsad.plan import _compile, _hardware, _jobs, _samples
from dsad.terminal import console, flags

pytestmark = pytest.mark.usefixtures("quick_machine")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "plans"


def plan(*argv, cache):
    return main.main(["plan", f"--cache={cache}", *argv])


def config(spec, *overrides):
    return flags.Command("x", "", config=spec).parse(list(overrides))[0]


# --- the step is the run's ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "overrides"),
    [
        pytest.param(
            "isstad:smoke",
            ("--config.mesh.fsdp=4", "--config.mesh.min_fsdp_size=2048"),
            marks=pytest.mark.slow,
        ),
        ("mae:smoke", ("--config.data.cache=host", "--config.data.split=all")),
    ],
)
def test_the_step_is_that_of_the_run(spec, overrides):
    """Same program text as what ``dsad pretrain`` compiles, from shapes alone."""
    chosen = config(spec, *overrides)
    if spec.startswith("mae"):
        chosen.mesh.fsdp = 2
        chosen.mesh.rules = (("decoder/.*/fc1/kernel", "-,-,fsdp"),)
    real = training.build(chosen)
    run, inputs = real.run, next(real.pipeline.iterator())
    samples, classes, _ = _samples.count(run.config, spec, 0)
    planned = assemble(chosen, jax.devices(), DataFacts(samples=samples, classes=classes))
    assert (planned.info, planned.spec) == (run.info, run.spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned.inputs) == jax.tree.map(
        lambda x: (x.shape, x.dtype), inputs
    )
    store = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), real.store)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), planned.store) == store
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    text = run.step.lower(run.abstract, shapes, real.store, run.key).as_text()
    assert _jobs.lower(planned).as_text() == text
    assert planned.total_steps == run.info.total_steps


def test_large_plans_allocate_nothing():
    before = {id(a) for a in jax.live_arrays()}
    large = config("mae_imagenet:large", "--config.mesh.fsdp=8")
    run = assemble(large, jax.devices(), DataFacts(samples=1000))
    assert run.model_flops_per_image() == run.objective.flops_per_image
    assert "num_partitions = 8" in _jobs.lower(run).as_text()
    made = [a for a in jax.live_arrays() if id(a) not in before]
    assert sum(a.nbytes for a in made) < 2**20


def test_plans_for_a_tpu_trace_its_code(monkeypatch):
    assert platform() == "cpu"
    q = jax.ShapeDtypeStruct((2, 5, 3, 4), jnp.float32)
    own = str(jax.make_jaxpr(lambda *a: transformer.attention(*a))(q, q, q))
    with planned_for("tpu"):
        other = str(jax.make_jaxpr(lambda *a: transformer.attention(*a))(q, q, q))
    library = str(jax.make_jaxpr(lambda *a: jax.nn.dot_product_attention(*a))(q, q, q))
    assert own != library
    assert other == library

    called = []
    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a: called.append(1) or attention(*a)
    )
    run = assemble(config("mae:smoke"), jax.devices(), DataFacts(samples=40))
    _jobs.lower(run)
    assert not called
    monkeypatch.setattr(pretrain.Run, "platform", "tpu")
    run = assemble(config("mae:smoke"), jax.devices(), DataFacts(samples=40))
    _jobs.lower(run)
    assert called


def rows(sent):
    return ({"kind": "all-reduce", "shapes": "f32[4]", "group_size": 4, "count": 1,
             "result_bytes": 16, "sent": sent},)  # fmt: skip


# --- the command ----------------------------------------------------------------------------

SMALL = ("--config=mae:smoke", "--config.data.cache=none", "--config.steps=0",
         "--config.mesh.min_fsdp_size=2048")  # fmt: skip


@pytest.mark.slow
def test_prints_memory_work_and_time(cache, capsys, monkeypatch, tmp_path):
    file = tmp_path / "plan.json"
    assert plan(*SMALL, "--config.mesh.fsdp=8", f"--json={file}", cache=cache) == 0
    text = capsys.readouterr().out
    for words in (
        "mesh data 1 × fsdp 8", "8 images a step, 1 a chip", "all of these", "temporaries", "peak",
        "fits:", "all-gather", "step, bound by", "images/s/chip", "MFU", "80 epochs of 40 images",
        "400 steps", "chip-hours", "supposes",
    ):  # fmt: skip
        assert words in text, words
    (found,) = json.loads(file.read_text())
    program, estimate = found["program"], found["estimate"]
    chosen = config("mae:smoke", *SMALL[1:], "--config.mesh.fsdp=8")
    run = assemble(chosen, jax.devices(), DataFacts(samples=40))
    shards = jax.tree.leaves((run.abstract, run.inputs))
    held = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in shards)
    assert sum(found["held"].values()) == held
    assert found["held"]["optimiser"] > 1.9 * found["held"]["weights"]  # two moments
    assert program["arguments"] == pytest.approx(held, rel=0.02)
    # Every chip does its eighth, and a little more where blocks are too small to be shared.
    needed = run.objective.flops_per_image
    assert needed <= program["flops"] < 2.5 * needed
    assert estimate["step"] == max(estimate[k] for k in ("compute", "memory", "interconnect"))
    assert estimate["hours"] == pytest.approx(400 * estimate["step"] / 3600)
    gathers = [r for r in program["collectives"] if r["kind"] == "all-gather"]
    assert sum(r["count"] for r in gathers) > 8  # of blocks, in each pass of their loop

    monkeypatch.setattr(_compile, "_compile", lambda *_: pytest.fail("compiled again"))
    assert plan(*SMALL, "--config.mesh.fsdp=8", cache=cache) == 0
    again = capsys.readouterr().out
    assert "compiled in an earlier run" in again
    assert again.split("fits:")[1] == text.split("fits:")[1]


def test_results_are_kept_by_what_was_compiled(cache, monkeypatch):
    mesh = make_mesh(MeshConfig())
    program = _compile.Program(arguments=1, peak=5, seconds=1.0)
    compiled, text = [], ""
    monkeypatch.setattr(_compile, "_compile", lambda *_: compiled.append(1) or program)
    lowered = SimpleNamespace(as_text=lambda: text)

    def ask(effort="fast", about="v5e:2x2", where=cache):
        before = len(compiled)
        out = console.console()
        found, known = _compile.compiled(lambda: lowered, mesh, effort, out, where, about)
        assert found == program
        assert known == (len(compiled) == before)
        return known

    assert not ask()
    assert ask()
    assert not ask(effort="full")
    assert not ask(about="v6e:2x2")
    assert not ask(where=None)
    assert not ask(where=None)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_other=1")
    assert not ask()
    text = "another program"
    assert not ask()
    assert ask()


def test_a_spoilt_result_is_made_again(tmp_path):
    file = tmp_path / "x.json"
    program = _compile.Program(peak=5, collectives=rows(1.0), messages=("a",))
    _compile._store(file, program)
    assert _compile._stored(file) == program
    file.write_text(file.read_text()[:30])
    assert _compile._stored(file) is None
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.slow
def test_what_does_not_fit_ends_with_1(cache, capsys, monkeypatch):
    monkeypatch.setattr(_hardware, "limit", lambda devices: 10**9)
    for need, code, words in ((9e8, 0, "fits: "), (11e8, 1, "DOES NOT FIT")):
        program = _compile.Program(temporaries=int(need) - 10**8, arguments=10**8)
        monkeypatch.setattr(_compile, "_compile", lambda *_, made=program: made)
        assert plan(*SMALL, "--cache=off", cache=cache) == code
        assert words in capsys.readouterr().out
    program = _compile.Program(refused="RESOURCE_EXHAUSTED: no", peak=2**31)
    monkeypatch.setattr(_compile, "_compile", lambda *_: program)
    assert plan(*SMALL, "--cache=off", cache=cache) == 1
    text = capsys.readouterr().out
    assert "at least 2.00 GiB" in text
    assert "RESOURCE_EXHAUSTED: no" in text
    assert "MFU" not in text


def test_unknown_sizes_are_asked_for(cache, capsys, monkeypatch):
    monkeypatch.setattr(_compile, "_compile", lambda *_: _compile.Program(peak=5))
    assert plan(*SMALL, "--config.data.name=folder", cache=cache) == 0
    assert "--samples=N" in capsys.readouterr().out
    assert plan(*SMALL, "--config.data.name=folder", "--samples=80", cache=cache) == 0
    assert "800 steps" in capsys.readouterr().out


def test_sweep_marks_the_best_that_fits(cache, capsys, monkeypatch, tmp_path):
    """The fastest does not fit and one cannot be built; of the others the faster one wins."""

    def compiled(lower, mesh, effort, out, cache, about):
        shards = mesh.shape["fsdp"]
        size = {1: 2**31, 2: 2**20, 4: 2**20}[shards]
        return _compile.Program(peak=size, bytes=1e9 * shards), False

    monkeypatch.setattr(_compile, "compiled", compiled)
    file = tmp_path / "sweep.json"
    argv = (*SMALL, "--sweep", "--fsdp=1,2,4", "--batch=8,12", f"--json={file}")
    monkeypatch.setattr(_hardware, "limit", lambda devices: 2**30)
    assert plan(*argv, cache=cache) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if " × " in line]
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert "too big" in next(line for line in lines if "8 × 1 " in line)
    assert "best" in next(line for line in lines if "4 × 2 " in line)
    assert text.count("left out: fsdp") == 3
    assert "multiple of the 8 devices" in text
    found = json.loads(file.read_text())
    assert [p["mesh"]["fsdp"] for p in found] == [1, 2, 4]
    monkeypatch.setattr(_hardware, "limit", lambda devices: 2**10)
    assert plan(*argv, cache=cache) == 1
    assert "none of them fits" in capsys.readouterr().out
    assert plan(*SMALL, "--sweep", "--fsdp=3", cache=cache) == 2
