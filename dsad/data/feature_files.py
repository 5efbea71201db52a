"""Arrays with a row per sample in files that every process maps, none of which holds them whole."""

import functools
import os

import numpy as np


class FeatureFile:
    """An array (N, ...) in a file of plain values; it goes to other processes as its path.

    ``create`` makes the file, or empties it; its rows can be set and read by index.
    """

    def __init__(
        self, path: str | os.PathLike, shape: tuple[int, ...], dtype: np.dtype, *,
        create: bool = False,
    ) -> None:  # fmt: skip
        self.path, self.shape, self.dtype = os.fspath(path), shape, np.dtype(dtype)
        if create:
            np.memmap(self.path, self.dtype, "w+", shape=shape).flush()

    @functools.cached_property
    def _values(self) -> np.memmap:
        return np.memmap(self.path, self.dtype, "r+", shape=self.shape)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.asarray(self._values[index])

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        self._values[rows] = values

    def __reduce__(self) -> tuple:
        return FeatureFile, (self.path, self.shape, self.dtype)
