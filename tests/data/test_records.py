"""Records: bytes as in the files, the same training to the last bit, and what is refused."""

import dataclasses
import io
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dsad.core.batch import zeros
from dsad.core.errors import ConfigError, DataError, WorkdirError
from dsad.data import records, records_builder
from dsad.data.base import DataConfig, SyntheticConfig, load
from dsad.data.canvases import place
from dsad.data.checks import check
from dsad.data.pipeline import make_pipeline
from tests.data import trees

FACTS = ("foreground_box", "foreground_box_published", "original_size")


def prepared(config, out, *, side=0, **kwargs):
    """Write records and give the config that reads them."""
    records_builder.write(records_builder.plan(load(config), side), str(out), **kwargs)
    return DataConfig(name="records", root=str(out), canvas=side or config.canvas)


def tree(root):
    """The MVTec layout, with one image larger than any canvas of these tests."""
    config = trees.mvtec(root, canvas=20)
    large = np.kron(trees.pixels(9), np.ones((3, 2, 1), np.uint8))
    trees.save(root / "disc/train/good/009.png", large)
    return config


@pytest.fixture
def files(tmp_path):
    return tree(tmp_path / "files")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "records"


def test_bytes_are_those_of_the_files(files, out):
    made = load(prepared(files, out))
    root, data = out.parent / "files", load(files)
    for split in ("train", "test"):
        source = made.source(split)
        assert source.records == data.source(split).records
        for i, record in enumerate(source.records):
            assert source.encoded(i) == (root / record.path).read_bytes()
            assert source.identity(i) == data.source(split).identity(i)
            assert [f.parent for f in source.files(i) if f.is_file()] == [out]
            if record.masks:
                files = [(root / path).read_bytes() for path in record.masks]
                assert source.encoded_masks(i) == files
            for a, b in zip(_arrays(source[i]), _arrays(data.source(split)[i]), strict=True):
                np.testing.assert_array_equal(a, b)
    assert made.protocol == data.protocol


def _arrays(sample):
    return sample.image, sample.mask


def test_another_reader_finds_the_same(files, out):
    """What is written is a data set of tensorflow-datasets like any other."""
    import tensorflow_datasets as tfds

    prepared(files, out)
    assert "tensorflow" not in sys.modules
    source = tfds.builder_from_directory(out / records.FOLDER).as_data_source(split="train")
    expected = load(files).source("train")
    assert len(source) == len(expected) == 7
    for i, example in enumerate(source):
        assert example["path"].decode() == expected.records[i].path
        np.testing.assert_array_equal(example["image"], expected[i].image)


def batches(config, count=5, **kwargs):
    source = load(config).source("train")
    made = make_pipeline(
        source, trees.batch_spec(config.canvas, FACTS), batch_size=4, seed=3, **kwargs
    )
    iterator = made.iterator()
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return made.store, found


def same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if name == "facts":
            same(value, right[name])
        else:
            assert value.dtype == right[name].dtype
            np.testing.assert_array_equal(value, right[name])


@pytest.mark.parametrize("side", [0, 20])
def test_training_from_records_is_training_from_files(files, out, side):
    made = prepared(files, out, side=side)
    for cache in ("device", "host", "none"):
        store, expected = batches(files, cache=cache)
        found_store, found = batches(made, cache=cache)
        for a, b in zip(expected, found, strict=True):
            same(a, b)
        if store:
            same(store, found_store)


def test_canvases_are_decoded_once(files, out):
    made = load(prepared(files, out, side=20))
    assert made.about["counts"] == {"train": 7}
    source = made.source("train")
    shutil.rmtree(out.parent / "files/disc")  # the files are not needed any more
    for i, record in enumerate(source.records):
        if record.path.startswith("plate"):
            original = np.asarray(Image.open(out.parent / "files" / record.path))
            placed = zeros(trees.batch_spec(20).read, 1)["image"][0]
            size = place(original, placed)
            np.testing.assert_array_equal(source.example(i)["canvas"], placed)
            np.testing.assert_array_equal(source[i].image, placed[: size[0], : size[1]])


def test_canvases_refuse_what_they_do_not_hold(files, out):
    config = prepared(files, out, side=20)
    with pytest.raises(
        ConfigError, match=r"canvas: 32, but .* canvases of 20. Train with --config.data.canvas=20"
    ):
        batches(dataclasses.replace(config, canvas=32), cache="none")
    with pytest.raises(
        ConfigError, match=r"of the train images alone, not of the test images. Take the files .*fi"
    ):
        load(config).source("test")
    with pytest.raises(
        ConfigError, match=r"lossy=\('CMYK',\): the canvases were decoded with \(\)"
    ):
        load(dataclasses.replace(config, lossy=("CMYK",)))
    about = (out / records.ABOUT).read_text().replace('"foreground_box"', '"of_old"')
    (out / records.ABOUT).write_text(about)
    with pytest.raises(ConfigError, match="without the facts foreground_box"):
        batches(config, cache="host")


