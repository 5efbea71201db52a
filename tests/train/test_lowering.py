"""The large networks' steps on a mesh of 8, without computing them; a tiny one for real."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsad.assembly.pretrain import DataFacts, assemble
from dsad.core.mesh import MeshConfig, place_batch
from dsad.core.tree import count, flatten
from dsad.terminal import flags
from dsad.train.state import initial_state
from dsad.train.step import abstract_key

MIN_SIZE = MeshConfig().min_fsdp_size
#: Parameters of an encoder of ViT-L size; its optimiser has two moments for each.
LARGE = 303_000_000


def assembled(spec, fsdp, *, canvas, batch, min_size=MIN_SIZE, devices=None, **optim):
    """A shipped config on a mesh of so many shards, whose batches come from the host."""
    config, _, _ = flags.Command("x", "", config=spec).parse([])
    config.update(batch_size=batch, steps=100)
    config.data.update(cache="none", canvas=canvas)
    config.mesh.update(data=1, fsdp=fsdp, min_fsdp_size=min_size)
    config.optim.update(optim)
    return assemble(config, devices, DataFacts(samples=batch))


def axis(leaf):
    """The axis that is split over "fsdp", or None."""
    spec = tuple(leaf.sharding.spec)
    assert set(spec) <= {None, "fsdp"}
    return spec.index("fsdp") if "fsdp" in spec else None


def check_stacked(tree, depths):
    """Kernels of stacked blocks are split, never along the layers; returns how many."""
    found = 0
    for path, leaf in flatten(tree).items():
        if "/blocks/" not in f"/{path}" or not path.endswith("kernel"):
            continue
        assert leaf.shape[0] in depths, path
        assert axis(leaf) in (1, 2), path
        found += 1
    return found


@pytest.mark.parametrize(
    ("spec", "batch", "canvas", "depths", "dots"),
    [
        ("mae_imagenet:large", 4096, 512, (24, 8), {"bfloat16", "f32"}),
        ("isstad", 16, 1024, (24, 12), {"f32"}),
    ],
    ids=["mae", "isstad"],
)
def test_large_steps_lower_on_a_mesh_of_eight(spec, batch, canvas, depths, dots):
    before = {id(a) for a in jax.live_arrays()}
    run = assembled(spec, 8, canvas=canvas, batch=batch)
    abstract = run.abstract

    # Where the 303 million weights of the encoder are, and the two moments of what is trained.
    frozen = spec == "isstad"
    home = abstract.extra if frozen else abstract.params
    assert count(home["encoder"]) > LARGE
    trained = count(abstract.params)
    assert (trained < LARGE) if frozen else (trained > LARGE)
    moments = [x for x in jax.tree.leaves(abstract.opt_state) if x.shape]
    assert sum(math.prod(x.shape) for x in moments) == 2 * trained
    assert check_stacked(home["encoder"], depths[:1]) == 4
    assert check_stacked(abstract.params, depths) == (4 if frozen else 8)
    assert check_stacked(abstract.opt_state, depths) == 2 * (4 if frozen else 8)
    of_params = {p: x.sharding for p, x in flatten(abstract.params).items()}
    for path, leaf in flatten(abstract.opt_state).items():
        for name in ("mu", "nu"):
            if f"/{name}/" in path:
                assert leaf.sharding == of_params[path.partition(f"/{name}/")[2]], path
    # What is left whole on every device is small.
    whole = [x for x in jax.tree.leaves(abstract) if axis(x) is None]
    assert max(math.prod(x.shape) for x in whole) < MIN_SIZE
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(abstract))
    assert held < 1.1 * count(abstract) / 8

    lowered = run.step.lower(abstract, run.inputs, None, abstract_key(run.mesh))
    text = lowered.as_text()
    assert "mhlo.num_partitions = 8" in text
    # One block of each stack is in the program, not its 24 copies.
    assert text.count("stablehlo.dot_general") < 200
    for kind in dots:
        assert f"x{'bf16' if kind == 'bfloat16' else kind}>" in text
    out, scalars = lowered.out_info
    for path, leaf in flatten(out).items():
        want = flatten(abstract)[path]
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), path
    assert scalars["loss"].shape == ()
    made = [a for a in jax.live_arrays() if id(a) not in before]
    assert sum(a.nbytes for a in made) < 2**20  # keys and constants, but no weights


def gathered(compiled):
    """Shapes of what a program collects from all devices."""
    lines = re.findall(r"^.* = (.*) all-gather(?:-start)?\(", compiled.as_text(), re.M)
    return {
        tuple(int(n) for n in shape.split(",") if n)
        for line in lines
        for shape in re.findall(r"\w+\[([\d,]*)\]", line)
    }


@pytest.mark.slow
def test_large_mae_collects_the_weights_of_one_block_at_a_time():
    """And never the tokens of all samples, which at this batch would be 200 times as much."""
    run = assembled("mae_imagenet:large", 8, canvas=256, batch=4096)
    compiled = run.step.lower(run.abstract, run.inputs, None, abstract_key(run.mesh)).compile()
    found = gathered(compiled)
    assert {(1024, 3072), (1024, 4096), (4096, 1024), (512, 2048)} <= found
    assert all(len(shape) <= 2 for shape in found), found
    state = compiled.memory_analysis().output_size_in_bytes
    assert state < 1.05 * 12 * count(run.abstract.params) / 8  # weights and two moments


@pytest.mark.slow
def test_tiny_mae_on_eight_shards_trains_as_on_one_device():
    optim = {
        "name": "adamw", "lr": 1e-3, "lr_batch": 0, "schedule": "constant", "warmup_epochs": 0.0,
        "weight_decay": 0.05,
    }  # fmt: skip
    g = np.random.default_rng(0)
    host = {
        "image": g.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8),
        "size": np.full((8, 2), 64, np.int32), "index": np.arange(8, dtype=np.int32),
        "epoch": np.zeros(8, np.int32), "category": np.zeros(8, np.int32), "facts": {},
    }  # fmt: skip
    losses, ends = [], []
    for shards in (1, 8):
        run = assembled(
            "mae:smoke", shards, canvas=64, batch=8, min_size=2048,
            devices=jax.devices()[:shards], **optim,
        )  # fmt: skip
        mesh, abstract = run.mesh, run.abstract
        if mesh.size == 8:
            assert check_stacked(abstract.params, (2,)) == 8
            assert check_stacked(abstract.opt_state, (2,)) == 16
        state = initial_state(run.objective, run.tx, abstract, seed=0)
        batch, found = place_batch(host, mesh), []
        compiled = run.step.lower(state, batch, None, run.key).compile()
        if mesh.size == 8:  # the weights of blocks are collected, not the tokens of all samples
            seen = gathered(compiled)
            assert {(48, 144), (48, 192), (192, 48), (32, 96), (32, 128)} <= seen
            assert not {shape for shape in seen if len(shape) > 2}
        for _ in range(5):
            state, scalars = compiled(state, batch, None, run.key)
            found.append(float(scalars["loss"]))
        for path, leaf in flatten(state.params).items():
            spec = flatten(abstract.params)[path].sharding.spec
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), path
        losses.append(found)
        ends.append(jax.device_get(state.params))
    assert losses[0][-1] < losses[0][0] - 0.01
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
    for a, b in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[1]), strict=True):
        # Adam turns rounding of gradients near zero into steps of the size of the rate.
        assert np.abs(a - b).mean() < 1e-5
