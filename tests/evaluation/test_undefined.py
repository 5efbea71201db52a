"""Numbers that are not defined are None with a reason; what is sure to fail is refused at once."""

import dataclasses
import json

import numpy as np
import pytest

from dsad.cli.evaluate import table, threshold_table
from dsad.core.config import resolve
from dsad.core.errors import ConfigError, DataError, MetricError
from dsad.core.types import Sample
from dsad.evaluation.localize import EvalConfig, read_results, write_results
from dsad.evaluation.numbers import measure
from dsad.evaluation.report.page import write_report
from dsad.evaluation.scored import Scored
from dsad.terminal import console
from tests.evaluation.test_localize import NUMBERS, Distance, Planted, PlantedSource
from tests.evaluation.test_support import run

IMAGE = {n for n in NUMBERS if n.startswith("image_")}
PIXEL = NUMBERS - IMAGE


class Partial(Planted):
    """Categories by what their test images lack: kinds to leave out, masks, defect pixels."""

    def __init__(self, **lacking):
        super().__init__(categories=tuple(lacking), strength=9)
        self.lacking = lacking

    def source(self, split, category=None):
        rows = [
            row for row in super().source(split, category).rows
            if split == "train" or row[1] not in self.lacking[row[0]]
        ]  # fmt: skip
        return PartialSource(self, split, rows)


class PartialSource(PlantedSource):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        lacking = self.owner.lacking[sample.record.category]
        if sample.record.label and "masks" in lacking:
            return dataclasses.replace(sample, mask=None)
        if "defects" in lacking:
            return dataclasses.replace(sample, mask=np.zeros_like(sample.mask))
        return sample


LACKING = {
    "whole": (), "unmasked": ("masks",), "empty": ("defects",), "good_only": ("red", "blue"),
    "bad_only": ("good",), "none": ("good", "red", "blue"),
}  # fmt: skip
NOTES = {
    "unmasked": ["no pixel numbers: no anomalous test image has a mask"],
    "empty": ["no pixel numbers: every mask of an anomalous test image is empty"],
    "good_only": ["no numbers: no anomalous test image"],
    "bad_only": ["no image numbers: no normal test image"],
    "none": ["no numbers: no test image"],
}
GIVEN = {
    "whole": NUMBERS, "unmasked": IMAGE, "empty": IMAGE, "good_only": set(), "bad_only": PIXEL,
    "none": set(),
}  # fmt: skip


@pytest.fixture(scope="module")
def partial():
    return run(Partial(**LACKING), false_alarm_rate=0.2, holdout=3, seeds=(0, 1))


def test_a_category_gives_the_numbers_that_it_defines(partial):
    alone = run(Partial(whole=()), false_alarm_rate=0.2, holdout=3, seeds=(0, 1))
    assert partial.categories["whole"].keys() == alone.categories["whole"].keys()
    for category, row in partial.categories.items():
        assert {m for m in NUMBERS if row[m] is not None} == GIVEN[category], category
        assert row.get("notes", []) == NOTES.get(category, [])
    for m in NUMBERS:
        rows = [partial.categories[c][m] for c in LACKING if m in GIVEN[c]]
        assert partial.mean[m] == pytest.approx(np.mean(rows), abs=1e-12)
        assert partial.mean_over[m] == len(rows) == (3 if m in IMAGE else 2)
    assert alone.mean_over == {}
    assert partial.kinds["bad_only"]["red"]["image_auroc"] is None
    assert partial.kinds["unmasked"]["red"]["pixel_ap"] is None
    assert partial.kinds["unmasked"]["red"]["image_ap"] == 1.0
    assert partial.std["categories"]["unmasked"]["pixel_ap"] is None
    assert partial.std["categories"]["unmasked"]["image_ap"] == 0.0


def test_pictures_without_pixel_numbers_are_ranked_by_score(partial):
    cases = partial.cases["unmasked"]
    defects = [n for section in ("missed", "worst", "median", "best") for n in cases[section]]
    assert sorted(defects) == list(range(5, 11))
    assert set(map(tuple, partial.cases["none"].values())) == {()}
    assert sorted(partial.cases["good_only"]["false_alarms"] + partial.cases["good_only"]["normal"])
    assert partial.scales["bad_only"]["p99_9"] > partial.scales["bad_only"]["median"] > 0


