"""The config that a run was started with, as a config file: ``run_config.py:DIR``."""

import ml_collections

from dsad.assembly import workdir
from dsad.core.config import tuples


def get_config(directory: str) -> ml_collections.ConfigDict:
    """Of the run in a directory."""
    return ml_collections.ConfigDict(tuples(workdir.read(directory)["config"])).lock()
