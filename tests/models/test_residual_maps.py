"""Map wrappers of residual and projected features, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.detection import FeatureBatch, MapWrapper
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.models.draws import uniform_draws
from dsad.models.projector import init_projector, project
from dsad.models.residual_maps import ProjectedMaps, Projectors, ResidualMaps
from dsad.ops.residual import pooled

MAPS = np.random.default_rng(0).normal(size=(6, 4, 3, 8)).astype(np.float32)


class Batches:
    """Two categories, every image in two rotations, batches that do not end with images."""

    categories = ("a", "b")

    def __init__(self, images=(3, 3), rotations=1, order=1):
        self.images, self.rotations, self.order = images, rotations, order

    def __iter__(self):
        start = 0
        for category, count in zip(self.categories, self.images, strict=True):
            numbers = np.repeat(np.arange(start, start + count), self.rotations)[:: self.order]
            start += count
            for at in range(0, len(numbers), 2):
                index = numbers[at : at + 2]
                index = np.concatenate([index, np.full(3 - len(index), -1)])
                maps = MAPS[index] + np.arange(3)[:, None, None, None] * (self.rotations > 1)
                maps = {"a": jnp.asarray(maps), "cls": jnp.zeros((3, 5))}
                yield FeatureBatch(maps, index >= 0, category, index)


def adapted(wrapper=None, key=0, **how):
    wrapper = wrapper or ResidualMaps(8)
    return wrapper.adapt(Batches(**how), mesh=None, key=jax.random.key(key))


def loop(bank, image, number):
    rows = np.float64(bank["rows"]["a"])[np.asarray(bank["owner"]) != number].reshape(-1, 8)
    left = []
    for cell in np.float64(image).reshape(-1, 8):
        cosine = rows @ cell / np.linalg.norm(rows, axis=1)
        left.append(cell - rows[cosine.argmax()])
    return np.reshape(left, image.shape)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("rotations", [1, 2])
def test_residual_maps_are_without_the_image_itself(devices, rotations):
    wrapper, bank = ResidualMaps(8), adapted(rotations=rotations)
    assert isinstance(wrapper, MapWrapper)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices]) if devices > 1 else None
    index = np.array([0, 4, -1, 5], np.int32)
    images = MAPS[[0, 4, 4, 5]]
    transform = jax.jit(functools.partial(wrapper.transform, mesh=mesh))
    found = transform(bank, {"a": jnp.asarray(images)}, index=jnp.asarray(index))["a"]
    for i, number in enumerate(index):
        np.testing.assert_allclose(found[i], loop(bank, images[i], number), atol=1e-5)
    assert np.abs(found[1]).max() > 0.1
    if rotations == 1:
        np.testing.assert_array_equal(found[2], 0)  # of the support set, but not said to be


def test_references_are_few_of_every_category_and_no_matter_of_order():
    bank = adapted(ResidualMaps(2))
    assert bank["rows"]["a"].shape == (4, 4, 3, 8)
    owner = np.asarray(bank["owner"])
    assert (owner < 3).sum() == 2
    again = adapted(ResidualMaps(2), order=-1)
    np.testing.assert_array_equal(again["owner"], owner)
    np.testing.assert_array_equal(again["rows"]["a"], bank["rows"]["a"])
    drawn = {tuple(np.asarray(adapted(ResidualMaps(2), key=k)["owner"]).tolist()) for k in range(9)}
    assert len(drawn) > 2


def test_a_single_image_has_no_reference():
    with pytest.raises(DataError, match=r"residual features of b need two images.*config\.shots"):
        adapted(images=(3, 1))


def projected(tokens=2, width=8, layer="a"):
    build = functools.partial(init_projector, width=width, references=5, heads=2)
    params = {layer: uniform_draws(jax.random.key(1), build)}
    return params, ProjectedMaps(8, "runs/x", lambda: Projectors(params, tokens, "of a test"))


def test_projected_maps_are_pooled_residual_and_projected():
    params, wrapper = projected()
    bank = adapted(wrapper)
    transform = jax.jit(wrapper.transform)
    found = transform(bank, {"a": jnp.asarray(MAPS[:2])}, index=jnp.array([-1, 1]))["a"]
    assert found.shape == (2, 2, 2, 8)
    small = np.asarray(pooled(jnp.asarray(MAPS), 2))
    np.testing.assert_allclose(bank["rows"]["a"][0], small[int(bank["owner"][0])], atol=1e-6)
    for i, number in enumerate((-1, 1)):
        left = jnp.asarray(loop(bank, small[i], number), jnp.float32).reshape(1, -1, 8)
        np.testing.assert_allclose(
            found[i].reshape(1, -1, 8), project(params["a"], left), atol=1e-4
        )


def test_what_no_projector_was_trained_for_is_refused():
    with pytest.raises(ConfigError, match="runs/x has no projector of a; it has some of: layer9"):
        adapted(projected(layer="layer9")[1])
    with pytest.raises(ConfigError, match="for 16 channels of a, and the backbone gives 8"):
        adapted(projected(width=16)[1])
