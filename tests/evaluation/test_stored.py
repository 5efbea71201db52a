"""Features on disk: the network runs once per image, and numbers do not change by a bit."""

import concurrent.futures
import dataclasses
import errno
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dsad.assembly.runs import RunBackbone
from dsad.core import paths
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import silent
from dsad.data import base
from dsad.data.base import FaultError
from dsad.data.files import FileSource
from dsad.detectors import isstad
from dsad.evaluation import stamp, stored, support
from dsad.evaluation.compiled import Device
from dsad.evaluation.extract import Extractor
from dsad.evaluation.localize import EvalConfig, localize
from dsad.models.wrappers import Patches
from tests.backbones import Plain, static
from tests.data import trees
from tests.evaluation.test_label_probe import Coloured
from tests.evaluation.test_localize import Distance, Planted, Pooled
from tests.evaluation.test_support import sampled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cells(Plain):
    """Mean colours of 4 × 4 pixels times a weight, and what ISSTAD's network would give."""

    gain: jax.Array
    power: int = static(default=1)

    def maps(self, images):
        b, h, w, c = images.shape
        cells = (images * self.gain).reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4))
        grey = jnp.abs(images.mean(-1, keepdims=True))
        return {
            "colour": cells**self.power, "double": 2 * cells, "probability": grey / (1 + grey),
            "error": grey**2, "reconstruction": jnp.clip(images, 0, 1),
        }  # fmt: skip


CELLS = Cells(jnp.float32(1.5))


@pytest.fixture
def seen(monkeypatch):
    """Sizes of the batches that networks were run on, of features and of panels."""
    sizes = []
    run = Extractor.__call__

    def counted(self, images):
        sizes.append(len(images))
        return run(self, images)

    monkeypatch.setattr(Extractor, "__call__", counted)
    return sizes


def run(
    folder, dataset=None, *, backbone=CELLS, detector=None, devices=1, progress=silent, **config,
):  # fmt: skip
    mesh, sampling = make_mesh(MeshConfig(), jax.devices()[:devices]), sampled(config)
    settings = {"image_size": 16, "batch_size": 4, "workers": 2, "gallery": 3}
    cache = {"feature_cache": str(folder) if folder else ""}
    return localize(
        backbone, detector or Distance(sigma=0.0), dataset or Planted(),
        EvalConfig(**{**settings, **cache, **config}), mesh=mesh, key=jax.random.key(3),
        progress=progress, sampling=sampling,
    )  # fmt: skip


