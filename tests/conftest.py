"""Eight simulated devices, strict numerics, warnings as errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On few cores a collective may wait long for its peers; the default aborts the process.
_FLAGS = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(params=[1, 8], ids=["1-device", "8-devices"])
def devices(request):
    """The first 1 or 8 simulated devices."""
    return jax.devices()[: request.param]


def pytest_addoption(parser):
    parser.addoption("--slow-share", default="0/1", help="I/N: run every N-th slow test from I on")


def pytest_collection_modifyitems(config, items):
    """Slow tests run only when asked for, and then the asked-for share of them."""
    asked = "slow" in (config.getoption("-m") or "")
    part, parts = map(int, config.getoption("--slow-share").split("/"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    drop = {id(item) for i, item in enumerate(slow) if not asked or i % parts != part}
    if drop:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in drop])
        items[:] = [item for item in items if id(item) not in drop]
