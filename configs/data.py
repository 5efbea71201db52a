"""A data set by itself, for checking it before a run.

dsad check-data --config.data.name=mvtec --config.data.root=DIR
dsad check-data --config.data.name=mtd:grouped --config.data.root=DIR
dsad check-data --config.data.name=folder --config.data.normal=DIR --config.data.abnormal=DIR
dsad check-data                                   (the procedural set, which has no faults)
dsad check-data --config=configs/data.py:smoke    (a small one)
"""

import ml_collections

from dsad.assembly.configs import apply_variants
from dsad.core.config import as_dict
from dsad.data.base import DataConfig


def get_config(variants: str = ""):
    config = ml_collections.ConfigDict({"data": as_dict(DataConfig())}).lock()
    return apply_variants(config, variants, {"smoke": _smoke}, __file__)


def _smoke(config):
    config.data.synthetic.update(size=64, train=2, good=2, bad=1)
