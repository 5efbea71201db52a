"""Published data sets in miniature: by path, the files of a sound tree with its odd places.

Every tree has text files and strays as the published archives do; images are as in ``trees``, some
of them grey.
"""

import json
import pathlib
import random
import zlib
from collections.abc import Mapping

import numpy as np

from dsad.data.base import DataConfig
from tests.data import trees

#: Pixels of images and masks (h, w) or (h, w, 3), or the content of a file.
Files = dict[str, np.ndarray | str | bytes]
EMPTY = np.zeros((trees.HEIGHT, trees.WIDTH), np.uint8)


def images(paths: list[str], channels: int = 3) -> Files:
    """Different pixels for each path."""
    return {path: trees.pixels(zlib.crc32(path.encode()), channels) for path in paths}


def _numbered(folder: str, count: int, name: str = "{:03d}.png", channels: int = 3) -> Files:
    return images([f"{folder}/{name.format(i)}" for i in range(count)], channels)


def _splits(category: str, below: str = "", channels: int = 3) -> Files:
    """Training, validation and normal test images, whose stems repeat in every folder."""
    return {
        **_numbered(f"{category}/train/good{below}", 3, channels=channels),
        **_numbered(f"{category}/validation/good{below}", 2, channels=channels),
        **_numbered(f"{category}/test/good{below}", 2, channels=channels),
    }


def mvtec_ad2() -> Files:
    out: Files = {"can/license.txt": "CC BY-NC-SA 4.0"}
    for category, channels in {"can": 3, "vial": 1}.items():
        for split, count in (("train", 3), ("validation", 2)):
            name = f"{category}/{split}/good"
            out |= _numbered(name, count, "{:03d}_regular.png", channels)
        for light in ("regular", "underexposed", "shift_1"):
            for kind in ("good", "bad"):
                folder = f"{category}/test_public/{kind}"
                out |= _numbered(folder, 2, f"{{:03d}}_{light}.png", channels)
            for i in range(2):
                name = f"{category}/test_public/ground_truth/bad/{i:03d}_{light}_mask.png"
                out[name] = trees.mask()
        for split, light in (("test_private", "regular"), ("test_private_mixed", "mixed")):
            out |= _numbered(f"{category}/{split}", 2, f"{{:03d}}_{light}.png", channels)
    return out


DEFECTS = [
    {
        "defect_name": "missing", "pixel_value": 255, "saturation_threshold": 10,
        "relative_saturation": False,
    },
    {
        "defect_name": "scratch", "pixel_value": 254, "saturation_threshold": 0.5,
        "relative_saturation": True,
    },
]  # fmt: skip


def mvtec_loco() -> Files:
    out: Files = {}
    for category in ("pushpins", "screw_bag"):
        out |= _splits(category) | {f"{category}/defects_config.json": json.dumps(DEFECTS)}
        for kind in ("logical_anomalies", "structural_anomalies"):
            out |= _numbered(f"{category}/test/{kind}", 2)
            masks = f"{category}/ground_truth/{kind}"
            out[f"{masks}/000/000.png"] = trees.mask(255)
            out[f"{masks}/000/001.png"] = np.roll(trees.mask(254), 6, axis=0)
            out[f"{masks}/001/000.png"] = trees.mask(254)
    return out


def mvtec_3d() -> Files:
    out: Files = {"bagel/calibration/camera_parameters.json": "{}"}
    for category in ("bagel", "tire"):
        out |= _splits(category, "/rgb") | _numbered(f"{category}/test/hole/rgb", 2)
        for i in range(2):
            out[f"{category}/test/hole/gt/{i:03d}.png"] = trees.mask(1)
            out[f"{category}/test/good/gt/{i:03d}.png"] = EMPTY
            out[f"{category}/test/hole/xyz/{i:03d}.tiff"] = "depths"
            out[f"{category}/train/good/xyz/{i:03d}.tiff"] = "depths"
    return out


