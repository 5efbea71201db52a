"""The peer of ``dsad bench input`` and ``bench views``: the same views, made on the host.

With torchvision the transforms are torchvision's own on PIL images, as published DS2 and MoCo code
has them; without it the same operations from Pillow and numpy. Blur is Pillow's, which is faster
than a convolution. ``batches`` gives DS2's two views of every sample from a torch DataLoader, each
a normalised float32 array (3, side, side).
"""

import dataclasses
import importlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from dsad.augment.views import ViewConfig
from dsad.bench._measure import installed
from dsad.objectives.ds2 import Config

View = Callable[[Image.Image], Any]


@dataclasses.dataclass
class Blur:
    """Gaussian blur of a random width in pixels."""

    sigma: tuple[float, float]

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def torchvision_view(config: ViewConfig) -> View:
    """The view as a torchvision transform."""
    t: Any = importlib.import_module("torchvision.transforms")
    return t.Compose(
        [
            t.RandomResizedCrop(config.side, scale=config.area, ratio=config.aspect),
            t.RandomHorizontalFlip(config.flip),
            t.RandomApply([t.ColorJitter(*config.jitter)], config.jitter_probability),
            t.RandomGrayscale(config.grey_probability),
            t.RandomApply([Blur(config.blur)], config.blur_probability),
            t.ToTensor(),
            t.Normalize(config.mean, config.std),
        ]
    )


@dataclasses.dataclass
class PillowView:
    """The same view without torchvision."""

    config: ViewConfig

    def __call__(self, image: Image.Image) -> np.ndarray:
        config = self.config
        box = _crop(image.size, config)
        side = (config.side, config.side)
        image = image.resize(side, Image.Resampling.BILINEAR, box=box)
        if random.random() < config.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < config.jitter_probability:
            image = _jitter(image, config.jitter)
        if random.random() < config.grey_probability:
            image = image.convert("L").convert("RGB")
        if random.random() < config.blur_probability:
            image = Blur(config.blur)(image)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (config.mean, config.std))
        return (pixels - mean) / std


def _crop(size: tuple[int, int], config: ViewConfig) -> tuple[float, float, float, float]:
    """A box of random area and aspect, or the largest one in the middle after ten failures."""
    width, height = size
    for _ in range(10):
        area = random.uniform(*config.area) * width * height
        aspect = math.exp(random.uniform(*map(math.log, config.aspect)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            return x, y, x + w, y + h
    ratio = min(max(width / height, config.aspect[0]), config.aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _jitter(image: Image.Image, jitter: tuple[float, float, float, float]) -> Image.Image:
    makers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in random.sample(range(4), 4):
        if kind < 3:
            factor = random.uniform(max(0.0, 1 - jitter[kind]), 1 + jitter[kind])
            image = makers[kind](image).enhance(factor)
        else:
            hue, *rest = image.convert("HSV").split()
            shift = np.uint8(round(random.uniform(-jitter[3], jitter[3]) * 255) % 256)
            hue = Image.fromarray(np.asarray(hue) + shift)
            image = Image.merge("HSV", (hue, *rest)).convert("RGB")
    return image


class TwoViews:
    """Random access to pairs of views of image files: a torch map-style data set."""

    def __init__(self, files: Sequence[str], config: Config):
        make = torchvision_view if installed("torchvision") else PillowView
        self.files = list(files)
        self.views = [make(view) for view in (config.view1, config.view2)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        with Image.open(self.files[index]) as image:
            pixels = image.convert("RGB")
        return self.views[0](pixels), self.views[1](pixels)


def one_thread(number: int) -> None:
    """For worker processes: torch's own threads would fight over the cores."""
    del number
    importlib.import_module("torch").set_num_threads(1)


def batches(files: Sequence[str], config: Config, batch: int, workers: int) -> Iterator[Any]:
    """Endless shuffled batches of a torch DataLoader."""
    data: Any = importlib.import_module("torch.utils.data")
    one_thread(0)
    loader = data.DataLoader(
        TwoViews(files, config), batch_size=batch, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0, worker_init_fn=one_thread,
        multiprocessing_context="spawn" if workers else None,  # forking under JAX may hang
    )  # fmt: skip
    while True:
        yield from loader
