"""The pieces of ``dsad plan``: topologies, samples, roofline, warnings, what compilers say."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from dsad.assembly.pretrain import DataFacts, PretrainConfig, assemble
from dsad.cli import main
from dsad.core.chips import CHIPS, Chip
from dsad.core.errors import ConfigError
from dsad.data import base
from dsad.data.base import DataConfig
from dsad.plan import _compile, _estimate, _samples, _topology, _warnings
from dsad.terminal import flags


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
        return _samples.count(PretrainConfig(data=DataConfig(**data)), spec, told)

    assert of("configs/mae_imagenet.py:large", name="folder")[0] == 1_281_167
    assert of("mae", name="imagenet")[0] == 1_281_167
    assert of("ds2", name="mvtec")[0] == 3629
    assert of("ds2", name="mvtec", root="/nonexistent/mvtec")[0] == 3629
    assert of("ds2", name="mvtec", categories=("bottle", "cable"))[0] == 209 + 224
    assert of("ds2", name="mtd:random")[0] == 761
    assert of("ds2", name="mtd:grouped")[0] == 599
    assert of("ds2", name="visa")[:2] == (8659, 12)
    assert of("ds2", name="visa:highshot")[:2] == (5773 + 12 * 60, 12)  # the owner's table
    assert of("ds2", name="visa:fewshot", categories=("candle",))[0] == 200 + 20
    assert of("ds2", name="visa:fewshot", categories=("other",))[0] is None
    assert of("mae", name="dtd")[:2] == (5640, 47)
    assert of("mae", name="dtd:1")[:2] == (1880, 47)
    assert of("mae", name="folder") == (None, 1, "")
    assert of("mae", name="mvtec", categories=("other",))[0] is None
    assert of("mae", 77, name="folder") == (77, 1, "--samples")
    assert of("ds2", 77, name="mvtec") == (77, 15, "--samples")
    assert of("ds2", name="mvtec", categories=("bottle", "cable"))[1] == 2
    assert of("mae", name="imagenet")[1] == 1000
    assert of("ds2", name="mvtec", split="all")[0] is None  # what is published are the normal ones
    synthetic = DataConfig(name="synthetic")
    found = _samples.count(PretrainConfig(data=synthetic), "mae", 0)
    assert found[0] == found[1] * synthetic.synthetic.train
    assert found[2] == "the data set"
    variant = DataConfig(name="synthetic:development")
    assert _samples.count(PretrainConfig(data=variant), "mae", 0)[1:] == (4, "the data set")
    tested = DataConfig(name="synthetic", split="test")
    of_tested = _samples.count(PretrainConfig(data=tested), "mae", 0)[0]
    assert of_tested == len(base.load(tested).source("test")) != found[0]


def test_data_that_are_there_are_counted(tmp_path):
    from PIL import Image

    for i in range(3):
        (tmp_path / "any").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "any" / f"{i}.png")
    cfg = PretrainConfig(data=DataConfig(name="folder", root=str(tmp_path)))
    found = _samples.count(cfg, "mae_imagenet", 0)
    assert found == (3, 1, "the data set")


def test_a_set_on_the_device_needs_its_size():
    unknown = config("mae", "--config.data.name=folder", "--config.batch_size=8")
    with pytest.raises(ConfigError, match=r"config\.data\.cache=device .* --samples=N"):
        assemble(unknown, jax.devices(), DataFacts(samples=None))


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
    run = assemble(large, jax.devices(), DataFacts(samples=5000))

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
    few = dataclasses.replace(run, data=DataFacts(samples=1000))
    assert "images repeat" in _warnings.unintended(few, _compile.Program())[0]


def test_a_split_data_set_costs_every_chip_the_whole_batch():
    argv = (
        "--config.batch_size=2048",
        "--config.objective.hidden=32",
        "--config.data.cache=device",
    )
    for samples, count in ((300, 0), (3629, 1)):  # up to 1 GiB of images every chip has its own
        run = assemble(config("ds2", *argv), jax.devices(), DataFacts(samples=samples))
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

    new = float(time.time_ns() % 2**20)  # a program that no cache holds: reading it says nothing

    def moved(x):
        y = jax.lax.with_sharding_constraint(x.reshape(6, 8, 10), split(None, "a", "b"))
        y = jax.lax.with_sharding_constraint(jnp.sin(new * y).reshape(48, 10), split(("a", "b")))
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


def test_chips_have_all_figures():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert all(getattr(chip, f.name) for f in dataclasses.fields(chip)), name
        # No chip of the table computes less than 50 or more than 500 operations per byte.
        assert 50 < chip.peak_flops / chip.hbm_bandwidth < 600
        assert chip.hbm_bandwidth > 2 * chip.ici_bandwidth
