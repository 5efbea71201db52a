"""Probes by labels: splits, both probes against other libraries, and the command as a whole."""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from dsad.assembly import label_probe as assembled
from dsad.cli import main
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Record, Sample
from dsad.evaluation import label_probe, label_results, linear_probe
from dsad.evaluation.label_probe import EncodeConfig, ProbeConfig, Split
from dsad.evaluation.label_vectors import Encoder, Kept, layer_of
from tests.backbones import Plain, static
from tests.data import trees

CLASSES, DEPTH = 7, 12


def blobs(count, seed=0, spread=0.8):
    """Vectors (count, 12) f32 around a centre for each of 7 classes, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, DEPTH))
    labels = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, count - CLASSES)])
    noise = rng.normal(size=(count, DEPTH))
    return (spread * centres[labels] + noise + 3).astype(np.float32), labels.astype(np.int32)


# --- linear probe


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_linear_probe_is_that_of_scikit_learn(devices, strength, monkeypatch):
    monkeypatch.setattr(linear_probe, "LOGITS", 1)  # more than one block, the last one padded
    (train, known), (test, true) = blobs(530), blobs(211, seed=1)
    standard, peer = linear_probe.Standard.of(train), StandardScaler().fit(train.astype(float))
    rows = standard(train)
    np.testing.assert_allclose(rows, peer.transform(train.astype(float)), atol=1e-5)
    fitted = linear_probe.fit(
        rows, known, CLASSES, strength=strength, iterations=500,
        mesh=make_mesh(MeshConfig(), devices),
    )  # fmt: skip
    oracle = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(rows.astype(float), known)
    assert fitted.converged
    np.testing.assert_allclose(fitted.weights, oracle.coef_.T, atol=1e-3)
    # No penalty bends the loss along the intercepts: what float32 leaves of the gradient moves
    # them further, newer compilers by 1.7e-3, and hardly changes a probability.
    np.testing.assert_allclose(fitted.intercepts, oracle.intercept_, atol=5e-3)
    told = label_probe.by_linear(fitted, standard(test), true, CLASSES)
    chances = oracle.predict_proba(standard(test).astype(float))
    np.testing.assert_array_equal(told.named, chances.argmax(1))
    np.testing.assert_allclose(told.share, chances.max(1), atol=1e-3)
    rank = np.sum(chances > chances[np.arange(len(true)), true][:, None], axis=1)
    np.testing.assert_array_equal(told.rank, rank)


def test_a_fit_that_was_cut_short_says_so():
    train, known = blobs(200)
    rows = linear_probe.Standard.of(train)(train)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    reports = []
    fit = functools.partial(linear_probe.fit, rows, known, CLASSES, strength=100.0, mesh=mesh)
    fitted = fit(iterations=2, progress=lambda *about: reports.append(about))
    assert not fitted.converged
    assert [done for done, _, _ in reports] == [1, 2, 2]
    again = fit(iterations=2)
    np.testing.assert_array_equal(again.weights, fitted.weights)


def test_a_channel_that_does_not_vary_is_no_noise():
    rows = np.full((50, 2), 0.1, np.float32)
    rows[:, 1] = np.arange(50)
    rows[::2, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    units = linear_probe.Standard.of(rows)(rows)
    assert np.abs(units[:, 0]).max() < 1e-6
    assert units[:, 1].std() == pytest.approx(1)


# --- k-NN probe


def voted(train, known, test, k, temperature):
    """Votes (m, c) by the definition, in float64."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    cosine = test @ train.T
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(test), CLASSES))
    for i, row in enumerate(near):
        for j in row:
            votes[i, known[j]] += np.exp((cosine[i, j] - cosine[i].max()) / temperature)
    return votes


