"""Backbones that can leave feature maps out compute those of the detector, also in wrappers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly.runs import RunBackbone
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Backbone
from dsad.evaluation.extract import Extractor
from dsad.evaluation.localize import EvalConfig, localize
from dsad.models import wrappers
from tests.evaluation.test_localize import Distance, Planted, Pooled


@dataclasses.dataclass(frozen=True)
class Choosy(Pooled):
    """Pooled colours under three names; notes which of them a program computes."""

    ran: list = dataclasses.field(default_factory=list, compare=False)

    def maps(self, images):
        if self.layers:
            self.ran.append(self.layers)
        cells = super().maps(images)["colour"]
        return {"colour": cells, "double": 2 * cells, "grey": cells.mean(-1, keepdims=True)}


def run(backbone, *layers):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = EvalConfig(image_size=48, batch_size=4, workers=2)
    detector = Distance(layers=layers)
    return localize(backbone, detector, Planted(), config, mesh=mesh, key=jax.random.key(3))


def test_only_the_detectors_layers_are_computed_and_numbers_stay():
    backbone = Choosy()
    found = run(backbone, "colour")
    assert backbone.ran == [("colour",)]
    assert found.mean == run(Pooled(), "colour").mean


def test_a_layer_that_does_not_exist_lists_all_that_do():
    with pytest.raises(ConfigError, match=r"no feature map layer9; it has: colour, double, grey"):
        run(Choosy(), "colour", "layer9")


def test_maps_continue_in_the_same_program():
    images = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), np.uint8)
    for count in (1, 8):
        mesh = make_mesh(MeshConfig(), jax.devices()[:count])
        plain, summed = (
            Extractor(("grey",), (48, 48), mesh),
            Extractor(("grey",), (48, 48), mesh, lambda maps: {"sum": maps["grey"].sum((1, 2, 3))}),
        )
        for extractor in (plain, summed):
            extractor.use(Choosy())
        grey = plain(images)["grey"]
        expected = ((images / 255 - 0.5) / 0.25).reshape(8, 12, 4, 12, 4, 3).mean((2, 4, 5))
        np.testing.assert_allclose(grey[..., 0], expected, atol=1e-5)
        np.testing.assert_allclose(summed(images)["sum"], expected.sum((1, 2)), rtol=1e-4)


def test_patches_pass_it_to_their_encoder():
    whole = wrappers.Patches(encoder=Choosy(), size=16, stride=8)
    narrow = whole.only(("grey",))
    assert narrow.encoder.layers == ("grey",)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    np.testing.assert_array_equal(narrow(images)["grey"], whole(images)["grey"])


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective with two maps."""

    def features(self, params, extra, images, layers=None):
        found = {"block0": params * images, "block1": images + extra}
        return {n: m for n, m in found.items() if layers is None or n in layers}


def test_a_run_asks_its_objective():
    backbone = RunBackbone(
        params=jnp.float32(2), extra=jnp.float32(1), function=Objective().features,
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), image_size=None, arch="vit", description="",
    )  # fmt: skip
    assert isinstance(backbone, Backbone)
    images = jnp.ones((1, 4, 4, 3))
    maps = jax.jit(lambda network, x: network(x))(backbone.only(["block1"]), images)
    assert len(maps) == 1
    np.testing.assert_array_equal(maps["block1"], images + 1)
    assert set(backbone(images)) == {"block0", "block1"}


def test_the_input_itself_is_a_map_where_it_is_asked_for():
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    extractor = Extractor(("pixels", "colour"), (48, 48), mesh)
    network = Pooled()
    extractor.use(network)
    maps = extractor(images)
    expected = (images / np.float64(255) - network.mean) / network.std
    np.testing.assert_allclose(maps["pixels"], expected, rtol=1e-5, atol=1e-6)
    alone = Extractor(("colour",), (48, 48), mesh)
    alone.use(network)
    np.testing.assert_allclose(maps["colour"], alone(images)["colour"], atol=1e-6)
