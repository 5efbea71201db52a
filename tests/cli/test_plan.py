"""``dsad plan``: what it prints of a compiled step, and that it is the step of the run."""

import dataclasses
import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsad.cli import console, flags, main, pretrain
from dsad.cli.plan import _abstract, _compile, _estimate, _hardware, _samples, _topology, _warnings
from dsad.core.chips import CHIPS, Chip
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.platform import planned_for, platform
from dsad.core.tree import flatten
from dsad.data.base import DataConfig
from dsad.models import transformer
from dsad.train.cache import abstract_store, device_store


@pytest.fixture(autouse=True)
def environment():
    """Planning sets variables for the compilers; other tests must not see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch):
    """A made-up CPU instead of one that is measured for seconds."""
    chip = Chip(
        name="CPU", peak_flops=1e9, hbm_bytes=2**30, hbm_bandwidth=1e9, ici_bandwidth=1e8,
        ici_ports=1, kinds=(), source="made up",
    )  # fmt: skip
    monkeypatch.setattr(_hardware, "chip", lambda devices: chip)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "plans"


def plan(*argv, cache):
    return main.main(["plan", f"--cache={cache}", *argv])


def config(spec, *overrides):
    return flags.Command("x", "", config=spec).parse(list(overrides))[0]


# --- topologies -----------------------------------------------------------------------------


def test_topologies_are_named():
    assert _topology.parse("local") is None
    large = _topology.parse("v5e:16x16")
    assert (large.chips, large.ports, large.name) == (256, 4, "v5e:16x16")
    # A chip at the edge of an open line has one way out along it.
    assert _topology.parse("v5e:2x4").ports == 2
    assert _topology.parse("v5e:8x16").ports == 3
    assert _topology.parse("v5p:2x2x1").ports == 2
    assert _topology.parse("v5p:4x4x8").ports == 6
    assert _topology.parse("v6e:1x1").ports == 0
    assert _topology.parse("v5p:2x2x1").chips == 4


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v5e:2x2x1", "v5p:2x2", "v7x:2x2", "v5e:0x2"])
def test_other_topologies_are_refused(text, capsys):
    assert main.main(["plan", f"--topology={text}"]) == 2
    error = capsys.readouterr().err
    assert f"--topology={text}" in error
    assert "for example" in error
    assert main.main(["plan", "--topology", text]) == 2
    assert capsys.readouterr().err == error


def test_the_missing_compiler_is_named_with_its_command(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main.main(["plan", "--topology=v5e:2x2"]) == 2
    assert "pip install 'dsad[plan]'" in capsys.readouterr().err


def test_a_tpu_compiler_is_told_that_there_is_no_tpu():
    _topology.set_environment(_topology.parse("v5p:4x4x4"))
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v5p-128"  # named after its cores
    _topology.set_environment(_topology.parse("v5e:4x4"))
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v5litepod-16"


@pytest.mark.parametrize(
    "argv",
    [
        ["--effort=some"], ["--samples=-1"], ["--efficiency=0"], ["--efficiency=much"],
        ["--fsdp=1,2"], ["--sweep", "--fsdp=1,x"], ["--sweep", "--batch=0"], ["more"],
    ],
)  # fmt: skip
def test_wrong_flags_are_refused(argv, capsys):
    assert main.main(["plan", "--config=mae:smoke", *argv]) == 2
    assert argv[-1].partition("=")[0] in capsys.readouterr().err


# --- samples --------------------------------------------------------------------------------


def test_numbers_of_images():
    def of(spec, told=0, **data):
        return _samples.count(DataConfig(**data), spec, told)

    assert of("configs/mae_imagenet.py:large", name="folder")[0] == 1_281_167
    assert of("mae", name="imagenet")[0] == 1_281_167
    assert of("ds2", name="mvtec")[0] == 3629
    assert of("ds2", name="mvtec", root="/nonexistent/mvtec")[0] == 3629
    assert of("ds2", name="mvtec", categories=("bottle", "cable"))[0] == 209 + 224
    assert of("ds2", name="mtd:random")[0] == 761
    assert of("ds2", name="mtd:grouped")[0] == 599
    assert of("mae", name="folder") == (None, 1, "")
    assert of("mae", name="mvtec", categories=("other",))[0] is None
    assert of("mae", 77, name="folder") == (77, 1, "--samples")
    synthetic = DataConfig(name="synthetic")
    found = _samples.count(synthetic, "mae", 0)
    assert found[0] == found[1] * synthetic.synthetic.train
    assert found[2] == "the data set"


def test_data_that_are_there_are_counted(tmp_path):
    from PIL import Image

    for i in range(3):
        (tmp_path / "any").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "any" / f"{i}.png")
    found = _samples.count(DataConfig(name="folder", root=str(tmp_path)), "mae_imagenet", 0)
    assert found == (3, 1, "the data set")


def test_a_set_on_the_device_needs_its_size():
    unknown = config("mae", "--config.data.name=folder", "--config.batch_size=8")
    with pytest.raises(ConfigError, match="--samples"):
        _abstract.abstract_run(unknown, jax.devices(), samples=None)


# --- the step is the run's ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "overrides"),
    [
        pytest.param("ds2:smoke", (), marks=pytest.mark.slow),
        ("isstad:smoke", ("--config.mesh.fsdp=4", "--config.mesh.min_fsdp_size=2048")),
        ("mae:smoke", ("--config.data.cache=host", "--config.accumulate=1")),
    ],
)
def test_the_step_is_that_of_the_run(spec, overrides):
    """Same program text as what ``dsad pretrain`` compiles, from shapes alone."""
    chosen = config(spec, *overrides)
    if spec.startswith("mae"):
        chosen.mesh.fsdp = 2
        chosen.mesh.rules = (("decoder/.*/fc1/kernel", "-,-,fsdp"),)
    real = pretrain.build(chosen)
    samples, classes, _ = _samples.count(real.config.data, spec, 0)
    planned = _abstract.abstract_run(chosen, jax.devices(), samples=samples, classes=classes)
    inputs = next(real.pipeline.iterator())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned.inputs) == jax.tree.map(
        lambda x: (x.shape, x.dtype), inputs
    )
    store = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), real.store)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), planned.store) == store
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    text = real.step.lower(real.abstract, shapes, real.store).as_text()
    assert planned.lower().as_text() == text
    assert planned.total_steps == real.info.total_steps


def test_large_plans_allocate_nothing():
    before = {id(a) for a in jax.live_arrays()}
    large = config("mae_imagenet:large", "--config.mesh.fsdp=8")
    run = _abstract.abstract_run(large, jax.devices(), samples=1000)
    assert run.model_flops_per_image() == run.objective.flops_per_image
    assert "num_partitions = 8" in run.lower().as_text()
    made = [a for a in jax.live_arrays() if id(a) not in before]
    assert sum(a.nbytes for a in made) < 2**20


@pytest.mark.parametrize("below", [0, 2**30], ids=["split", "whole"])
def test_stores_are_planned_as_they_are_placed(below):
    mesh = make_mesh(MeshConfig())
    host = {"image": np.ones((13, 4, 4, 3), np.uint8), "facts": {"n": np.ones((13, 2), np.int32)}}
    planned, _ = abstract_store(host, mesh, replicate_below=below)
    placed, _ = device_store(host, mesh, replicate_below=below)
    for path, leaf in flatten(placed).items():
        want = flatten(planned)[path]
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (want.shape, want.dtype, want.sharding)
    assert placed["image"].shape[0] == (13 if below else 16)


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
    run = _abstract.abstract_run(config("mae:smoke"), jax.devices(), samples=40)
    run.lower()
    assert not called
    monkeypatch.setattr(_abstract.AbstractRun, "platform", "tpu")
    run = _abstract.abstract_run(config("mae:smoke"), jax.devices(), samples=40)
    run.lower()
    assert called


# --- the estimate ---------------------------------------------------------------------------

CHIP = Chip(
    name="made up", peak_flops=100.0, hbm_bytes=1000, hbm_bandwidth=10.0, ici_bandwidth=8.0,
    ici_ports=4, kinds=(), source="",
)  # fmt: skip


def rows(sent):
    return ({"kind": "all-reduce", "shapes": "f32[4]", "group_size": 4, "count": 1,
             "result_bytes": 16, "sent": sent},)  # fmt: skip


@pytest.mark.parametrize(
    ("flops", "moved", "sent", "bound", "seconds"),
    [(400, 20, 2, "compute", 4.0), (100, 60, 2, "memory", 6.0), (1, 2, 20, "interconnect", 5.0)],
)
def test_roofline_by_hand(flops, moved, sent, bound, seconds):
    program = _compile.Program(bf16_flops=flops, bytes=moved, collectives=rows(sent))
    made = _estimate.estimate(
        program, CHIP, chips=4, ports=2, batch_size=8, model_flops=0.5, steps=900
    )
    assert made.bound_by == bound
    assert made.step == seconds
    assert made.interconnect == sent / (8.0 * 2 / 4)  # two of four ports
    assert made.images_per_s == 8 / seconds
    assert made.images_per_s_per_chip == 2 / seconds
    assert made.mfu == pytest.approx(8 * 0.5 / seconds / (4 * 100))
    assert made.hours == 900 * seconds / 3600
    assert made.chip_hours == 4 * made.hours
    half = _estimate.estimate(
        program, CHIP, chips=4, ports=2, batch_size=8, model_flops=0.5, steps=None, efficiency=0.5
    )
    assert half.step == 2 * seconds
    assert half.hours is None


def test_a_program_needs_what_its_model_needs():
    """Calls of a library show no products; the model's own are then the floor."""
    made = _estimate.estimate(
        _compile.Program(), CHIP, chips=4, ports=4, batch_size=8, model_flops=50.0, steps=1
    )
    assert made.compute == 8 * 50 / 4 / 100
    assert made.mfu == 1.0