def btad() -> Files:
    out: Files = {}
    for category, image, mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        channels = 1 if category == "03" else 3
        name = f"{{:04d}}.{image}"
        out |= _numbered(f"{category}/train/ok", 3, name, channels)
        out |= _numbered(f"{category}/test/ok", 2, name, channels)
        out |= _numbered(f"{category}/test/ko", 2, name, channels)
        out |= {f"{category}/ground_truth/ko/{i:04d}.{mask}": trees.mask() for i in range(2)}
    out |= images(["02/test/ko/bmpng.png"]) | {"02/ground_truth/ko/bmpng.png": trees.mask()}
    return out


def mpdd() -> Files:
    return dict(trees.mvtec_files(("bracket_black", "tubes")))


def autovi() -> Files:
    out: Files = {"tank_screw/defects_config.json": json.dumps(DEFECTS)}
    for category in ("tank_screw", "pipe_clip"):
        out |= _numbered(f"{category}/train/good", 3, "{:04d}.png")
        out |= _numbered(f"{category}/test/good", 2, "{:04d}.png")
        out |= _numbered(f"{category}/test/missing", 2, "{:04d}.png")
        for i in range(2):
            out[f"{category}/ground_truth/missing/{i:04d}/0000.png"] = trees.mask()
    out["tank_screw/ground_truth/missing/0001/0001.png"] = np.roll(trees.mask(254), 6, axis=0)
    return out


def _dot() -> np.ndarray:
    """A mask with a single faint pixel, which no resize keeps."""
    out = EMPTY.copy()
    out[15, 23] = 1
    return out


def ksdd() -> Files:
    out: Files = {}
    for item in range(1, 7):
        for part in range(3):
            name = f"kos{item:02d}/Part{part}"
            out |= images([f"{name}.jpg"], 1)
            out[f"{name}_label.bmp"] = (trees.mask(), EMPTY, EMPTY)[part]
    out["kos01/Part0_label.bmp"] = _dot()
    return out


def ksdd2() -> Files:
    out: Files = {}
    for split, start in (("train", 10000), ("test", 20000)):
        for i in range(5):
            name = f"{split}/{start + i}"
            out |= images([f"{name}.png"])
            out[f"{name}_GT.png"] = trees.mask() if i == 0 else EMPTY
    out["test/20001_GT.png"] = _dot()
    out |= images(["train/10301.png", "train/10301 (copy).png"])
    out |= {"train/10301_GT.png": EMPTY, "train/10301_GT (copy).png": EMPTY}
    return out


def dagm() -> Files:
    out: Files = {}
    for category in ("Class1", "Class10"):
        for split in ("Train", "Test"):
            folder = f"{category}/{split}"
            out |= _numbered(folder, 4, "{:04d}.PNG", 1)
            out[f"{folder}/Label/0002_label.PNG"] = trees.mask()
            lines = ["1", *(f"{i}\t0\t{i:04d}.PNG\t0\t0" for i in (0, 1, 3))]
            lines.append("2\t1\t0002.PNG\t1\t0002_label.PNG")
            out[f"{folder}/Label/Labels.txt"] = "\n".join(lines)
    return out


TREES = {
    "mvtec_ad2": mvtec_ad2, "mvtec_loco": mvtec_loco, "mvtec_3d": mvtec_3d, "adam3d": mvtec_3d,
    "btad": btad, "mpdd": mpdd, "autovi": autovi, "ksdd": ksdd, "ksdd2": ksdd2, "dagm": dagm,
}  # fmt: skip


def write(
    name: str, root: pathlib.Path, *, order: int | None = None, more: Mapping = {}, less=(), **keys
) -> DataConfig:
    """Write the tree of a set with ``more`` files and without ``less``; its config.

    Files are made in an order shuffled by ``order``.
    """
    files = {path: c for path, c in {**TREES[name](), **more}.items() if path not in less}
    paths = list(files)
    if order is not None:
        random.Random(order).shuffle(paths)
    for path in paths:
        content = files[path]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str | bytes):
            (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            trees.save(root / path, content)
    return DataConfig(name=name, root=str(root), **keys)
