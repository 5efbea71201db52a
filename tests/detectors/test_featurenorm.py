"""FeatureNorm: the published radii, and what the evaluation makes of its map."""

import dataclasses

import jax
import numpy as np
import pytest

from dsad.core.mesh import MeshConfig, make_mesh
from dsad.evaluation.compiled import finished
from dsad.evaluation.localize import EvalConfig, localize
from tests.contracts.detectors.common import ALONE, made
from tests.evaluation.test_localize import Planted, Pooled
from tests.seams.wrappers import away

ONE = {"layers": ("a",)}


def test_the_image_score_is_the_highest_smoothed_pixel():
    """sigma 4 leaves 0.00994789 of an impulse inside, and 0.0385767 of one in a corner."""
    detector = made("featurenorm", **ONE)
    features = np.zeros((1, 65, 65, 2), np.float32)
    features[0, 32, 32, 0] = 8
    assert detector.fit(None, **ALONE) == {}
    scores = detector.score({}, {"a": features})
    found = finished(detector.traits, (65, 65), True, scores)
    assert scores.image[0] == 2
    assert found.image[0] == pytest.approx(2 * 0.00994789, rel=1e-5)
    corner = {"a": np.roll(features, (-32, -32), (1, 2))}
    found = finished(detector.traits, (65, 65), True, detector.score({}, corner))
    assert found.image[0] == pytest.approx(2 * 0.0385767, rel=1e-5)
    method = dataclasses.replace(detector.traits, image_score="method")
    assert finished(method, (65, 65), True, scores).image[0] == 2


def test_it_needs_residuals():
    """A planted defect is hidden in the length of raw features, and stands out in residuals."""
    config = EvalConfig(image_size=48, batch_size=4, workers=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def run(**wrappers):
        about = {"mesh": mesh, "key": jax.random.key(3), "map_wrappers": wrappers}
        return localize(
            Pooled(), made("featurenorm", layers=("colour",)), Planted(strength=3), config, **about
        ).mean["pixel_auroc"]

    assert run(away=away.Away()) > run() + 0.05