# --- warnings and refusals ------------------------------------------------------------------


def test_unintended_traffic_is_named():
    large = config("mae_imagenet:large", "--config.mesh.fsdp=8", "--config.batch_size=2048")
    run = _abstract.abstract_run(large, jax.devices(), samples=5000)

    def gathers(shapes, size=2**24):
        row = {**rows(0.0)[0], "kind": "all-gather", "shapes": shapes, "result_bytes": size}
        return _warnings.unintended(run, _compile.Program(collectives=(row,)))

    assert not gathers("bf16[1,1024,4096]")  # the weights of one block
    assert not gathers("f32[768,1024], bf16[1024,3072]")
    assert "all blocks" in gathers("bf16[24,1024,4096]")[0]
    assert "fc1" in gathers("bf16[24,1024,4096]")[0]
    assert "all samples" in gathers("bf16[2048,50,1024]")[0]
    assert "all samples" in gathers("bf16[102400,1024]")[0]  # their tokens as rows
    assert not gathers("f32[2048,512]", size=2**22)  # a kernel of the decoder, not 2048 samples
    assert not gathers("s32[2048,2]", size=2**14)
    other = _compile.Program(collectives=rows(1.0), messages=("f32[8] at a",))
    assert "involuntary full rematerialization" in _warnings.unintended(run, other)[0]
    few = dataclasses.replace(run, samples=1000)
    assert "images repeat" in _warnings.unintended(few, _compile.Program())[0]


