"""Class tokens beside the maps: who has them, and that they are the network's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.evaluation.compiled import Device
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.extract import Extractor
from dsad.models import backbone, vit
from dsad.models.wrappers import Patches
from tests.contracts.detectors.common import made

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


def test_maps_behind_the_final_norm_are_those_of_the_encoder():
    network = backbone("vit_tiny_patch16_224")
    reader = Extractor(("norm11", "block11", "norm3"), (32, 48), make_mesh(MeshConfig()))
    reader.use(network)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)
    found = reader(images)
    assert {n: x.shape for n, x in found.items()} == dict.fromkeys(
        ("norm11", "block11", "norm3"), (8, 2, 3, 192)
    )
    module = vit.vit("vit_tiny_patch16_224")
    pixels = jnp.asarray((images / 255 - 0.5) / 0.5, jnp.float32)
    patches = module.embed(network.params, network.extra, pixels)
    expected = module.encode(network.params, network.extra, patches)[:, 1:]
    np.testing.assert_allclose(found["norm11"].reshape(8, 6, 192), expected, atol=1e-5)
    raw = np.asarray(network.only(("block3",))(pixels)["block3"], np.float64)
    raw = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found["norm3"], raw, atol=1e-4)  # fresh: scale 1 and bias 0
    assert network.only(("norm3", "cls")).strides == {"norm3": 16}
    both = network.only(("norm3", "cls"))(pixels)
    np.testing.assert_allclose(both["norm3"], found["norm3"], atol=1e-5)


def test_maps_that_a_network_lacks_are_refused_with_those_it_has():
    for unknown in ("norm12", "norm"):
        with pytest.raises(ConfigError, match=rf"no feature map {unknown}; .*block11, .*norm11"):
            extractor(unknown).use(backbone("vit_tiny_patch16_224"))
        with pytest.raises(ConfigError, match=f"no feature map '{unknown}'.*norm11"):
            backbone("vit_tiny_patch16_224").only((unknown,))
    with pytest.raises(ConfigError, match="no feature map norm1; it has: layer1"):
        Extractor(("norm1",), (32, 32), make_mesh(MeshConfig())).use(backbone("resnet18"))
    inside = Patches(encoder=backbone("vit_tiny_patch16_224"), size=16, stride=16)
    reader = Extractor(("norm2",), (32, 32), make_mesh(MeshConfig(), jax.devices()[:1]))
    reader.use(inside)
    assert reader(IMAGES)["norm2"].shape == (2, 2, 2, 192)


@pytest.mark.parametrize("name", ["subspace", "superadd"])
def test_a_depth_that_the_network_does_not_have_is_refused(name):
    """Also one whose blocks the network has, which lie elsewhere in it than meant."""
    network, config = backbone("vit_tiny_patch16_224"), EvalConfig(image_size=32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for depth in (24, 6):
        message = rf"detector\.depth: expected 12, the blocks of vit_tiny_.*, found {depth}"
        with pytest.raises(ConfigError, match=message):
            Device(network, made(name, depth=depth), config, mesh)
    Device(network, made(name), config, mesh)
    Device(network, made(name, depth=24, layers=("block3",)), config, mesh)
    with pytest.raises(ConfigError, match="no feature map block.*; it has: layer1"):
        Device(backbone("resnet18"), made(name), config, mesh)


def test_networks_without_one_are_refused_by_name():
    residual = backbone("resnet18")
    with pytest.raises(ConfigError, match=r"class token cls .* resnet18 has none"):
        extractor("layer2").use(residual)
    inside = Patches(encoder=backbone("vit_tiny_patch16_224"), size=16, stride=16)
    with pytest.raises(ConfigError, match=r"patches:16/16:vit_tiny_patch16_224 has none"):
        extractor("block3").use(inside)