def same(a, b):
    """Bitwise: every number, score and picture of two runs."""
    assert (a.mean, a.kinds, a.images, a.scales) == (b.mean, b.kinds, b.images, b.scales)
    assert a.gallery.keys() == b.gallery.keys()
    for name, values in a.gallery.items():
        np.testing.assert_array_equal(values, b.gallery[name])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small data set of files."""
    root = tmp_path_factory.mktemp("tree")
    trees.mvtec(root)
    return root


def files(root, **keys):
    """One category of the tree: 3 training images, 2 good and 2 anomalous test images."""
    keys = {"categories": ("disc",), **keys}
    return base.load(base.DataConfig(name="mvtec", root=str(root), **keys))


# --- the second run -------------------------------------------------------------------------


def test_a_second_run_needs_no_network_and_gives_the_same_bits(tmp_path, seen):
    plain = run(None)
    assert "features_from_cache" not in plain.categories["disc"]
    del seen[:]
    first = run(tmp_path)
    assert sum(seen) == 8 + 12  # 7 and 11 images in batches of 4; the fit's second pass is kept
    assert first.categories["disc"]["features_from_cache"] == {"train": 0, "test": 0}
    del seen[:]
    texts = []

    def tell(done, total, text):
        texts.append((done, total, text))

    for devices, batch in ((1, 3), (8, 5)):
        again = run(tmp_path, devices=devices, batch_size=batch, progress=tell)
        assert not seen
        assert again.categories["disc"]["features_from_cache"] == {"train": 7, "test": 11}
        same(again, plain)
        assert not stamp.differences(again.stamp, plain.stamp)
        assert texts[-1][:2] == (18, 18)
    assert (7, 18, "train features (cached features): disc") in texts
    same(first, plain)
    assert "feature_cache" not in str(plain.stamp)


def test_seeds_and_held_out_images_share_the_store(tmp_path, seen):
    keys = {"seeds": (0, 1), "shots": 3, "false_alarm_rate": 0.2, "holdout": 2, "cache_mb": 0}
    plain = run(None, **keys)
    run(tmp_path)
    del seen[:]
    again = run(tmp_path, **keys)
    assert not seen
    same(again, plain)
    assert again.thresholds == plain.thresholds
    found = again.categories["disc"]["features_from_cache"]
    assert found["test"] == 11
    assert 3 <= found["train"] <= 6  # three per seed, the split fit included
    assert found["held out"] > 0


def test_eight_devices_write_what_one_reads(tmp_path, seen):
    first = run(tmp_path, devices=8)
    del seen[:]
    same(run(tmp_path), first)
    assert not seen


def test_score_variants_of_isstad_share_one_store(tree, tmp_path, seen):
    def variant(folder, pixel, image):
        detector = isstad.build(isstad.Config(pixel=pixel, image=image, sigma=1.0))
        return run(folder, files(tree), detector=detector, gallery=9)

    first = variant(tmp_path, "product", "product")
    assert seen == [4, 4]  # the four test images, and their pictures; no training image
    second = variant(tmp_path, "max", "weighted")
    assert seen == [4, 4]
    same(second, variant(None, "max", "weighted"))
    assert first.images != second.images
    assert len(list(tmp_path.iterdir())) == 2  # one folder of features, one of pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubled(Distance):
    """Likewise of the map that is twice as large."""

    layers: tuple[str, ...] = ("double",)

    def fit(self, source, *, mesh, key, progress, trained=None):
        rows = []
        for batch in source:
            assert set(batch.maps) == {"double"}
            rows.append(np.asarray(batch.maps["double"])[batch.valid].reshape(-1, 3))
        return {"mean": jnp.asarray(np.concatenate(rows).mean(0))}

    def score(self, state, features, *, mesh=None):
        return super().score(state, {"colour": features["double"]})


def test_detectors_of_other_layers_share_one_store(tmp_path, seen):
    plain = run(None, detector=Doubled())
    layers = ("colour", "double")
    run(tmp_path, cache_layers=layers)
    del seen[:]
    found = run(tmp_path, detector=Doubled(), cache_layers=layers)
    assert not seen
    same(found, plain)
    assert not stamp.differences(found.stamp, plain.stamp)
    run(tmp_path, detector=Doubled(), cache_layers=("double",))
    assert len(seen) == 5  # another program
    del seen[:]
    run(None, cache_layers=("nowhere",))  # without a store nothing is kept
    with pytest.raises(ConfigError, match=r"no feature map nowhere"):
        run(tmp_path, cache_layers=("nowhere",))


def test_class_tokens_are_kept_for_detectors_that_read_them(tmp_path):
    def names(layers):
        config = EvalConfig(image_size=16, feature_cache=str(tmp_path), cache_layers=layers)
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        device = Device(Coloured(), Distance(layers=("block2",)), config, mesh)
        frozen = device.frozen((), 1)  # for training steps: no more than the detector's own
        assert set(frozen(np.zeros((1, 16, 16, 3)), np.zeros(1))) == {"block2"}
        assert frozen.network.layers == ("block2",)
        return device._features.layers

    assert names(("cls", "block10")) == ("block10", "block2", "cls")
    assert names(()) == ("block2",)


def test_only_images_that_are_missing_are_computed(tmp_path):
    """Rows of a batch that are stored are used, others come from the network."""
    store = stored.FeatureStore(tmp_path, "f" * 64, {})
    values = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    kept = values + np.float32([0, 10, 0, 0])[:, None, None]
    rows = [stored.Found(f"image {i}", (60, 40 + i), None) for i in range(3)]
    store.save(rows[1], {"a": kept[1]})
    rows = [store.find(r.identity) or r for r in rows]
    made = store.complete(rows, lambda: {"a": values})
    np.testing.assert_array_equal(made["a"], kept)
    found = [store.find(r.identity) for r in rows]
    np.testing.assert_array_equal(store.complete(found, pytest.fail)["a"], kept[:3])
    assert [f.shape for f in found] == [(60, 40), (60, 41), (60, 42)]
    assert found[0].maps["a"].dtype == np.float32


# --- what is not the same -------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"backbone": Cells(jnp.float32(1.25))}, {"image_size": 20}],
    ids=["weight", "size"],
)
def test_anything_else_misses(tree, tmp_path, seen, other):
    run(tmp_path, files(tree))
    del seen[:]
    run(tmp_path, files(tree), backbone=Cells(jnp.float32(1.5), description="other text"))
    assert not seen
    same(run(tmp_path, files(tree), **other), run(None, files(tree), **other))
    assert seen == [4, 4] * 2


def test_whatever_changes_a_value_changes_the_fingerprint():
    @dataclasses.dataclass(frozen=True)
    class Objective:
        factor: float

        def features(self, params, extra, images, layers=None):
            found = images * params * self.factor + extra
            return {"a": found, "b": 2 * found}

    def fingerprint(
        factor=1.0, params=2.0, extra=1.0, mean=0.0, wrapped=0, layer="a", side=16, devices=1
    ):
        backbone = RunBackbone(
            params=jnp.float32(params), extra=jnp.float32(extra),
            function=Objective(factor).features, mean=(mean,) * 3, std=(1.0,) * 3, arch="a",
            image_size=None, description=f"{params}", stored=f"{params}",
        )  # fmt: skip
        backbone = Patches(encoder=backbone, size=8, stride=wrapped) if wrapped else backbone
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        extractor = Extractor((layer,), (side, side), mesh)
        extractor.use(backbone)
        return extractor.fingerprint()

    assert fingerprint() == fingerprint(devices=8)
    others = [
        {"factor": 2.0}, {"params": 1.0}, {"extra": 2.0}, {"params": 1.0, "extra": 2.0},
        {"mean": 0.5}, {"wrapped": 4}, {"wrapped": 8}, {"layer": "b"}, {"side": 24},
    ]  # fmt: skip
    assert len({fingerprint(), *(fingerprint(**keys) for keys in others)}) == 1 + len(others)


# --- data sets of files ---------------------------------------------------------------------


def test_files_are_not_decoded_again(tree, tmp_path, seen, monkeypatch):
    plain = run(None, files(tree), gallery=0)
    run(tmp_path, files(tree), gallery=0)
    del seen[:]
    decoded = []
    get = FileSource.__getitem__
    monkeypatch.setattr(
        FileSource, "__getitem__", lambda self, i: decoded.append(i) or get(self, i)
    )
    monkeypatch.setattr("dsad.evaluation.report.gallery.pictures", lambda *rest: {})
    moved = tmp_path / "elsewhere"
    shutil.copytree(tree, moved)  # other paths and times, the same bytes
    again = run(tmp_path, files(moved), gallery=0)
    assert not seen
    assert not decoded
    assert (again.mean, again.images) == (plain.mean, plain.images)
    assert again.categories["disc"]["features_from_cache"] == {"train": 3, "test": 4}


def test_a_changed_file_or_mask_counts(tree, tmp_path, seen):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    run(tmp_path / "store", files(root))
    del seen[:]
    trees.save(root / "disc/test/dent/001.png", trees.pixels(999))
    mask = trees.mask()
    mask[9:12] = 255
    trees.save(root / "disc/ground_truth/dent/000_mask.png", mask)
    found = run(tmp_path / "store", files(root))
    assert found.categories["disc"]["features_from_cache"] == {"train": 3, "test": 3}
    assert len(seen) == 1
    same(found, run(None, files(root)))


def test_faults_are_found_as_without_a_store(tree, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    run(tmp_path / "store", files(root))
    trees.save(root / "disc/ground_truth/dent/000_mask.png", trees.mask()[:-1])
    with pytest.raises(FaultError, match=r"000_mask.png: \[K2\]"):
        run(tmp_path / "store", files(root))
    shutil.copytree(tree, root, dirs_exist_ok=True)
    dented = root / "disc/test/good/000.png"
    trees.save(dented, trees.pixels(5), "RGBA")
    run(tmp_path / "store", files(root, lossy=("RGBA",)))
    with pytest.raises(FaultError, match=r"good/000.png: \[K3\]"):
        run(tmp_path / "store", files(root))
    source = support.subset(files(root).source("test", "disc"), ["disc/test/good/001.png"])
    (root / "disc/test/good/001.png").unlink()
    with pytest.raises(FaultError, match=r"good/001.png: \[K8\]"):
        stored.of_file(source, 0)


def test_one_detector_for_all_categories(tree, tmp_path, seen):
    both = {"dataset": files(tree, categories=()), "pooled": True}
    plain = run(None, **both)
    run(tmp_path, files(tree))
    del seen[:]
    again = run(tmp_path, **both)
    same(again, plain)
    counts = {c: again.categories[c]["features_from_cache"] for c in ("disc", "plate")}
    assert counts == {"disc": {"train": 3, "test": 4}, "plate": {"train": 0, "test": 0}}


# --- damage and refusals --------------------------------------------------------------------


def test_a_damaged_file_is_computed_again(tree, tmp_path, seen):
    first = run(tmp_path, files(tree))
    del seen[:]
    one = sorted(tmp_path.rglob("*.features"))[2]
    whole = one.read_bytes()
    one.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(RuntimeWarning, match=r"evaluation.feature_cache: .*features is damaged"):
        same(run(tmp_path, files(tree)), first)
    assert len(seen) == 1
    assert one.read_bytes() == whole
    assert not list(tmp_path.rglob(f"*{paths.TEMPORARY}"))


@pytest.mark.parametrize("end", [0, 20, 100, -1, None])
def test_any_damage_is_noticed(tmp_path, end):
    """Cut at any place or, for None, with one bit of the values changed."""
    store = stored.FeatureStore(tmp_path, "f" * 64, {})
    image = stored.Found("image", (2, 2), None)
    store.save(image, {"a": np.arange(99, dtype=np.float32)})
    (file,) = tmp_path.rglob("*.features")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= end is None
    file.write_bytes(content[:end])
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert store.find("image") is None


def test_two_that_write_at_once_leave_a_whole_file(tmp_path):
    def write(number):
        store = stored.FeatureStore(tmp_path, "f" * 64, {})
        for _ in range(20):
            store.save(stored.Found("image", (2, 2), None), {"a": np.full(999, number, np.float32)})
            found = store.find("image")
            assert found is not None
            assert found.maps["a"].min() == found.maps["a"].max()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert not list(tmp_path.rglob(f"*{paths.TEMPORARY}"))


def test_threads_that_read_at_once_all_succeed(tmp_path):
    """Python 3.11 fails in a few of a thousand readings where nothing keeps threads apart."""
    store = stored.FeatureStore(tmp_path, "0" * 64, {})
    maps = {f"layer{i}": np.full((2, 2), i, np.float32) for i in range(6)}
    store.save(stored.Found("x", (3, 4), None), maps)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            read = list(pool.map(store.find, ["x"] * 1500))
    finally:
        sys.setswitchinterval(interval)
    assert all(r.maps.keys() == maps.keys() and r.maps["layer5"][1, 1] == 5 for r in read)


def test_a_full_disk_names_the_key(tmp_path, monkeypatch):
    store = stored.FeatureStore(tmp_path, "f" * 64, {})

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(epath.Path, "write_bytes", full)
    message = r"features: .*No space left.*Free space.*evaluation.feature_cache can be deleted"
    with pytest.raises(WorkdirError, match=message):
        store.save(stored.Found("image", (2, 2), None), {"a": np.zeros(3, np.float32)})


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="feature_cache: expected a backbone that is a pytree"):
        run(tmp_path, backbone=Pooled())
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="about.json: cannot be written.*feature_cache"):
        run(tmp_path / "file")
    with pytest.raises(ConfigError, match="feature_cache: expected a folder of this machine"):
        run("gs://bucket/features")


def test_a_subset_offers_no_more_than_its_source(tree):
    planted = support.subset(Planted().source("test", "disc"), ["disc/test/good/001.png"])
    assert not hasattr(planted, "identity")
    assert stored.of_file(planted, 0) is None
    whole = files(tree).source("test", "disc")
    part = support.subset(whole, [whole.records[2].path])
    assert part.identity(0) == whole.identity(2) != whole.identity(1)
