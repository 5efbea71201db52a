"""Miniature data sets on disk: 24×16 images, non-square so that swapped axes show."""

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


def batch_spec(side, facts=(), **needs):
    """What batches of canvases of a side hold."""
    asked = Needs(facts=tuple(facts), **needs)
    return BatchSpec(canvas=side, needs=asked, facts=fields(asked.facts))