def test_good_pictures_alone_set_thresholds(partial):
    row = partial.thresholds["none"]["0"]
    assert row["image"] > 0
    assert row["pixel"] > 0
    assert row["image_recall"] is row["image_false_alarms"] is row["pixel_recall"] is None
    good = partial.thresholds["good_only"]["0"]
    assert 0 <= good["image_false_alarms"] <= 1
    assert good["image_recall"] is None
    assert partial.thresholds["unmasked"]["0"]["pixel_recall"] is None
    assert partial.thresholds["unmasked"]["0"]["image_recall"] == 1.0


def test_dashes_and_notes_reach_files_tables_and_report(partial, tmp_path, capsys):
    write_results(partial, tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["categories"]["unmasked"]["pixel_auroc"] is None
    assert read_results(tmp_path).mean_over == partial.mean_over
    out = console.console()
    out.print(table(partial))
    out.print(threshold_table(partial))
    text = capsys.readouterr().out
    assert "mean of image numbers over 3 of 6, of pixel numbers over 2 of 6 categories" in text
    assert "nan" not in text.lower()
    table_of = text[text.index("Thresholds from") :].splitlines()
    assert max(map(len, table_of)) <= 80
    lines = text.splitlines()
    rows = [i for i, line in enumerate(lines) if line.strip("│ ").startswith("none")]
    assert [lines[i].count("–") for i in (*rows, rows[1] + 1)] == [6, 2, 2]
    whole = run(Partial(**{c: () for c in LACKING}), false_alarm_rate=0.2, holdout=3, seeds=(0, 1))
    write_results(whole, tmp_path / "whole")
    runs = [("partial", tmp_path), ("whole", tmp_path / "whole")]
    page = write_report(tmp_path / "page.html", runs, allow_different=True).read_text()
    assert "mean of image numbers over 3 of 6" in page
    for notes in NOTES.values():
        assert f"partial: {notes[0]}." in page
    assert ">nan" not in page.lower()
    single = write_report(tmp_path / "single.html", [("partial", tmp_path)]).read_text()
    assert "Defects found: highest score" in single


def test_a_run_without_any_number_ends_well(tmp_path, capsys):
    results = run(Partial(none=LACKING["none"]))
    assert results.mean == dict.fromkeys(results.metric_names)
    assert results.mean_over == dict.fromkeys(results.metric_names, 0)
    assert results.categories["none"]["notes"] == NOTES["none"]
    write_results(results, tmp_path)
    assert "no test image" in write_report(tmp_path / "r.html", [("a", tmp_path)]).read_text()


def test_counting_gives_the_same_dashes():
    results = run(Partial(**LACKING), method="streaming")
    for category, row in results.categories.items():
        assert {m for m in NUMBERS if row[m] is not None} == GIVEN[category], category
        assert ("error_bound" in row) == bool(GIVEN[category] & PIXEL)


def test_masks_that_mark_everything_and_scores_that_are_not_finite():
    def scored(mask, top=2.0):
        maps = [np.array([[0.0, 1.0]], np.float32), np.array([[0.5, top]], np.float32)]
        masks = [None, np.asarray(mask)]
        return Scored(maps, masks, np.array([1.0, top]), np.array([0, 1]), ["good", "dent"])

    row, curves, notes = measure(scored([[True, True]]), EvalConfig(), "disc")
    assert notes == ["no pixel numbers: the masks mark every pixel of the test images"]
    assert (row["pixel_ap"], row["image_ap"], curves) == (None, 1.0, {})
    for mask in ([[False, True]], [[False, False]]):
        with pytest.raises(MetricError, match="category disc: scores: .* 1 NaN or infinite"):
            measure(scored(mask, np.nan), EvalConfig(), "disc")


# --- refused before anything is computed


class Unread(Planted):
    """A data set whose images must not be decoded."""

    def source(self, split, category=None):
        found = super().source(split, category)
        rows = found.rows[:1] if split == "train" and category == "few" else found.rows
        return UnreadSource(self, split, [] if category == "gone" and split == "train" else rows)


class UnreadSource(PlantedSource):
    def __getitem__(self, index) -> Sample:
        raise AssertionError("an image was decoded")


def built(name, **config):
    module = resolve("detectors", name)
    return module.build(module.Config(**config))


def test_what_is_sure_to_fail_is_refused_before_an_image_is_read():
    def refused(message, error=DataError, detector=None, **given):
        with pytest.raises(error, match=message):
            run(Unread(categories=("disc", "few", "gone")), detector, **given)

    refused("no training image in gone. Add")
    two = {"categories": ("disc", "few")}
    refused("at least 2 normal images, found 1 of few", detector=built("padim"), **two)
    refused("at least 2 normal images, found 1 of few", detector=built("fre"), **two)
    gde = built("gde", components=200)
    refused("at least 201 .*found 1 of few, 7 of disc", detector=gde, **two)
    refused("found 8 of all categories", detector=gde, pooled=True, **two)
    refused("single training image", ConfigError, false_alarm_rate=0.1, **two)


def test_a_pooled_detector_counts_all_images():
    results = run(
        Partial(a=(), b=()), dataclasses.replace(Least(), least=14), pooled=True, image_size=48
    )
    assert results.mean["image_auroc"] is not None
    with pytest.raises(DataError, match="at least 15"):
        run(Partial(a=(), b=()), dataclasses.replace(Least(), least=15), pooled=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Least(Distance):
    least: int = 1

    @property
    def traits(self):
        return dataclasses.replace(super().traits, least_images=self.least)


def test_maps_of_one_name_are_refused_before_an_image_is_read(tmp_path):
    class Twins(Unread):
        def source(self, split, category=None):
            found = super().source(split, category)
            found.records = [dataclasses.replace(r, path="a/0.png") for r in found.records]
            found.records[-1] = dataclasses.replace(found.records[-1], path="a/0.jpg")
            return found

    with pytest.raises(DataError, match=r"a/0\.png and a/0\.jpg would both"):
        run(Twins(), save_maps="png", folder=tmp_path)


# --- constant scores


class Even(Planted):
    """Images of one level, whatever their defects."""

    def __init__(self, level=0, **given):
        super().__init__(**given)
        self.level = level

    def source(self, split, category=None):
        return EvenSource(self, split, super().source(split, category).rows)


class EvenSource(PlantedSource):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dataclasses.replace(sample, image=np.full_like(sample.image, self.owner.level))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bordered(Distance):
    """A distance that depends on the place, as that of padded convolutions does."""

    def score(self, state, features, *, mesh=None):
        found = super().score(state, features)
        return found._replace(map=found.map + np.linspace(1, 2, 12)[None, None])


@pytest.mark.parametrize("method", ["exact", "streaming"])
@pytest.mark.parametrize("level", [0, 119])
def test_images_of_one_level_have_no_numbers(level, method):
    results = run(Even(level), method=method)
    assert results.mean == dict.fromkeys(results.metric_names)
    notes = results.categories["disc"]["notes"]
    assert [n[: n.index(" are ")] for n in notes] == [
        "no image numbers: all image scores", "no pixel numbers: all pixel scores",
    ]  # fmt: skip
    assert {x["pixel_auroc"] for x in results.images["disc"]} == {None}
    assert results.curves == {}
    assert results.kinds["disc"]["red"] == {**dict.fromkeys(results.metric_names), "images": 3}


def test_one_map_for_all_images_has_no_pixel_numbers():
    alike = run(Even(7), Bordered()).categories["disc"]
    assert alike["notes"][1] == "no pixel numbers: all images have the same anomaly map"
    assert alike["notes"][0].startswith("no image numbers: all image scores are")
    assert run(Planted(strength=1), Bordered()).categories["disc"].get("notes") is None


def test_scores_are_constant_up_to_rounding_and_no_further():
    def notes(steps):
        """Of scores around 1 that differ by so many units in the last place of the largest."""
        tops = np.float32(1) + np.arange(4, dtype=np.float32) % 2 * steps * np.spacing(
            np.float32(1)
        )
        maps = [np.full((2, 3), top, np.float32) + np.eye(2, 3, dtype=np.float32) for top in tops]
        masks = [np.eye(2, 3, dtype=bool) * bool(i > 1) for i in range(4)]
        given = Scored(maps, masks, tops, np.array([0, 0, 1, 1]), ["good"] * 2 + ["dent"] * 2)
        row, _, found = measure(given, EvalConfig(), "disc")
        assert (row["image_auroc"] is None) == any("no image" in n for n in found)
        assert (row["pixel_auroc"] is None) == any("no pixel" in n for n in found)
        return len(found)

    # The maps reach 2, whose last place is worth two of 1.
    assert [notes(steps) for steps in (0, 8, 9, 16, 18)] == [2, 2, 1, 1, 0]