def test_a_source_goes_to_other_processes(files, out):
    for side in (0, 20):
        source = load(prepared(files, out, side=side, overwrite=True)).source("train", "plate")
        source[0]  # readers that are open are not taken along
        again = pickle.loads(pickle.dumps(source))
        assert again.records == source.records
        np.testing.assert_array_equal(again[2].image, source[2].image)


def test_a_category_has_the_split_of_its_files(files, out):
    made = prepared(files, out)
    for name in ("disc", "plate"):
        part = load(dataclasses.replace(made, categories=(name,)))
        direct = load(dataclasses.replace(files, categories=(name,)))
        assert part.protocol["split_hash"] == direct.protocol["split_hash"]
        assert part.source("train").records == direct.source("train").records
        np.testing.assert_array_equal(part.source("test")[1].image, direct.source("test")[1].image)


def test_lossy_modes_stay_the_readers_choice(tmp_path, out):
    root = tmp_path / "files"
    trees.folder(root)
    rgba = np.concatenate([trees.pixels(0), np.full((16, 24, 1), 9, np.uint8)], -1)
    trees.save(root / "ant/2.png", rgba)
    made = prepared(DataConfig(name="folder", root=str(root)), out)
    source = load(made).source("train")
    position = [r.path for r in source.records].index("ant/2.png")
    with pytest.raises(DataError, match=r"ant/2.png: \[K3\] image mode RGBA"):
        source[position]
    allowed = load(dataclasses.replace(made, lossy=("RGBA",)))
    np.testing.assert_array_equal(allowed.source("train")[position].image, rgba[..., :3])
    assert allowed.protocol["lossy"] == ["RGBA"]


def test_missing_masks_stay_the_readers_choice(files, out):
    (out.parent / "files/disc/ground_truth/dent/001_mask.png").unlink()
    made = prepared(dataclasses.replace(files, missing_masks="image_only"), out)
    with pytest.raises(DataError, match=r"disc/test/dent/001.png: \[K1\] anomalous image without"):
        load(made)
    source = load(dataclasses.replace(made, missing_masks="image_only")).source("test", "disc")
    assert [source[i].mask is None for i in range(4)] == [False, True, False, False]


def test_masks_keep_their_rule(tmp_path, out):
    """Anti-aliased masks, binarised above 127: the rule of magnetic tiles comes along."""
    paths = ["MT_Blowhole/Imgs/a.jpg", "MT_Break/Imgs/b.jpg", "MT_Crack/Imgs/c.jpg",
             "MT_Fray/Imgs/d.jpg", "MT_Uneven/Imgs/e.jpg",
             *(f"MT_Free/Imgs/{i}.jpg" for i in range(6))]  # fmt: skip
    trees.mtd(tmp_path / "files", paths)
    config = DataConfig(name="mtd:random", root=str(tmp_path / "files"))
    made, direct = load(prepared(config, out)).source("test"), load(config).source("test")
    assert sum(r.label for r in made.records) == 5
    for i in range(len(made)):
        np.testing.assert_array_equal(made[i].mask, direct[i].mask)


def test_canvases_of_what_has_no_files(out):
    config = DataConfig(synthetic=SyntheticConfig(size=24, train=2, good=1, bad=1))
    with pytest.raises(
        ConfigError, match=r"images of synthetic are no files to copy. .* --canvas=SIDE"
    ):
        records_builder.plan(load(config))
    made = load(prepared(config, out, side=16))
    assert len(made.source("train")) == 10
    assert made.origin == (
        f"records of canvases of 16 px (10 train) prepared from synthetic in no folder, "
        f"split {load(config).protocol['split_hash']}"
    )


def test_shards_hold_consecutive_rows():
    sizes = np.asarray([5, 5, 5, 1, 20, 1, 1])
    found = records_builder.shard_rows(sizes, 10)
    assert [list(rows) for rows in found] == [[0, 1], [2, 3, 4], [5, 6]]
    assert [list(r) for r in records_builder.shard_rows(np.asarray([3]), 10)] == [[0]]


def test_order_goes_on_over_shards(files, out, monkeypatch):
    monkeypatch.setattr(records_builder.shard_rows, "__defaults__", (1,))
    made = load(prepared(files, out))
    assert len(list((out / records.FOLDER).glob("*train*"))) == 7
    source = made.source("train")
    for i, record in enumerate(source.records):
        assert source.encoded(i) == (out.parent / "files" / record.path).read_bytes()


