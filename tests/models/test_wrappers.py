"""Backbones around backbones."""

import jax
import numpy as np
import pytest

from dsad.assembly import evaluate, runs
from dsad.core.errors import ConfigError
from dsad.core.types import Backbone
from dsad.models import wrappers
from dsad.terminal import flags


@pytest.fixture(scope="module")
def patches():
    return runs.backbone("patches:32/8:resnet18", "random", 3)


def test_cells_are_the_encodings_of_their_patches(patches):
    images = np.random.default_rng(0).standard_normal((2, 48, 40, 3)).astype(np.float32)
    found = jax.jit(lambda network, x: network(x))(patches, images)
    assert {n: m.shape for n, m in found.items()} == {
        "layer1": (2, 3, 2, 64), "layer2": (2, 3, 2, 128),
        "layer3": (2, 3, 2, 256), "layer4": (2, 3, 2, 512),
    }  # fmt: skip
    whole = np.stack([
        images[b, 8 * i : 8 * i + 32, 8 * j : 8 * j + 32]
        for b, i, j in np.ndindex(2, 3, 2)
    ])  # fmt: skip
    encoded = jax.jit(lambda network, x: network(x))(patches.encoder, whole)
    for name, maps in encoded.items():
        mean = np.asarray(maps, np.float64).mean(axis=(1, 2))
        expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(
            found[name].reshape(-1, mean.shape[1]), expected, rtol=1e-4, atol=1e-6
        )


def test_a_wrapper_shows_its_encoder(patches):
    assert (patches.mean, patches.std) == (patches.encoder.mean, patches.encoder.std)
    assert patches.arch == "patches:32/8:resnet18"
    assert patches.description == "random, seed 3"
    assert patches.image_size is None  # patches fill an image of any side
    assert patches.only(("layer1",)).layers == ("layer1",)
    assert isinstance(patches.encoder, Backbone)
    assert jax.tree.structure(patches).num_leaves == len(jax.tree.leaves(patches.encoder))


def test_patches_must_end_at_the_border(patches):
    for side in (42, 24):
        with pytest.raises(ConfigError, match=rf"32 \+ 8 n pixels.*found {side}.*image_size"):
            jax.eval_shape(patches, np.zeros((1, side, side, 3), np.float32))


def test_loading_by_name():
    found = runs.backbone("patches:16/4:resnet18", "random", 5)
    assert isinstance(found, wrappers.Patches)
    assert (found.size, found.stride, found.description) == (16, 4, "random, seed 5")
    assert runs.innermost("patches:16/4:run:runs/a") == "run:runs/a"
    for spec in ("patches:32:resnet18", "patches:32/0:resnet18", "patches:32/4:", "patches:32/4"):
        with pytest.raises(ConfigError, match="expected patches:SIZE/STRIDE:BACKBONE"):
            runs.backbone(spec, "", 0)
    with pytest.raises(ConfigError, match="no backbone named 'resnet19'"):
        runs.backbone("patches:32/4:resnet19", "", 0)
    with pytest.raises(ConfigError, match="brings its own weights"):
        runs.backbone("patches:32/4:run:runs/a", "w.npz", 0)


@pytest.mark.parametrize("variant", ["mvtec_objects", "mvtec_textures", "toothbrush", "mtd"])
def test_gde_variants(variant):
    config, _, _ = flags.Command("evaluate", "", config=f"configs/gde.py:{variant}").parse([])
    parsed, detector = evaluate.parse(config)
    assert parsed.backbone == "patches:32/4:resnet18"
    assert (parsed.evaluation.image_size, detector.config.sigma) == (256, 0.0)
    aligned = variant in ("mvtec_objects", "toothbrush")
    assert detector.config.per_position == aligned
    expected = {"toothbrush": 50}.get(variant, 200 if aligned else 500)
    assert detector.config.components == expected
