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
