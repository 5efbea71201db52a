"""Miniature data sets on disk: 24×16 images, non-square so that swapped axes show."""

import csv
import io
import json
import pathlib
import random
import tarfile

import numpy as np
from PIL import Image

from dsad.core.batch import BatchSpec, Needs
from dsad.data.base import DataConfig
from dsad.data.facts import fields
from dsad.data.mtd import group_list

WIDTH, HEIGHT = 24, 16


def pixels(seed: int, channels: int = 3) -> np.ndarray:
    """Random (16, 24, channels) uint8; no two seeds alike."""
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8)


def mask(value: int = 255) -> np.ndarray:
    """A mask (16, 24) with a 3×5 region of ``value``."""
    out = np.zeros((HEIGHT, WIDTH), np.uint8)
    out[4:7, 10:15] = value
    return out


def save(file: pathlib.Path, array: np.ndarray, mode: str | None = None) -> pathlib.Path:
    """Write an array as an image, converted to ``mode`` if given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array.squeeze())
    (image.convert(mode) if mode else image).save(file)
    return file


def mvtec_files(categories=("disc", "plate")) -> list[tuple[str, np.ndarray]]:
    """Paths and contents of a sound tree: per category 3 train, 2 good, 2 anomalous images."""
    files = []
    for c, category in enumerate(categories):
        seed = 100 * c
        for i in range(3):
            files.append((f"{category}/train/good/{i:03d}.png", pixels(seed + i)))
        for i in range(2):
            files.append((f"{category}/test/good/{i:03d}.png", pixels(seed + 10 + i)))
            files.append((f"{category}/test/dent/{i:03d}.png", pixels(seed + 20 + i)))
            files.append((f"{category}/ground_truth/dent/{i:03d}_mask.png", mask()))
    return files


def mvtec(root: pathlib.Path, *, order: int | None = None, **kwargs) -> DataConfig:
    """Write the sound tree, files in an order shuffled by ``order``; its config."""
    files = mvtec_files()
    if order is not None:
        random.Random(order).shuffle(files)
    for path, array in files:
        save(root / path, array)
    return DataConfig(name="mvtec", root=str(root), **kwargs)


def folder(root: pathlib.Path, **kwargs) -> DataConfig:
    """Write two categories, one of them with folders inside; the config."""
    for i, path in enumerate(("ant/1.png", "ant/old/1.png", "ant/old/raw/2.JPEG", "bee/1.jpg")):
        save(root / path, pixels(i))
    return DataConfig(name="folder", root=str(root), **kwargs)


def labelled(root: pathlib.Path, **kwargs) -> DataConfig:
    """Write good and bad images of two categories, with masks, under awkward names; the config."""
    for c, category in enumerate(("Teil ä", "part [2]")):
        for i in range(5):
            suffix = ("png", "JPG", "tiff", "bmp", "jpeg")[i]
            save(root / "gut" / category / f"ok ({i}) ü.{suffix}", pixels(100 * c + i))
        for kind in ("dent", "Riß #1"):
            for i in range(2):
                save(
                    root / "bad" / category / kind / f"{i} !.png",
                    pixels(1000 + 100 * c + 10 * len(kind) + i),
                )
                save(root / "masks" / category / kind / f"{i} !_mask.png", mask())
    places = {"normal": "gut", "abnormal": "bad", "masks": "masks"}
    return DataConfig(name="folder", root=str(root), **{**places, **kwargs})


def good_and_bad(root: pathlib.Path, good: int = 10, bad: int = 2) -> None:
    """Images directly in the folders good and bad."""
    for folder, count in (("good", good), ("bad", bad)):
        for i in range(count):
            save(root / folder / f"{i}.png", pixels(i + 100 * (folder == "bad")))


def jpeg(seed: int) -> bytes:
    """The content of a JPEG file of random pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "JPEG")
    return file.getvalue()


def imagenet_files() -> dict[str, bytes]:
    """Three images in each of two classes, by path."""
    names = [f"{wnid}/{wnid}_{i}.JPEG" for wnid in ("n00000002", "n00000010") for i in (7, 30, 100)]
    return {name: jpeg(i) for i, name in enumerate(names)}


