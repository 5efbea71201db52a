"""Class tokens beside the maps: who has them, and that they are the network's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.evaluation.extract import Extractor
from dsad.models import backbone, vit
from dsad.models.wrappers import Patches

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def extractor(*layers):
    return Extractor(layers, (32, 32), make_mesh(MeshConfig(), jax.devices()[:1]), tokens=("cls",))


def test_the_class_token_is_the_first_one_behind_the_norm():
    network = backbone("vit_tiny_patch16_224")
    reader = extractor("block3")
    reader.use(network)
    found = reader(IMAGES)
    assert {n: x.shape for n, x in found.items()} == {"block3": (2, 2, 2, 192), "cls": (2, 192)}
    pixels = jnp.asarray((IMAGES / 255 - 0.5) / 0.5, jnp.float32)
    module = vit.vit("vit_tiny_patch16_224")
    patches = module.embed(network.params, network.extra, pixels)
    expected = module.encode(network.params, network.extra, patches)[:, 0]
    np.testing.assert_allclose(found["cls"], expected, atol=1e-5)
    alone = network.only(("block3",))(pixels)["block3"]
    np.testing.assert_allclose(found["block3"], alone, atol=1e-5)
    assert set(network(pixels)) == {f"block{i}" for i in range(12)}  # only who asks gets it


def test_networks_without_one_are_refused_by_name():
    residual = backbone("resnet18")
    with pytest.raises(ConfigError, match=r"class token cls .* resnet18 has none"):
        extractor("layer2").use(residual)
    inside = Patches(encoder=backbone("vit_tiny_patch16_224"), size=16, stride=16)
    with pytest.raises(ConfigError, match=r"patches:16/16:vit_tiny_patch16_224 has none"):
        extractor("block3").use(inside)
