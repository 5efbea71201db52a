"""Eight simulated devices, strict numerics, warnings as errors."""

import ctypes
import gc
import getpass
import os
import pathlib
import signal
import sys
import tempfile
import zlib
from importlib.metadata import version

JAX = version("jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On few cores a collective may wait long for its peers; the default aborts the process.
_FLAGS = ["--xla_cpu_collective_call_terminate_timeout_seconds=600"]
# Workers keep the cores busy; a program that is compiled in 32 pieces costs a fifth more.
_FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
# Small programs that run a few times: compiling them takes most of the time of the suite.
if not os.environ.get("DSAD_TEST_OPTIMISED"):
    _FLAGS.append("--xla_backend_optimization_level=0")
    if tuple(map(int, JAX.split(".")[:2])) < (0, 11):
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
_GIVEN = os.environ.get("XLA_FLAGS", "").split()  # a worker's hold these: keys of the cache, too
os.environ["XLA_FLAGS"] = " ".join([*_GIVEN, *(f for f in _FLAGS if f not in _GIVEN)])
os.environ.setdefault("MPLBACKEND", "Agg")
# A shell that starts the tests in the background has Ctrl-C ignored, and dsad would obey.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Compiled programs serve all workers, the processes that tests start, and later runs.
_CACHE = pathlib.Path(tempfile.gettempdir()) / f"dsad-tests-{getpass.getuser()}" / f"jax-{JAX}"
_CACHE_BYTES = 1 << 30
_LARGE = 1 << 30
#: Files of few tests that take long: what is left at the end keeps all workers busy.
_FIRST = (
    "test_readme", "test_objectives", "test_notebook", "test_launch", "test_stages", "test_cli",
    "test_variants", "test_detectors",
)  # fmt: skip
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import pytest

from dsad.bench._measure import resident

# Tracing makes millions of objects that live on: looking through them took a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads them in programs
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
    """Long files first; with DSAD_SLOW_PART=I/N only the I-th (from 0) of N slow parts.

    Which part a test is in follows from its name.
    """
    names = {name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))
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


def pytest_configure(config):
    """Programs that no run has used for long make room for new ones."""
    if hasattr(config, "workerinput") or not _CACHE.is_dir():
        return
    size = 0
    for file in sorted(_CACHE.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True):
        size += file.stat().st_size
        if size > _CACHE_BYTES:
            file.unlink()


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled programs of a module are forgotten after it once the worker is large."""
    yield
    if resident() > _LARGE:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # else the allocator keeps what was freed
            ctypes.CDLL(None).malloc_trim(0)