# --- what is refused ------------------------------------------------------------------------


def test_nothing_is_overwritten(files, out):
    prepared(files, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(WorkdirError, match=r"in use. Replace its records with --overwrite"):
        prepared(files, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    prepared(files, out, side=20, overwrite=True)
    assert records.read_about(out)["canvas"] == 20
    assert sorted(p.name for p in out.parent.iterdir()) == ["files", "records"]
    other = out.parent / "files"
    with pytest.raises(WorkdirError, match="holds files but no records"):
        prepared(files, other, overwrite=True)
    with pytest.raises(WorkdirError, match="expected a directory, found a file"):
        prepared(files, other / "disc/train/good/000.png")
    with pytest.raises(ConfigError, match="--out=DIR is missing"):
        prepared(files, "")
    with pytest.raises(ConfigError, match="expected a local folder"):
        prepared(files, "gs://bucket/records")


def test_a_broken_image_leaves_nothing_behind(files, out):
    prepared(files, out)
    broken = out.parent / "files/plate/train/good/001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"plate/train/good/001.png: \[K8\]"):
        prepared(files, out, side=20, overwrite=True)
    assert records.read_about(out)["canvas"] == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["files", "records"]


def test_room_is_asked_for_first(files, out, monkeypatch):
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WorkdirError, match=r"needed, 1 kB free. Make room"):
        prepared(files, out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["files"]


def test_a_place_that_takes_no_folder(files):
    with pytest.raises(WorkdirError, match=r"/proc/records: cannot be written"):
        prepared(files, "/proc/records")


def test_a_full_disk_while_writing(files, out, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records_builder, "_file_example", full)
    with pytest.raises(
        WorkdirError, match=r"disk or quota is full.*No space left on device.*is unchanged"
    ):
        prepared(files, out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["files"]


def test_faults_of_the_index_are_refused(files, out):
    (out.parent / "files/disc/ground_truth/dent/001_mask.png").unlink()
    with pytest.raises(DataError, match=r"\[K1\]"):
        prepared(files, out)


def test_damaged_records_are_named(files, out):
    config = prepared(files, out)
    index = records.index_file(out, "train")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(
        DataError, match=r"000.png: \[K8\] record 1 is that of disc/.*/001.*in .*-00000-of"
    ):
        load(config).source("train")[1]
    index.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=r"index-train.jsonl: \[K8\] 6 lines for 7 records"):
        load(config)
    index.write_text("".join(lines))
    (shard,) = (out / records.FOLDER).glob("*train*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{shard.name}: \[K8\] [\d,]+ bytes of {len(content):,}"):
        load(config)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}: \[K8\] missing"):
        load(config)
    shutil.rmtree(out / "dsad_records")
    with pytest.raises(DataError, match=r"records: 2 faults\n.*train.*missing[^\0]*test.*missing"):
        load(config)
    (out / records.ABOUT).write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99; this dsad reads 4"):
        load(config)
    (out / records.ABOUT).unlink()
    with pytest.raises(DataError, match=r"dsad_records.json is missing; expected a folder written"):
        load(config)
    with pytest.raises(DataError, match="does not exist"):
        load(dataclasses.replace(config, root=str(out / "gone")))


def test_damaged_bytes_are_found(files, out, monkeypatch):
    """By the full check without an image that shows it, and when they are read; the file named."""
    monkeypatch.setattr(records_builder.shard_rows, "__defaults__", (1,))
    config = prepared(files, out)
    assert check(config).ok
    names = []
    for number in (2, 5):
        (shard,) = (out / records.FOLDER).glob(f"*train*-{number:05d}-of-*")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        names.append(f"{records.FOLDER}/{shard.name}")
    faults = [f for f in check(config).faults if f.severity == "error"]
    assert [f.path for f in faults if "SHA-256" in f.message] == names
    source = load(config).source("train")
    for number, name in zip((2, 5), names, strict=True):
        with pytest.raises(DataError, match=rf"\[K8\] record {number} .*{name}"):
            source[number]


# --- a preparation that is stopped ----------------------------------------------------------

STOPPED = """
import os, signal, sys
from dsad.data import record_shards, records_builder
from dsad.data.base import DataConfig, load
root, out, last = sys.argv[1:]
made = records_builder._file_example
def example(source, index, canvas):
    if source.records[index].path == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return made(source, index, canvas)
records_builder._file_example, record_shards.THREADS = example, 1
records_builder.shard_rows.__defaults__ = (1,)
config = DataConfig(name="mvtec", root=root, canvas=20)
records_builder.write(records_builder.plan(load(config)), out)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Where a preparation of the fixture ``files`` was killed at its sixth image, each a shard."""
    place = tmp_path_factory.mktemp("killed")
    last = load(tree(place / "files")).source("train").records[5].path
    command = [sys.executable, "-c", STOPPED, str(place / "files"), str(place / "records"), last]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    return place


@pytest.fixture
def stopped(killed, tmp_path, monkeypatch):
    """A copy of it, and the config of its files."""
    monkeypatch.setattr(records_builder.shard_rows, "__defaults__", (1,))
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".records.incomplete", "files"]
    return DataConfig(name="mvtec", root=str(tmp_path / "files"), canvas=20)


