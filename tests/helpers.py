"""Shared by the tests: where real data may lie, and small trees of files made on the spot."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def real_data(*parts: str) -> pathlib.Path:
    """A path below the real data ($DSAD_DATA, else ../shared/data); skips the test when absent."""
    roots = [os.environ.get("DSAD_DATA"), ROOT.parent / "shared" / "data"]
    for root in roots:
        if root and (path := pathlib.Path(root, *parts)).exists():
            return path
    pytest.skip(f"real data {'/'.join(parts)} is absent; set DSAD_DATA to run this test")
