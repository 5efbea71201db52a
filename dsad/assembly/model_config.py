"""The config that a fitted model was made with, as a config file: ``model_config.py:DIR``."""

import ml_collections

from dsad.assembly.model import Saved


def get_config(directory: str) -> ml_collections.ConfigDict:
    """Of the models in a directory."""
    return ml_collections.ConfigDict(Saved.read(directory).config()).lock()
