"""PatchCore on a ResNet in plain torch, the peer of ``dsad bench predict``."""

import concurrent.futures
import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dsad.assembly.model import FittedModel
from dsad.models.weights import export


class TorchPatchCore:
    """Score and map on the pixels of a file, with the weights, bank and threads of a fitted model.

    Batch norms are multiplied into their convolutions, features lie channels last, and the search
    is a matrix product per image: what is fastest in plain torch on CPUs.
    """

    def __init__(self, model: FittedModel) -> None:
        self.torch = torch = importlib.import_module("torch")
        torch.set_num_threads(os.cpu_count() or 1)
        network: Any = model.backbone
        weights: Any = export.as_weights(network)
        self._mean, self._std = (
            torch.tensor(x).reshape(1, 3, 1, 1) * 255 for x in (weights.mean, weights.std)
        )
        self._convolutions = _folded(torch, weights.tensors)
        self.layers = model.detector.layers
        state = model.fitted.state
        self.bank = torch.from_numpy(np.array(state["bank"][: int(state["rows"])]))
        self._halves = (self.bank * self.bank).sum(1) / 2
        self._side, self._workers = model.evaluation.image_size, model.evaluation.workers
        sigma = model.detector.traits.sigma
        self._reach = int(4 * sigma + 0.5)
        taps = torch.exp(-0.5 * (torch.arange(-self._reach, self._reach + 1) / sigma) ** 2)
        self._taps = (taps / taps.sum()).reshape(1, 1, 1, -1)

    def many(self, files: Sequence[str], batch: int) -> Iterator[tuple[float, np.ndarray]]:
        """Score and map (h, w) of every file, decoded ahead by threads."""
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            read = pool.map(self._read, files)
            for start in range(0, len(files), batch):
                rows = [next(read) for _ in files[start : start + batch]]
                yield from self._scored(rows)

    def one(self, file: str) -> tuple[float, np.ndarray]:
        """Score and map (h, w) of a file."""
        return next(self._scored([self._read(file)]))

    def _read(self, file: str) -> tuple[np.ndarray, tuple[int, int]]:
        with PIL.Image.open(file) as image:
            picture = image.convert("RGB")
        size = (self._side, self._side)
        small = picture.resize(size, PIL.Image.Resampling.BILINEAR)
        return np.asarray(small), (picture.height, picture.width)

    def _scored(
        self, rows: Sequence[tuple[np.ndarray, tuple[int, int]]]
    ) -> Iterator[tuple[float, np.ndarray]]:
        torch, functional = self.torch, self.torch.nn.functional
        with torch.inference_mode():
            images = torch.from_numpy(np.stack([image for image, _ in rows]))
            images = (images.permute(0, 3, 1, 2).float() - self._mean) / self._std
            distances = [self._nearest(cells) for cells in self._cells(images)]
            size = (self._side, self._side)
            grid = torch.stack(distances)[:, None]
            maps = functional.interpolate(grid, size, mode="bilinear", align_corners=False)
            maps = self._blurred(self._blurred(maps).mT).mT
            for values, small, (_, shape) in zip(distances, maps, rows, strict=True):
                whole = functional.interpolate(small[None], shape, mode="bilinear")
                yield float(values.max()), whole[0, 0].numpy()

    def _cells(self, images: Any) -> Any:
        """Mean features of 3 × 3 cells (b, gh, gw, d), on the grid of the first layer."""
        functional = self.torch.nn.functional
        maps = self._features(images.contiguous(memory_format=self.torch.channels_last))
        means = [
            functional.avg_pool2d(maps[name], 3, 1, 1, count_include_pad=False)
            for name in self.layers
        ]
        size = means[0].shape[2:]
        means = [functional.interpolate(x, size, mode="bilinear") for x in means]
        return self.torch.cat(means, dim=1).permute(0, 2, 3, 1)

    def _features(self, images: Any) -> dict[str, Any]:
        functional = self.torch.nn.functional
        x = functional.max_pool2d(self._convolved(images, "conv1", 2).relu_(), 3, 2, 1)
        maps = {}
        for stage in range(1, int(max(self.layers)[-1]) + 1):
            block = 0
            while f"layer{stage}.{block}.conv1" in self._convolutions:
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                y = self._convolved(x, f"{name}.conv1", stride).relu_()
                y = self._convolved(y, f"{name}.conv2", 1)
                if f"{name}.downsample.0" in self._convolutions:
                    x = self._convolved(x, f"{name}.downsample.0", stride)
                x, block = y.add_(x).relu_(), block + 1
            maps[f"layer{stage}"] = x
        return maps

    def _convolved(self, x: Any, name: str, stride: int) -> Any:
        weight, bias = self._convolutions[name]
        pad = weight.shape[-1] // 2
        return self.torch.nn.functional.conv2d(x, weight, bias, stride, pad)

    def _nearest(self, cells: Any) -> Any:
        """Distance (gh, gw) of the cells (gh, gw, d) of an image to the nearest row."""
        rows = cells.reshape(-1, cells.shape[-1])
        near = self.torch.addmm(self._halves, rows, self.bank.T, alpha=-1).argmin(1)
        return (rows - self.bank[near]).norm(dim=1).reshape(cells.shape[:2])

    def _blurred(self, maps: Any) -> Any:
        reach = self._reach
        sides = (maps[..., :reach].flip(-1), maps, maps[..., -reach:].flip(-1))
        return self.torch.nn.functional.conv2d(self.torch.cat(sides, dim=-1), self._taps)


def _folded(torch: Any, tensors: Any) -> dict[str, tuple[Any, Any]]:
    """Weights and biases of the convolutions, with the batch norm behind each in them."""
    made = {}
    for name in (n.removesuffix(".weight") for n, x in tensors.items() if np.ndim(x) == 4):
        norm = name.replace("downsample.0", "downsample.1").replace("conv", "bn")
        scale, shift, mean, variance = (
            np.asarray(tensors[f"{norm}.{leaf}"], np.float64)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + 1e-5)
        weight = tensors[f"{name}.weight"] * scale[:, None, None, None]
        pair = (torch.from_numpy(x.astype(np.float32)) for x in (weight, shift - mean * scale))
        weight, bias = pair
        made[name] = weight.contiguous(memory_format=torch.channels_last), bias
    return made
