"""Eight simulated devices, strict numerics, warnings as errors."""

import os
import pathlib
import shutil
import tempfile
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On few cores a collective may wait long for its peers; the default aborts the process.
_FLAGS = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("MPLBACKEND", "Agg")
# Commands and notebooks run in processes of their own; what one compiled serves the others.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_CACHE = pathlib.Path(tempfile.gettempdir()) / f"dsad-tests-{_RUN}"
os.environ["DSAD_TEST_CACHE"] = str(_CACHE)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(params=[1, 8], ids=["1-device", "8-devices"])
def devices(request):
    """The first 1 or 8 simulated devices."""
    return jax.devices()[: request.param]


def pytest_report_header():
    if part := os.environ.get("DSAD_SLOW_PART"):
        return f"of the slow tests only part {part} (DSAD_SLOW_PART)"
    return None


def pytest_collection_modifyitems(config, items):
    """With DSAD_SLOW_PART=I/N only the I-th (from 0) of N parts of the slow tests, by name."""
    if not (part := os.environ.get("DSAD_SLOW_PART")):
        return
    number, count = map(int, part.split("/"))
    left = [
        item
        for item in items
        if item.get_closest_marker("slow") and zlib.crc32(item.nodeid.encode()) % count != number
    ]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the process that started the workers
        uid = getattr(config, "_xdist_uid", None)
        shutil.rmtree(_CACHE, ignore_errors=True)
        if uid:
            shutil.rmtree(_CACHE.with_name(f"dsad-tests-{uid}"), ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Remember the run's name, under which the workers keep their cache."""
    node.config._xdist_uid = node.workerinput["testrunuid"]
