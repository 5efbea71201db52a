"""The order of the samples: a new permutation every epoch, cut into batches, then by process.

Grain's own shuffle costs about 30 ms an epoch for any set below 65,536 images (measured: 0.13 ms an
image with 209 of them), and its elements 20 µs each; here a whole batch of indices costs
microseconds, so that with a device cache the host has next to nothing to do.
"""

import threading
from typing import Any

import numpy as np

from dsad.data.companions import CompanionDraws

#: Permutations kept: batches that are read ahead, or apart by workers, may lie epochs apart.
_KEPT = 8


def permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order (samples,) int64 of an epoch; a function of its arguments on any machine.

    Sorted by the raw numbers of the Philox generator with (seed, epoch) as its key: numpy promises
    that these never change, which it does not for ``Generator.permutation``.
    """
    numbers = np.random.Philox(key=(epoch << 64) | (seed % 2**64)).random_raw(samples)
    return np.argsort(numbers, kind="stable")


class Order:
    """Random access to the parts of all batches that are this process's.

    Batch b of B samples holds the elements bB to (b + 1)B - 1 of the endless sequence of epochs;
    process p of P has the p-th of P equal parts of them, so that the global batch is the same array
    for any number of processes, where the devices of a mesh follow the processes. Safe to use from
    several threads, and goes to worker processes.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        process: int,
        processes: int,
        companions: CompanionDraws | None = None,
    ):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.companions = companions
        part = batch_size // processes
        self._mine = np.arange(process * part, (process + 1) * part)
        self._start()

    def _start(self) -> None:
        self._known: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_known", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return 2**62 // self.batch_size  # there is no end

    def _of(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._known:
                while len(self._known) >= _KEPT:
                    del self._known[min(self._known)]
                self._known[epoch] = permutation(self.seed, epoch, self.samples)
            return self._known[epoch]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The fields ``BatchSpec.drawn`` of this process's part of batch ``index``."""
        positions = int(index) * self.batch_size + self._mine
        epochs, places = np.divmod(positions, self.samples)
        samples = np.empty(len(positions), np.int32)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            samples[now] = self._of(int(epoch))[places[now]]
        return self._drawn(samples, epochs.astype(np.int32))

    def _drawn(self, index: np.ndarray, epoch: np.ndarray) -> dict[str, Any]:
        drawn: dict[str, Any] = {"index": index, "epoch": epoch}
        if self.companions:
            drawn["references"] = self.companions(index, epoch)
        return drawn


class OnePass(Order):
    """All samples once, in their own order, as batches of epoch 0; the last one is filled up.

    What fills it repeats the last sample; ``rows`` says how many of a batch count.
    """

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        positions = int(index) * self.batch_size + self._mine
        samples = np.minimum(positions, self.samples - 1).astype(np.int32)
        return self._drawn(samples, np.zeros(len(samples), np.int32))

    def rows(self, index: int) -> int:
        """How many of the global batch ``index`` are samples."""
        return min(self.batch_size, self.samples - index * self.batch_size)