def resumed(files, out, monkeypatch):
    """What is written once more, what is said, and the data set."""
    seen, said, made = [], [], records_builder._file_example

    def example(source, index, canvas):
        seen.append(source.records[index].path)
        return made(source, index, canvas)

    monkeypatch.setattr(records_builder, "_file_example", example)
    counted = []
    config = prepared(
        files, out, say=said.append, progress=lambda done, total, _: counted.append((done, total))
    )
    assert counted[-1] == (15, 15)
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    assert {p.name for p in out.iterdir()} == {
        "dsad_records", records.ABOUT, "index-train.jsonl", "index-test.jsonl"
    }  # fmt: skip
    found, direct = load(config), load(files)
    assert check(config).ok
    for split in ("train", "test"):
        for a, b in zip(found.source(split), direct.source(split), strict=True):
            assert a.record == b.record
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.mask, b.mask)
    return seen, said


def test_a_killed_preparation_goes_on(stopped, out, monkeypatch):
    before = [r.path for r in load(stopped).source("train").records][:5]
    seen, said = resumed(stopped, out, monkeypatch)
    assert len(seen) == 10
    assert not set(seen) & set(before)
    assert said == ["5 of 15 shards taken over from before."]


def test_what_changed_since_is_written_again(stopped, out, monkeypatch):
    """An image of other pixels, and a shard that was damaged."""
    root, first = out.parent / "files", load(stopped).source("train").records[0].path
    trees.save(root / first, trees.pixels(77))
    shard = next(out.parent.rglob("*-00003-of-*"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    seen, said = resumed(stopped, out, monkeypatch)
    assert len(seen) == 12
    assert first in seen
    assert said == [
        "3 of 15 shards taken over from before, 1 not: their images or the settings changed."
    ]


def test_another_preparation_takes_nothing_over(stopped, out, monkeypatch):
    said = []
    made = load(prepared(dataclasses.replace(stopped, categories=("plate",)), out, say=said.append))
    assert said[0].startswith("0 of 7 shards taken over from before, 5 not")
    assert made.categories == ("plate",)
    assert sorted(p.name for p in out.parent.iterdir()) == ["files", "records"]


def test_a_fault_leaves_what_is_complete(files, out, monkeypatch):
    monkeypatch.setattr(records_builder.shard_rows, "__defaults__", (1,))
    made, said = records_builder._file_example, []
    broken = load(files).source("test").records[2].path

    def example(source, index, canvas):
        if source.records[index].path == broken:
            raise OSError(28, "No space left on device")
        return made(source, index, canvas)

    with monkeypatch.context() as patch:
        patch.setattr(records_builder, "_file_example", example)
        with pytest.raises(WorkdirError, match="disk or quota is full"):
            prepared(files, out, say=said.append)
    part = out.with_name(".records.incomplete")
    assert said == [f"9 complete shards stay in {part} for the same command."]
    seen, said = resumed(files, out, monkeypatch)
    assert len(seen) == 6


def test_one_preparation_at_a_time(files, out):
    with (
        records_builder._claimed(out),
        pytest.raises(WorkdirError, match="another dsad prepare is writing it"),
    ):
        prepared(files, out)
    prepared(files, out, overwrite=True)


def test_the_missing_extra_names_its_command(files, out, monkeypatch):
    config = prepared(files, out)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "dsad\[records\]"'):
        load(config)


def test_jpeg_is_not_encoded_again(tmp_path, out):
    root = tmp_path / "files"
    trees.folder(root)
    file = io.BytesIO()
    Image.fromarray(trees.pixels(5)).save(file, "JPEG", quality=40, comment=b"kept")
    (root / "bee/2.jpg").write_bytes(file.getvalue())
    source = load(prepared(DataConfig(name="folder", root=str(root)), out)).source("train", "bee")
    assert source.encoded(1) == file.getvalue()


def test_progress_counts_the_files_of_both_splits_from_the_start(tmp_path):
    seen = []
    dataset = load(trees.mvtec(tmp_path))  # per category 3 to train on, 4 to test
    records_builder.plan(dataset, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(i, 14) for i in range(15)]
