"""Oracle of ISSTAD's scores: scipy's Gaussian and sorting, in float64."""

import math

import numpy as np
from scipy import ndimage

SHARP = {"sigma": 1.0}
OWN = (("other", 0.9, 3.0, 3.0), ("tiles", 0.5, 2.0, 0.01))
CONFIGS = [
    SHARP,
    {},
    {"scale": 255.0, "sigma": 0.0},
    {**SHARP, "pixel": "alpha", "image": "alpha", "alpha": 0.3},
    {**SHARP, "pixel": "max", "image": "weighted", "q": 0.07, "a": 0.1},
    {**SHARP, "image": "weighted", "exponents": OWN},
]
SYMBOLIC = True
READS_SOURCE = False


def maps_of(seed, count):
    """Probabilities and errors of 12 × 10 pixels, low and noisy."""
    rng = np.random.default_rng(seed)
    make = lambda low, high: rng.uniform(low, high, (count, 12, 10, 1)).astype(np.float32)  # noqa: E731
    return {"probability": make(0.05, 0.3), "error": make(0.01, 0.04), "block0": make(0, 1)}


def corrupted(maps):
    maps["probability"][:, 4:8, 2:6] += 0.6
    maps["error"][:, 4:8, 2:6] += 0.2
    return maps


def oracle(config, normal, test):
    maps, images = [], []
    q, a, b = (config.get(n, v) for n, v in (("q", 0.1), ("a", 1.0), ("b", 1.0)))
    for name, *own in config.get("exponents", ()):
        q, a, b = own if name == "tiles" else (q, a, b)
    alpha = config.get("alpha", 0.5)

    def smooth(image):
        sigma = config.get("sigma", 4.0)
        return ndimage.gaussian_filter(image, sigma, mode="reflect", truncate=4.0)

    def top(image):
        return np.mean(np.sort(image, axis=None)[::-1][: math.ceil(round(q * image.size, 9))])

    for p, r in zip(*(np.float64(test[n][..., 0]) for n in ("probability", "error")), strict=True):
        n = (r - r.min()) / (r.max() - r.min())
        mixed = alpha * smooth(p) + (1 - alpha) * smooth(n)
        maps.append(
            {
                "product": smooth(config.get("scale", 1.0) * p * n),
                "alpha": mixed,
                "max": np.maximum(smooth(p), smooth(n)),
            }[config.get("pixel", "product")]
        )
        images.append(
            {
                "product": np.mean(smooth(smooth(p) * smooth(r))),
                "alpha": np.mean(mixed),
                "weighted": (1 + top(smooth(p))) ** a * (1 + top(smooth(r))) ** b,
            }[config.get("image", "product")]
        )
    return np.array(maps), np.array(images)