def test_a_split_data_set_costs_every_chip_the_whole_batch():
    argv = (
        "--config.batch_size=2048",
        "--config.objective.hidden=32",
        "--config.data.cache=device",
    )
    for samples, count in ((300, 0), (3629, 1)):  # up to 1 GiB of images every chip has its own
        run = _abstract.abstract_run(config("ds2", *argv), jax.devices(), samples=samples)
        found = [w for w in _warnings.unintended(run, _compile.Program()) if "split" in w]
        assert len(found) == count
        assert all("1,536 MiB" in w for w in found)


def test_copies_by_the_partitioner_are_read_from_its_log():
    """A real one: no path from 4 parts of an axis to 2 × 2 parts of two."""
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def split(*spec):
        return NamedSharding(mesh, jax.P(*spec))

    def moved(x):
        y = jax.lax.with_sharding_constraint(x.reshape(6, 8, 10), split(None, "a", "b"))
        y = jax.lax.with_sharding_constraint(jnp.sin(y).reshape(48, 10), split(("a", "b")))
        return jnp.cumsum(jnp.sort(y, axis=0), axis=0)

    x = jax.ShapeDtypeStruct((48, 10), jnp.float32, sharding=split("b", "a"))
    lowered = jax.jit(moved, out_shardings=split("a", "b")).lower(x)
    with _compile.captured_stderr() as log:
        lowered.compile()
    found = _compile.partitioner_messages(log.text)
    assert found, log.text
    assert "jit(moved)/sharding_constraint" in found[0]
    assert "f32[12,10]" in found[0]


def test_standard_error_comes_back(capfd):
    with _compile.captured_stderr() as log:
        os.write(2, b"from a library")
    os.write(2, b"afterwards")
    assert log.text == "from a library"
    assert capfd.readouterr().err == "afterwards"


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (52.04G) exceeds available HBM (15.75G).", 52.04 * 2**30),
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.88G of "
         "15.75G hbm. Exceeded hbm capacity by 10.13G.\n\nTotal hbm usage >= 26.13G:",
         26.13 * 2**30),
        ("out of memory", 0),
    ],
)  # fmt: skip
def test_refused_programs_say_what_they_need(message, size):
    assert _compile.needed(message) == int(size)


