"""Oracle of the 2-class networks in float64, and labelled images of noise to train them on."""

import jax
import numpy as np

from dsad import models
from dsad.core.recipe import OptimConfig, Recipe
from dsad.evaluation.fitting import Labelled
from dsad.models import resnet
from tests.contracts.detectors import common

RECIPE = Recipe(
    steps=80, batch_size=8, optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip=1.0)
)
SMALL = {
    "layers": ("stem", "layer1"), "width": 4, "gamma": 0.0, "jitter": (0.0,) * 4, "recipe": RECIPE,
}  # fmt: skip
CONFIGS = [{**SMALL, "frozen": True}, {**SMALL, "alpha": 0.75, "gamma": 2.0, "flips": False}]
#: Its fit reads no features.
READS_SOURCE = False


def network():
    """One stage of a ResNet-18, random, for images in [0, 1]."""
    params, extra = jax.jit(resnet.resnet("resnet18", stages=1).init)(jax.random.key(5))
    return models.Backbone(
        params=params, extra=extra, arch="resnet18", options=(("stages", 1),), mean=(0, 0, 0),
        std=(1, 1, 1), description="random",
    )  # fmt: skip


def maps_of(seed, count):
    images = np.random.default_rng(seed).integers(0, 128, (count, 24, 20, 3), np.uint8)
    return {"pixels": np.float32(images) / 255}


def corrupted(maps):
    maps["pixels"][:, 8:16, 4:12] += 0.5
    return maps


def labelled_of(source):
    """The images of a source in the order of its samples, and each once more with a defect."""
    rows = {}
    for batch in source:
        for image, index in zip(batch.maps["pixels"], batch.index, strict=True):
            rows[int(index)] = np.array(image)
    normal = np.stack([rows[i] for i in sorted(rows) if i >= 0])
    mask = np.zeros(normal.shape[1:3], np.uint8)
    mask[8:16, 4:12] = 1
    for image in normal:
        yield Labelled(np.uint8(np.rint(255 * image)), 0, 0 * mask, True)
    for image in corrupted({"pixels": normal.copy()})["pixels"]:
        yield Labelled(np.uint8(np.rint(255 * image)), 1, mask, True)


def conv(x, kernel, stride=1):
    kernel, pad = np.float64(kernel), len(kernel) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijcd->bhwd", windows[:, ::stride, ::stride], kernel)


def norm(x, params, statistics):
    p, s = (jax.tree.map(np.float64, tree) for tree in (params, statistics))
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def pyramid(params, extra, images):
    x = norm(conv(images, params["conv1"]["kernel"], 2), params["norm1"], extra["norm1"])
    stem = np.maximum(x, 0)
    padded = np.pad(stem, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    x = windows[:, ::2, ::2].max((-2, -1))
    for block in ("layer1_block0", "layer1_block1"):
        p, e, y = params[block], extra[block], x
        y = np.maximum(norm(conv(y, p["conv1"]["kernel"]), p["norm1"], e["norm1"]), 0)
        x = np.maximum(x + norm(conv(y, p["conv2"]["kernel"]), p["norm2"], e["norm2"]), 0)
    return stem, x


def decoded(params, extra, stem, x, size):
    for name, beside in (("rise0", stem), ("rise1", None)):
        grid = size if beside is None else beside.shape[1:3]
        x = np.stack([common.upsampled(c, grid) for c in np.moveaxis(x, 3, 0)], axis=3)
        x = x if beside is None else np.concatenate([x, beside], axis=3)
        for i in ("1", "2"):
            x = conv(x, params[name][f"conv{i}"]["kernel"])
            x = np.maximum(norm(x, params[name][f"norm{i}"], extra[name][f"norm{i}"]), 0)
    return (x @ np.float64(params["head"]["kernel"][0, 0]) + np.float64(params["head"]["bias"]))[
        ..., 0
    ]


def oracle(config, state, test):
    images, statistics = np.float64(test["pixels"]), state["encoder_statistics"]
    classifier, segmenter = state["classifier"], state["segmenter"]
    _, deep = pyramid(classifier["encoder"], statistics, images)
    head = jax.tree.map(np.float64, classifier["head"])
    image = deep.mean((1, 2)) @ head["kernel"] + head["bias"]
    maps = pyramid(segmenter["encoder"], statistics, images)
    maps = decoded(segmenter["head"], state["decoder_statistics"], *maps, images.shape[1:3])
    return maps, image
