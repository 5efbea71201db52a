"""SPADE's own options; the contract has the rest."""

import jax
import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.ops.neighbors import nearest
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, made, maps_of, upsampled

BOTH = {"layers": ("layer2", "layer3"), "pooled": "layer3"}


def fitted(images=6, order=None, size=4, key=KEY, **config):
    detector = made("spade", **BOTH, **config)
    normal = maps_of(0, images)
    return detector, detector.fit(Batches(normal, order, size), **ALONE | {"key": key})


def test_a_training_image_finds_itself():
    detector, state = fitted(neighbours=1)
    normal = {n: np.concatenate([m, m[:2]]) for n, m in maps_of(0, 6).items()}
    scores = jax.jit(detector.score)(state, normal)
    np.testing.assert_allclose(scores.image, 0.0, atol=1e-5)
    np.testing.assert_allclose(scores.map, 0.0, atol=1e-5)


def test_all_images_is_a_search_in_all_cells():
    detector, state = fitted(neighbours=6)
    normal, test = maps_of(0, 6), maps_of(1, 8)
    scores = jax.jit(detector.score)(state, test)
    maps = []
    for name in ("layer2", "layer3"):
        queries, bank = (m[name].reshape(-1, m[name].shape[3]) for m in (test, normal))
        gaps = np.asarray(nearest(queries, bank)[0]).reshape(test[name].shape[:3])
        maps.append(upsampled(gaps))
    np.testing.assert_allclose(scores.map, np.mean(maps, axis=0), rtol=1e-5)
    more, found = fitted(neighbours=50)  # fewer images than K: all of them
    close(jax.jit(more.score)(found, test), scores)


def test_fewer_neighbours_never_come_closer():
    test = maps_of(1, 8)
    maps = []
    for count in (2, 6):
        detector, state = fitted(neighbours=count)
        maps.append(np.asarray(jax.jit(detector.score)(state, test).map))
    assert (maps[0] >= maps[1] - 1e-5).all()
    assert (maps[0] > maps[1] + 0.1).any()


def test_padding_images_is_never_chosen():
    detector, state = fitted(70, neighbours=70)
    assert state["pooled"].shape == (128, 4)
    assert state["gallery"]["layer2"].shape == (128, 30, 7)
    test = maps_of(1, 8)
    plain = jax.tree.map(lambda x: x[:70], state)
    score = jax.jit(detector.score)
    scores = score(state, test)
    assert np.isfinite(scores.image).all()
    close(scores, score(plain, test))


def test_gallery_subset_is_bounded_and_independent_of_the_order():
    every = np.asarray(fitted(9)[1]["pooled"])
    state = fitted(9, gallery_images=4, neighbours=3)[1]
    subset = np.asarray(state["pooled"])
    assert subset.shape == (4, 4)
    assert {r.tobytes() for r in subset} <= {r.tobytes() for r in every}
    other = fitted(9, np.arange(9)[::-1], 3, gallery_images=4, neighbours=3)[1]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b[::-1], rtol=1e-6)
    drawn = [fitted(9, key=jax.random.key(s), gallery_images=4)[1] for s in range(30)]
    place = {r.tobytes(): i for i, r in enumerate(every)}
    hits = np.bincount([place[r.tobytes()] for s in drawn for r in np.asarray(s["pooled"])])
    # 30 draws of 4 of 9: 13.3 ± 2.7 per image.
    assert (abs(hits - 120 / 9) < 5 * 2.7).all()
    assert len(hits) == 9


def test_images_split_over_a_mesh():
    detector, state = fitted(neighbours=4)
    mesh, test = make_mesh(MeshConfig(), jax.devices()[:8]), maps_of(1, 6)
    split = jax.jit(lambda s, f: detector.score(s, f, mesh=mesh))
    close(split(state, test), jax.jit(detector.score)(state, test))


def test_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"neighbours": 0}, "neighbours"),
        ({"kappa": 0}, "kappa"),
        ({"gallery_images": -1}, "gallery_images"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("spade", **config)
    with pytest.raises(DataError, match=r"at least kappa = 20 cells of layer3.*found 18"):
        fitted(2, kappa=20)
    with pytest.raises(ConfigError, match="no feature map named layer4"):
        made("spade", layers=("layer2",)).fit(Batches(maps_of(0, 2)), **ALONE)
    with pytest.raises(ConfigError, match="nothing to train"):
        made("spade", **BOTH).fit(Batches(maps_of(0, 1)), **ALONE, trained={})