class Refusing:
    """A lowered program that the compiler does not take."""

    def __init__(self, text):
        self.text = text

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(self.text)


def test_only_a_lack_of_memory_is_a_result():
    words = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.0G of 15.75G hbm."
    program = _compile._compile(Refusing(words), "fast")
    assert program.refused == words
    assert program.total == 20 * 2**30
    with pytest.raises(ConfigError, match="INTERNAL"):
        _compile._compile(Refusing("INTERNAL: something else"), "fast")


def test_later_versions_are_asked_in_their_own_words():
    asked = []

    class Newer:
        def compile(self, compiler_options):
            asked.append(compiler_options)
            if "optimization_level" not in compiler_options:
                raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'x'")
            return "made"

    assert _compile._made(Newer(), "fast") == "made"
    assert len(asked) == 2


# --- the command ----------------------------------------------------------------------------

SMALL = ("--config=mae:smoke", "--config.data.cache=none", "--config.steps=0",
         "--config.mesh.min_fsdp_size=2048")  # fmt: skip


def test_prints_memory_work_and_time(cache, capsys, monkeypatch, tmp_path):
    file = tmp_path / "plan.json"
    assert plan(*SMALL, "--config.mesh.fsdp=8", f"--json={file}", cache=cache) == 0
    text = capsys.readouterr().out
    for words in (
        "mesh data 1 × fsdp 8", "8 images a step, 1 a chip", "arguments", "temporaries", "peak",
        "fits:", "all-gather", "step, bound by", "images/s/chip", "MFU", "80 epochs of 40 images",
        "400 steps", "chip-hours", "supposes",
    ):  # fmt: skip
        assert words in text, words
    (found,) = json.loads(file.read_text())
    program, estimate = found["program"], found["estimate"]
    run = _abstract.abstract_run(
        config("mae:smoke", *SMALL[1:], "--config.mesh.fsdp=8"), jax.devices(), samples=40
    )
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
    run = _abstract.abstract_run(config("mae:smoke"), jax.devices(), samples=40)
    program = _compile.Program(arguments=1, peak=5, seconds=1.0)
    compiled, text = [], ""
    monkeypatch.setattr(_compile, "_compile", lambda *_: compiled.append(1) or program)
    monkeypatch.setattr(
        _abstract.AbstractRun, "lower", lambda _: SimpleNamespace(as_text=lambda: text)
    )

    def ask(effort="fast", about="v5e:2x2", where=cache):
        before = len(compiled)
        found, known = _compile.compiled(run, effort, console.console(), where, about)
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


def test_what_does_not_fit_ends_with_1(cache, capsys, monkeypatch):
    monkeypatch.setattr(_hardware, "limit", lambda devices: 1000)
    for need, code, words in ((900, 0, "fits: "), (1100, 1, "DOES NOT FIT")):
        program = _compile.Program(temporaries=need - 100, arguments=100)
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

    def compiled(run, effort, out, cache, about):
        shards, batch = run.mesh.shape["fsdp"], run.config.batch_size
        size = {1: 2**31, 2: 2**20, 4: 2**20}[shards]
        return _compile.Program(peak=size, bytes=1e9 * shards + batch), False

    monkeypatch.setattr(_compile, "compiled", compiled)
    file = tmp_path / "sweep.json"
    argv = (*SMALL, "--sweep", "--fsdp=1,2,4", "--batch=8,12", f"--json={file}")
    monkeypatch.setattr(_hardware, "limit", lambda devices: 2**30)
    assert plan(*argv, cache=cache) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if "│" in line]
    assert len(lines) == 3
    assert "does not fit" in next(line for line in lines if "8 × 1 " in line)
    assert "best" in next(line for line in lines if "4 × 2 " in line)
    assert text.count("left out: fsdp") == 3
    assert "multiple of the 8 devices" in text
    found = json.loads(file.read_text())
    assert [p["mesh"]["fsdp"] for p in found] == [1, 2, 4]
    monkeypatch.setattr(_hardware, "limit", lambda devices: 2**10)
    assert plan(*argv, cache=cache) == 1
    assert "none of them fits" in capsys.readouterr().out
    assert plan(*SMALL, "--sweep", "--fsdp=3", cache=cache) == 2


def test_chips_have_all_figures():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert all(getattr(chip, f.name) for f in dataclasses.fields(chip)), name
        # No chip of the table computes less than 50 or more than 500 operations per byte.
        assert 50 < chip.peak_flops / chip.hbm_bandwidth < 600
        assert chip.hbm_bandwidth > 2 * chip.ici_bandwidth