@pytest.mark.parametrize("temperature", [0.07, 1e-3])
def test_neighbours_vote_by_cosine_and_temperature(devices, temperature, monkeypatch):
    monkeypatch.setattr(label_probe, "SCORES", CLASSES * 64)  # several blocks, the last one smaller
    (train, known), (test, true) = blobs(400), blobs(150, seed=1)
    mesh = make_mesh(MeshConfig(), devices) if len(devices) > 1 else None
    told = label_probe.by_neighbours(
        train, known, test, true, CLASSES, k=20, temperature=temperature, mesh=mesh
    )
    votes = voted(train.astype(float), known, test.astype(float), 20, temperature)
    np.testing.assert_array_equal(told.named, votes.argmax(1))
    np.testing.assert_allclose(told.share, votes.max(1) / votes.sum(1), rtol=1e-3)
    right = votes[np.arange(len(true)), true]
    rank = np.where(right > 0, np.sum(votes > right[:, None], axis=1), CLASSES)
    if temperature > 0.01:  # below that float32 drops the votes of all but the nearest
        np.testing.assert_array_equal(told.rank, rank)
        assert told.top(5) == np.mean(rank < 5) < np.mean(right > 0)
    assert told.top(1) == np.mean(votes.argmax(1) == true) > 0.5


def test_a_class_without_a_vote_is_not_among_the_five_best():
    train, known = np.eye(3, dtype=np.float32), np.array([0, 1, 2])
    test, true = np.array([[1, 0.1, 0]] * 3, np.float32), np.array([0, 1, 3])
    told = label_probe.by_neighbours(train, known, test, true, 6, k=2, temperature=0.07)
    assert told.named.tolist() == [0, 0, 0]
    assert told.rank.tolist() == [0, 1, 6]


def test_chance_names_the_most_frequent_training_classes():
    vectors, labels = blobs(90)
    labels = np.sort(labels)
    split = Split(np.arange(0, 90, 2), np.arange(1, 90, 2))
    config, mesh = ProbeConfig(k=60), make_mesh(MeshConfig(), jax.devices()[:1])
    probed = label_probe.probe(vectors, labels, split, CLASSES, config, mesh=mesh)
    counts = collections.Counter(labels[split.train].tolist())
    frequent = sorted(range(CLASSES), key=lambda c: (-counts[c], c))
    true = labels[split.test]
    expected = [np.mean([c in frequent[:n] for c in true]) for n in (1, 5)]
    np.testing.assert_allclose(probed.chance, expected)
    assert probed.k == len(split.train) == 45
    assert label_probe.tops(4) == (1,)


# --- splits


def records(sizes):
    """Normal images, groups of three and lone ones in turn."""
    rows = []
    for category, count in sizes.items():
        for i in range(count):
            group = "" if i % 2 else f"{i // 6}"
            path = f"{category}/{i:03d}.png"
            rows.append(Record(path=path, category=category, label=0, kind="good", group=group))
    return rows


SIZES = {"cap": 60, "disc": 33, "ring": 12}


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_each_class_is_split_by_its_share_and_no_group_is(share):
    rows = records(SIZES)
    split = label_probe.drawn(rows, share, seed=3)
    assert sorted([*split.train, *split.test]) == list(range(len(rows)))
    sides = [{(rows[i].category, rows[i].group or rows[i].path) for i in part} for part in split]
    assert not sides[0] & sides[1]
    for category, count in SIZES.items():
        tested = sum(rows[i].category == category for i in split.test)
        assert 0 <= tested - round((1 - share) * count) <= 2  # the rest of the last group


def test_the_split_follows_the_seed_and_not_the_order():
    rows = records(SIZES)
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    split, other = label_probe.drawn(rows, 0.8, 1), label_probe.drawn(mixed, 0.8, 1)
    assert {rows[i].path for i in split.test} == {mixed[i].path for i in other.test}
    assert split.sha256(rows) == other.sha256(mixed)
    assert split.sha256(rows) != label_probe.drawn(rows, 0.8, 2).sha256(rows)


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(DataError, match=r"at least 2 classes, found 1: cap.*categories"):
        label_probe.classes_of(records({"cap": 9}))
    with pytest.raises(DataError, match="at least 2 normal training images.*1 of disc, ring"):
        label_probe.classes_of(records({"cap": 9, "disc": 1, "ring": 1}))
    alike = [dataclasses.replace(r, group="a") if r.category == "ring" else r
             for r in records(SIZES)]  # fmt: skip
    with pytest.raises(DataError, match=r"nothing is left to learn from of ring"):
        label_probe.drawn(alike, 0.8, 0)


