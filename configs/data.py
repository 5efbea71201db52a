"""A data set by itself, for checking it before a run.

dsad check-data --config.data.name=mvtec --config.data.root=DIR
dsad check-data --config.data.name=mtd:grouped --config.data.root=DIR
dsad check-data                                   (the procedural set, which has no faults)
"""

import ml_collections

from dsad.core.config import as_dict
from dsad.data.base import DataConfig


def get_config():
    return ml_collections.ConfigDict({"data": as_dict(DataConfig())}).lock()
