"""What the tests of ``dsad plan`` share."""

import os

import pytest

from dsad.core.chips import Chip
from dsad.plan import _hardware


@pytest.fixture(autouse=True)
def environment():
    """Planning sets variables for the compilers; other tests must not see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def quick_machine(monkeypatch):
    """A made-up CPU instead of one that is measured for seconds."""
    chip = Chip(
        name="CPU", peak_flops=1e9, hbm_bytes=2**30, hbm_bandwidth=1e9, ici_bandwidth=1e8,
        ici_ports=1, kinds=(), source="made up",
    )  # fmt: skip
    monkeypatch.setattr(_hardware, "chip", lambda devices: chip)
