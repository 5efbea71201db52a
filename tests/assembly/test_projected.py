"""Projectors of a run on maps of an encoder: its own, however computed, and no other."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsad.assembly import evaluate, runs
from dsad.core.errors import ConfigError
from dsad.models.residual_maps import Projectors
from tests.backbones import Plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Small(Plain):
    """Two maps of averaged pixels."""

    weight: jax.Array

    def maps(self, images):
        b, h, w, c = images.shape
        cells = images.reshape(b, h // 16, 16, w // 16, 16, c).mean((2, 4))
        cells = cells * self.weight[None, None, None]
        return {"layer1": cells, "layer2": cells, **{self.description: cells}}


def checked(monkeypatch, weight, layers=("layer1",)):
    reads = []

    def projectors(spec):
        reads.append(spec)
        return Projectors({"layer1": {}}, 16, "of a test")

    monkeypatch.setattr(runs, "projectors", projectors)
    monkeypatch.setattr(runs, "backbone", lambda *_: Small(jnp.ones(3), description="deeper"))
    other = Small(jnp.asarray(weight, jnp.float32), description="another")
    evaluate._check_projected("projected:runs/a:resnet18", other, layers)
    return reads


@pytest.mark.parametrize("weight", [(1, 1, 1), (1.03, 0.97, 1.03)])
def test_the_encoder_of_the_run_may_have_been_computed_in_bfloat16(monkeypatch, weight):
    assert checked(monkeypatch, weight) == ["run:runs/a"]


@pytest.mark.parametrize("weight", [(1, 1.5, 1), (-1, -1, -1)])
def test_another_encoder_is_refused(monkeypatch, weight):
    with pytest.raises(ConfigError, match=r"whose layer1 differs from that of .*\(another\)"):
        checked(monkeypatch, weight)
    for unknown in ("layer9", "deeper"):  # which the detector will refuse
        assert checked(monkeypatch, weight, layers=(unknown,))
    with pytest.raises(ConfigError, match="runs/a has no projector of layer2; .* of: layer1"):
        checked(monkeypatch, weight, layers=("layer1", "layer2"))


def test_projectors_are_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(runs, "projectors", lambda spec: reads.append(spec))
    wrapper = runs.wrappers.unwrap("projected:4:runs/a:resnet18").maps[0]
    for _ in range(3):
        wrapper.read()
    assert (reads, wrapper.references) == (["run:runs/a"], 4)
