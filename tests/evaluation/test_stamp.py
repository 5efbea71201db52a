"""The stamp says what a number means; differences say where two of them part."""

import dataclasses
import json

import jax
import numpy as np

from dsad.core.types import Record
from dsad.evaluation import stamp
from dsad.evaluation.localize import EvalConfig
from tests.evaluation.test_localize import Distance, Planted, Pooled


def made(dataset=None, detector=None, key=0, config=None, **details):
    dataset = dataset or Planted()
    return stamp.make_stamp(
        dataset,
        dataset.categories,
        config=config or EvalConfig(),
        detector=detector or Distance(),
        backbone=Pooled(),
        key=jax.random.key(key),
        details=details,
    )


def test_the_stamp_holds_the_protocol_and_is_json():
    mark = made()
    assert json.loads(json.dumps(mark)) == mark
    assert mark["dataset"]["name"] == "planted"
    assert len(mark["dataset"]["records_sha256"]) == 64
    assert (mark["pixels"], mark["normals"], mark["connectivity"]) == ("original", "included", 8)
    assert mark["fpr_limit"] == 0.3
    known = {"method": "stretched", "height": 224, "width": 224}
    assert known.items() <= mark["preprocessing"].items()
    assert mark["detector"]["config"] == {"layers": ["colour"], "power": 1.0, "sigma": 1.0}
    assert mark["backbone"] == {"arch": "plain", "weights": "none"}
    assert mark["smoothing"] == {"gaussian_sigma_px": 1.0}
    assert mark["code"]["dsad"]
    assert mark["jax"] == jax.__version__
    assert mark["seed"] == [0, 0]


def test_details_are_merged():
    mark = made(backbone={"run": "A", "step": np.int64(30)}, note=("x", 1))
    assert mark["backbone"] == {"arch": "plain", "weights": "none", "run": "A", "step": 30}
    assert mark["note"] == ["x", 1]


def test_backbone_seed_and_date_are_no_difference():
    other = made(key=7, backbone={"run": "B"}) | {"date": "2001-01-01", "code": {}, "jax": "0"}
    assert stamp.differences(made(), other) == []


def test_every_change_of_meaning_is_named():
    def names(**change):
        return [line.partition(":")[0] for line in stamp.differences(made(), made(**change))]

    assert names(detector=Distance(power=2.0)) == ["detector.config.power"]
    assert names(config=EvalConfig(fpr_limit=0.05)) == ["fpr_limit"]
    smoothed = ["detector.config.sigma", "smoothing.gaussian_sigma_px"]
    assert names(detector=Distance(sigma=2.0)) == smoothed
    assert names(config=EvalConfig(align_corners=True)) == ["upsampling"]
    assert names(config=EvalConfig(batch_size=8, workers=1)) == []
    assert names(config=EvalConfig(image_size=96)) == [
        "preprocessing.height",
        "preprocessing.width",
    ]
    assert names(dataset=Planted(good=4)) == ["dataset.records_sha256"]
    assert names(extra="field") == ["extra"]
    line = stamp.differences(made(), made(extra="field"))[0]
    assert line == "extra: '(absent)' against 'field'"


def test_the_split_hash_ignores_order_and_sees_every_field():
    base = Record(path="a.png", category="c", label=0, kind="good")
    other = dataclasses.replace(base, path="b.png")
    value = stamp.records_hash({"train": [base], "test": [other]})
    assert value == stamp.records_hash({"test": [other], "train": [base]})
    two = stamp.records_hash({"train": [base, other]})
    assert two == stamp.records_hash({"train": [other, base]})
    assert value != two
    for change in ({"path": "x"}, {"label": 1}, {"kind": "k"}, {"masks": ("m",)}):
        changed = dataclasses.replace(base, **change)
        assert stamp.records_hash({"train": [changed], "test": [other]}) != value


def test_old_and_new_keys():
    assert stamp.key_data(jax.random.PRNGKey(5)) == stamp.key_data(jax.random.key(5)) == [0, 5]


def test_what_a_model_saw_is_a_change_of_meaning_and_its_size_is_not():
    def names(**change):
        return [line.partition(":")[0] for line in stamp.differences(made(), made(**change))]

    assert "sRGB" in made()["colour"]
    assert names(model="one for all categories") == ["model"]
    assert names(support={"shots": 2}) == ["support", "support.shots"]
    assert names(thresholds={"false_alarm_rate": 0.1}) == [
        "thresholds",
        "thresholds.false_alarm_rate",
    ]
    assert names(detector_state={"disc": {"bytes": 7}}) == []


def test_unlike_detectors_differ_by_name_not_by_every_setting():
    one = {"detector": {"name": "knn", "config": {"k": 1}}, "layers": ["layer2"]}
    other = {"detector": {"name": "padim", "config": {"ridge": 0.01}}, "layers": ["layer2"]}
    assert stamp.differences(one, other) == ["detector.name: 'knn' against 'padim'"]