# --- vectors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coloured(Plain):
    """Maps and a class token that are easy to tell."""

    weight: jax.Array = dataclasses.field(default_factory=lambda: jnp.float32(2))
    tokens: tuple[str, ...] = static(default=("cls",))

    def maps(self, images):
        cells = self.weight * images[:, ::4, ::4]
        return {"block2": images, "block10": cells, "cls": jnp.max(images, axis=(1, 2))}

    def __call__(self, images):
        maps = self.maps(images)
        return {n: maps[n] for n in self.layers or ("block2", "block10")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Red(Coloured):
    """One channel of them, by which not every class is told."""

    def maps(self, images):
        return {name: x[..., :1] for name, x in super().maps(images).items()}


class Pictures:
    """Random pictures 16 × 16."""

    def __init__(self, count):
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
        self.records = records({"a": count})

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return Sample(record=self.records[i], image=self.pixels[i], mask=None)


def test_vectors_are_means_over_cells_or_the_class_token(devices):
    mesh, config = make_mesh(MeshConfig(), devices), EncodeConfig(image_size=16, batch_size=4)
    source, backbone = Pictures(11), Coloured()
    assert layer_of(backbone, "", (16, 16)) == "block10"
    units = (source.pixels / 255.0 - 0.5) / 0.25
    means = 2 * units[:, ::4, ::4].mean((1, 2))
    np.testing.assert_allclose(Encoder(backbone, "block10", config, mesh)(source), means, atol=1e-5)
    token = Encoder(backbone, "cls", config, mesh)
    assert token.pooling == "class token"
    np.testing.assert_allclose(token(source), units.max((1, 2)), atol=1e-5)
    with pytest.raises(ConfigError, match=r"probe\.layer: plain has no feature map 'block3'.*cls"):
        layer_of(backbone, "block3", (16, 16))


def test_kept_vectors_are_those_of_the_same_images_and_weights(tmp_path, monkeypatch):
    from etils import epath

    monkeypatch.setattr("dsad.evaluation.label_vectors.PART", 4)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config, source = EncodeConfig(image_size=16, batch_size=4), Pictures(11)
    kept = Kept(epath.Path(tmp_path), "version 1")

    def encoded(backbone, kept):
        notes = []
        encoder = Encoder(backbone, "block10", config, mesh)
        vectors = encoder(source, kept, lambda done, total, note: notes.append(note))
        return vectors, notes.count("encoded before")

    first, before = encoded(Coloured(), kept)
    assert before == 0
    next((tmp_path / "vectors").iterdir()).write_bytes(b"damaged")
    again, before = encoded(Coloured(), kept)
    assert before == 2
    np.testing.assert_array_equal(first, again)
    other, before = encoded(Coloured(weight=jnp.float32(3)), kept)
    assert before == 0
    np.testing.assert_allclose(other, 1.5 * first, rtol=1e-5)
    assert encoded(Coloured(), kept._replace(version="version 2"))[1] == 0
    kept.remove()
    assert not list(tmp_path.iterdir())


# --- the command


def command(*argv):
    return main.main(["evaluate", "--config=probe:smoke", *argv])


def test_the_command_measures_goes_on_and_reports(tmp_path, capsys, monkeypatch):
    # ResNet-18 would take ten seconds to compile.
    monkeypatch.setattr(assembled.runs, "backbone", lambda *_: Red(image_size=16))
    out, argv = tmp_path / "out", ["--config.seeds=(0, 3)"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(label_probe, "probe", stop)
        assert command(*argv, f"--workdir={out}") == 130
    assert command(*argv, "--config.probe.k=3", f"--workdir={out}") == 2
    assert "config.probe.k: 5 → 3" in capsys.readouterr().err
    assert command(*argv, f"--workdir={out}", "--name=colours") == 0
    text = capsys.readouterr().out
    assert "encoding: 40/40 encoded before" in text
    assert "5 classes, 30 training and 10 test images of each seed" in text
    results = json.loads((out / "results.json").read_text())
    assert set(results["mean"]) == {
        f"{p}_top{n}" for p in ("linear", "knn", "chance") for n in (1, 5)
    }
    assert results["mean"]["chance_top1"] == pytest.approx(0.2)
    assert results["mean"]["linear_top1"] == np.mean(
        [seed["linear_top1"] for seed in results["seeds"].values()]
    )
    assert f"{results['mean']['linear_top1']:.3f}" in text
    rights = sum(row["test"] * row["linear"] for row in results["classes"].values())
    assert rights / 20 == pytest.approx(results["mean"]["linear_top1"])
    wrong = sum(count for *_, count in results["confusions"]["linear"])
    assert wrong == pytest.approx(20 - rights)
    stamp = results["stamp"]
    assert (stamp["layer"], stamp["seeds"], stamp["knn"]["k"]) == ("block10", [0, 3], 5)
    assert {p.name for p in out.iterdir()} == {"config.json", "mistakes.npz", "results.json"}
    # Uninterrupted the numbers are the same.
    assert command(*argv, f"--workdir={tmp_path / 'whole'}") == 0
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert (whole["mean"], whole["classes"]) == (results["mean"], results["classes"])
    capsys.readouterr()
    assert command(*argv, f"--workdir={out}") == 2
    assert "in use" in capsys.readouterr().err
    assert main.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert f"linear probe {results['mean']['linear_top1']:.1%}" in page
    assert "colours" in page
    for row in results["mistakes"]:
        assert row["path"] in page
    assert page.count("data:image/jpeg") == len(results["mistakes"]) > 0
    assert main.main(["report", str(out), str(tmp_path / "whole")]) == 2


def test_the_test_split_of_the_data_and_what_the_command_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(assembled.runs, "backbone", lambda *_: Red(image_size=16))
    flag = f"--workdir={tmp_path / 'out'}"
    for argv, said in (
        (["--config.probe.split=data", "--config.seeds=(0, 1)"], "config.seeds: expected one"),
        (["--config.data.categories=('tiles',)"], "at least 2 classes, found 1: tiles"),
        (["--config.data.synthetic.train=1"], "at least 2 normal training images"),
        (["--config.probe.layer=layer9"], "no feature map 'layer9'. It has: block2, block10, cls"),
        (["--config.probe.split=data", "--config.data.synthetic.good=0"], 'Take "drawn"'),
        (["--save_model=models/x"], "--save_model"),
        (["--config.data.name=run"], "no run to take the data"),
    ):
        assert command(*argv, flag) == 2, argv
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command("--config.probe.split=data", "--config.probe.k=90", flag) == 0
    results = label_results.read(tmp_path / "out")
    assert results.counts == {"train": "40", "test": "10", "k": "40"}
    assert results.std == {}
    assert "of 90 neighbours asked for there are 40" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_for_each_class(tmp_path, capsys):
    for name in ("left", "right"):
        for i in range(6):
            picture = trees.pixels(i).copy()
            half = slice(0, 12) if name == "left" else slice(12, 24)
            picture[:, half] = 0
            trees.save(tmp_path / "pictures" / name / f"{i}.png", picture)
    argv = [
        "--config=probe", "--config.backbone=squeezenet1_1", "--config.weights=random",
        "--config.data.name=folder", f"--config.data.root={tmp_path / 'pictures'}",
        "--config.evaluation.image_size=64", f"--workdir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert main.main(["evaluate", *argv]) == 0
    results = label_results.read(tmp_path / "out")
    assert list(results.classes) == ["left", "right"]
    assert results.tops == (1,)
    assert main.main(["report", str(tmp_path / "out")]) == 0