def tar(contents: dict[str, bytes]) -> bytes:
    """A tar of files, in the order of the dict."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def class_tars() -> dict[str, bytes]:
    """The tars per class of ImageNet in miniature, by name."""
    found: dict[str, dict[str, bytes]] = {}
    for path, data in imagenet_files().items():
        wnid, _, name = path.partition("/")
        found.setdefault(wnid, {})[name] = data
    # The published tars are in no order, nor are the files in them.
    return {f"{w}.tar": tar(dict(reversed(files.items()))) for w, files in reversed(found.items())}


def imagenet(root: pathlib.Path, kind: str = "tar", **kwargs) -> DataConfig:
    """Write ImageNet in miniature as one ``tar`` of tars, as ``tars`` or as a ``folder``."""
    root.mkdir(parents=True, exist_ok=True)
    files = {"tar": {"ILSVRC2012_img_train.tar": tar(class_tars())}, "tars": class_tars()}
    for name, data in files.get(kind, imagenet_files()).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return DataConfig(name="imagenet", root=str(root), **kwargs)


def mtd(root: pathlib.Path, paths: list[str]) -> None:
    """Grey images and anti-aliased masks beside them for paths such as MT_Fray/Imgs/x.jpg."""
    for i, path in enumerate(paths):
        save(root / path, pixels(i, 1))
        grey = np.zeros((HEIGHT, WIDTH), np.uint8)
        if not path.startswith("MT_Free/"):
            grey[4:7, 10:15] = 200
            grey[3, 10:15] = 127  # the soft edge: not above the threshold
        save((root / path).with_suffix(".png"), grey)


def mtd_grouped(root: pathlib.Path) -> None:
    """The complete tree of the shipped group list, in miniature."""
    mtd(root, list(group_list()))


def realiad_items(category: str) -> dict[str, list[tuple[str, str, str]]]:
    """Object, class and path of every view: three OK objects and two NG ones, whose C4 and C5 see
    no defect. Some published names have two underscores.
    """
    objects = {
        "train": ["OK/S0001", "OK/S0002"],
        "test": ["OK/S0003", "NG/BX/S0001", "NG/AK/S0001"],
    }
    items: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
    for split, places in objects.items():
        for place in places:
            kind, number = place.rpartition("/")[0], place[-4:]
            for view in range(1, 6):
                score = "__" if kind == "NG/AK" else "_"
                name = f"{category}{score}{number}_{kind.replace('/', '_')}_C{view}_20231021130235"
                code = kind[3:] if kind != "OK" and view < 4 else "OK"
                items[split].append((place, code, f"{place}/{name}.jpg"))
    return items


def realiad(
    root: pathlib.Path, name: str = "realiad", categories=("audiojack", "zipper"), **kwargs
) -> DataConfig:
    """Write Real-IAD in miniature, in the release of 512 pixels, with both lists; the config."""
    for c, category in enumerate(categories):
        items = realiad_items(category)
        for i, (_, code, path) in enumerate(items["train"] + items["test"]):
            file = root / "realiad_512" / category / path
            save(file, pixels(1000 * c + i))
            if code != "OK":
                save(file.with_suffix(".png"), mask(1 + i))  # any value but 0 is a defect
        for family, views in (("realiad_jsons", "12345"), ("realiad_jsons_sv", "1")):
            content: dict = {"meta": {"prefix": f"{category}/", "normal_class": "OK"}}
            for split, rows in items.items():
                content[split] = [
                    {
                        "category": category, "anomaly_class": code, "image_path": path,
                        "mask_path": None if code == "OK" else path[:-4] + ".png",
                    }
                    for _, code, path in reversed(rows) if path.split("_C")[1][0] in views
                ]  # fmt: skip
            file = root / "realiad_jsons" / family / f"{category}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
    return DataConfig(name=name, root=str(root), **kwargs)


def realiad_variety(root: pathlib.Path, categories=("3_adapter", "ball_pin"), **kwargs):
    """Write Real-IAD Variety in miniature: PNG images, masks by the list, words for classes."""
    for c, category in enumerate(categories):
        content: dict = {"meta": {"prefix": f"{category}/", "normal_class": "OK"}}
        places = {"train": ("OK/S0001",), "test": ("OK/S0002", "NG/Porosity/S0001")}
        for split, objects in places.items():
            items = content[split] = []
            seed = 100 * c + (50 if split == "test" else 0)
            for i, (place, view) in enumerate((p, v) for p in objects for v in "12345"):
                path = f"{place}/{category}_{place[-4:]}_C{view}_2024.png"
                save(root / "realiadvariety_raw" / category / path, pixels(seed + i))
                masked = place.startswith("NG") and view < "4"  # the others do not see the defect
                mask_path = f"{path[:-4]}_mask.png" if masked else None
                if mask_path:
                    save(root / "realiadvariety_raw" / category / mask_path, mask(3))
                items.append({
                    "category": category, "image_path": path, "mask_path": mask_path,
                    "anomaly_class": "porosity" if place.startswith("NG") else "OK",
                })  # fmt: skip
        file = root / "realiadvariety_jsons/Real-IAD_Variety_jsons" / f"{category}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return DataConfig(name="realiad_variety", root=str(root), **kwargs)


def visa_rows(setup: str = "1cls", categories=("candle", "pcb1")) -> list[dict[str, str]]:
    """Rows of a CSV file: by object 5 normal images and 3 anomalous ones, whose names they share.

    The setups of two classes train on an anomalous one too.
    """
    rows = []
    for category in categories:
        for i in range(5):
            rows.append({
                "object": category, "split": "train" if i < 3 else "test", "label": "normal",
                "image": f"{category}/Data/Images/Normal/{i:03d}.JPG", "mask": "",
            })  # fmt: skip
        for i in range(3):
            rows.append({
                "object": category, "split": "train" if setup != "1cls" and not i else "test",
                "label": "anomaly", "image": f"{category}/Data/Images/Anomaly/{i:03d}.JPG",
                "mask": f"{category}/Data/Masks/Anomaly/{i:03d}.png",
            })  # fmt: skip
    return rows


def visa_csv(root: pathlib.Path, setup: str, rows: list[dict[str, str]]) -> None:
    """Write the CSV file of a setup, with the line ends of the published ones."""
    file = root / "split_csv" / f"{setup}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)


def visa(root: pathlib.Path, name: str = "visa", **kwargs) -> DataConfig:
    """Write VisA in miniature with its three setups; masks hold numbers of classes."""
    for setup in ("1cls", "2cls_highshot", "2cls_fewshot"):
        visa_csv(root, setup, visa_rows(setup))
    for i, row in enumerate(visa_rows()):
        save(root / row["image"], pixels(i))
        if row["mask"]:
            save(root / row["mask"], mask(1 + i % 9))
    return DataConfig(name=name, root=str(root), **kwargs)


def deeppcb(root: pathlib.Path, **kwargs) -> DataConfig:
    """Write DeepPCB in miniature: two training pairs and two for the test, one of them in RGB."""
    group = root / "PCBData" / "group00041"
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for i in range(4):
        name = f"0004100{i}"
        for k, what in enumerate(("test", "temp")):
            save(group / f"00041/{name}_{what}.jpg", pixels(10 * i + k, 3 if i == 2 else 1))
        boxes = "10 4 15 7 3\n" + ("1 1 3 2 6\n" if i == 3 else "")
        (group / "00041_not").mkdir(exist_ok=True)
        (group / "00041_not" / f"{name}.txt").write_text(boxes)
        line = f"group00041/00041/{name}.jpg group00041/00041_not/{name}.txt"
        lines["trainval" if i < 2 else "test"].append(line)
    for name, listed in lines.items():
        (root / "PCBData" / f"{name}.txt").write_text("\n".join(listed) + "\n")
    return DataConfig(name="deeppcb", root=str(root), **kwargs)


def dtd(root: pathlib.Path, name: str = "dtd", **kwargs) -> DataConfig:
    """Write DTD in miniature: three images of two textures, two of each in the list of split 1."""
    for c, texture in enumerate(("banded", "dotted")):
        for i in range(3):
            save(root / "images" / texture / f"{texture}_{i:04d}.jpg", pixels(10 * c + i))
    (root / "labels").mkdir()
    listed = [
        f"{texture}/{texture}_{i:04d}.jpg" for texture in ("banded", "dotted") for i in (0, 2)
    ]
    (root / "labels/train1.txt").write_text("\n".join(listed) + "\n")
    return DataConfig(name=name, root=str(root), **kwargs)


def kaputt_rows(split: str) -> list[dict]:
    """Rows of a table: by material two good images and a damaged one, each of an item."""
    rows = []
    for material in ("bag", "box"):
        for i in range(3):
            name = f"{split}-{material}-{i}"
            rows.append({
                "capture_id": name, "query_image": f"data/{split}/query-data/image/{name}.jpg",
                "defect": i == 2, "major_defect": False, "item_material": material,
                "defect_types": "penetration,spillage" if i == 2 else "",
                "item_identifier": f"item {name}",
            })  # fmt: skip
    return rows


def kaputt(root: pathlib.Path, name: str = "kaputt", **kwargs) -> DataConfig:
    """Write Kaputt in miniature, crops and whole images; it has no masks of defects."""
    from pyarrow import Table, parquet

    root.mkdir(parents=True, exist_ok=True)
    for s, split in enumerate(("train", "validation", "test")):
        rows = kaputt_rows(split)
        parquet.write_table(Table.from_pylist(rows), root / f"query-{split}.parquet")
        for i, row in enumerate(rows):
            for k, kind in enumerate(("crop", "image")):
                file = root / f"data/{split}/query-data/{kind}/{row['capture_id']}.jpg"
                save(file, pixels(100 * s + 10 * i + k))
    return DataConfig(name=name, root=str(root), **{"missing_masks": "image_only", **kwargs})


def batch_spec(side, facts=(), **needs):
    """What batches of canvases of a side hold."""
    asked = Needs(facts=tuple(facts), **needs)
    return BatchSpec(canvas=side, needs=asked, facts=fields(asked.facts))
