"""The 2-class detector: focal loss, what trains and what stays, which backbones it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.detectors import twoclass
from dsad.models import resnet
from tests.contracts.detectors import twoclass as case
from tests.contracts.detectors.common import KEY, Batches, fitted, made

LOGITS = np.float32([-7, -1.5, 0, 0.3, 2.197224577, 9])


@pytest.mark.parametrize(("gamma", "alpha"), [(0, 0), (2, 0), (2, 0.25), (0.5, 0.75)])
@pytest.mark.parametrize("label", [True, False])
def test_focal_loss_is_the_equation(gamma, alpha, label):
    p = 1 / (1 + np.exp(-np.float64(LOGITS)))
    p = p if label else 1 - p
    weight = 1.0 if not alpha else alpha if label else 1 - alpha
    expected = -weight * (1 - p) ** gamma * np.log(p)
    found = twoclass.focal(jnp.asarray(LOGITS), jnp.full(6, label), gamma, alpha)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_focal_loss_of_a_probability_of_nine_tenths():
    loss = twoclass.focal(jnp.log(jnp.float32([9, 1 / 9])), jnp.array([True, False]), 2.0)
    np.testing.assert_allclose(loss, 0.0010536, rtol=1e-4)


def test_focal_loss_has_a_slope_at_any_logit():
    slope = jax.vmap(jax.grad(lambda x: twoclass.focal(x, x > 0, 2.0)))(jnp.float32([-200, 200]))
    assert np.isfinite(slope).all()


#: Of two stages: their blocks differ, and the first of them tell bottlenecks apart.
@pytest.mark.parametrize(("name", "stages"), [("resnet18", 4), *((n, 2) for n in resnet.ARCHS)])
def test_parameters_tell_their_network(name, stages):
    network = resnet.resnet(name, stages=stages)
    assert resnet.of_params(network.shapes()[0]) is network


def batch_of(label, masked=1):
    image = np.random.default_rng(0).integers(0, 256, (4, 24, 20, 3), np.uint8)
    mask = np.zeros((4, 24, 20), np.uint8)
    mask[:, :5, :7] = label
    number = np.arange(4, dtype=np.int32)
    return {
        "image": image, "mask": mask, "label": np.full(4, label, np.int32), "index": number,
        "masked": np.full(4, masked, np.int32), "epoch": 0 * number,
    }  # fmt: skip


def objective_of(**config):
    network = case.network()
    objective = made("twoclass", **case.SMALL | config).objective(None, network)
    return objective, *objective.adopt(*objective.init(KEY), network)


def test_training_starts_from_the_weights_of_the_backbone():
    network = case.network()
    _, params, extra = objective_of()
    for name in ("classifier", "segmenter"):
        jax.tree.map(np.testing.assert_array_equal, params[name]["encoder"], network.params)
    jax.tree.map(np.testing.assert_array_equal, extra["encoder_statistics"], network.extra)


def changed(state, network):
    """Largest change of an encoder's weight, by network."""
    return {
        name: max(
            float(np.abs(a - b).max())
            for a, b in zip(
                jax.tree.leaves(state[name]["encoder"]), jax.tree.leaves(network.params),
                strict=True,
            )
        )
        for name in ("classifier", "segmenter")
    }  # fmt: skip


def test_encoders_train_unless_frozen_and_keep_their_statistics():
    source, network = Batches(case.maps_of(0, 6)), case.network()
    few = dataclasses.replace(case.RECIPE, steps=3)
    free, frozen = (
        fitted(made("twoclass", **{**config, "recipe": few}), source)
        for config in (case.CONFIGS[1], case.CONFIGS[0])
    )
    assert min(changed(free, network).values()) > 1e-5
    assert max(changed(frozen, network).values()) == 0
    assert jax.tree.structure(free) == jax.tree.structure(frozen)
    jax.tree.map(np.testing.assert_array_equal, free["encoder_statistics"], network.extra)


def test_flips_move_masks_as_their_images():
    objective, _, _ = objective_of(flips=True)
    batch = batch_of(1)
    batch["image"] = np.repeat(255 * batch["mask"][..., None], 3, axis=3)
    views = jax.jit(objective.views)(batch, KEY)
    np.testing.assert_array_equal(views["images"][..., 0] > 0.5, views["mask"])
    corners = {(bool(m[0, 0]), bool(m[-1, 0]), bool(m[0, -1])) for m in np.asarray(views["mask"])}
    assert len(corners) > 1


def test_pixels_without_annotation_are_left_out():
    objective, params, extra = objective_of()

    def segmenter(batch):
        views = objective.views(batch, KEY)
        return objective.loss(params, extra, views, key=KEY, step=jnp.int32(0))[1][1]["segmenter"]

    parts = jax.jit(segmenter)
    assert parts(batch_of(1)) > 0
    assert parts(batch_of(1, masked=0)) == 0


def test_other_networks_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Other:
        arch: str = "vit_base_patch16_224"
        mean: tuple = (0, 0, 0)
        std: tuple = (1, 1, 1)

    with pytest.raises(ConfigError, match=r"config\.backbone: .*resnet18.* found vit_base"):
        made("twoclass").objective(None, Other())


def test_a_missing_stage_lists_what_there_is():
    with pytest.raises(
        ConfigError,
        match=r"^config\.detector\.layers: no .* layer4; the backbone gives: stem, layer1\. .*"
        r"--config\.detector\.layers=\"\('stem','layer1'\)\"",
    ):
        made("twoclass").objective(None, case.network())


def test_a_single_class_is_refused(monkeypatch):
    both = case.labelled_of
    monkeypatch.setattr(case, "labelled_of", lambda source: list(both(source))[:6])
    with pytest.raises(DataError, match="6 normal and 0 anomalous.*visa:fewshot"):
        fitted(made("twoclass", **case.SMALL), Batches(case.maps_of(0, 6)))
