"""The licence of the weights behind a backbone's spec, of own runs that of what taught them."""

from collections.abc import Callable

from dsad.assembly import runs
from dsad.core.errors import DsadError
from dsad.core.types import Dataset
from dsad.data import base as data_base
from dsad.models import wrappers
from dsad.models.residual_maps import ProjectedMaps
from dsad.models.weights import licences
from dsad.models.weights.licences import Licence

#: Gives the data set of a config; raises DsadError for one that is not there.
Load = Callable[[data_base.DataConfig], Dataset]


def of_backbone(spec: str, weights: str, load: Load) -> Licence:
    """Of a backbone without "{category}"; also of the projectors that are put behind it."""
    found = _of_weights(runs.innermost(spec), weights, load)
    for wrapper in wrappers.unwrap(spec).maps:
        if isinstance(wrapper, ProjectedMaps):
            found = _both(found, "projectors", of_run(wrapper.run, load))
    return found


def of_run(directory: str, load: Load) -> Licence:
    """Of a pretraining run: that of its data, and of the weights that it began with."""
    place = runs.place(directory)
    config = runs.opened(place.directory).config
    if place.step == 0 and config.init_from in ("", runs.RANDOM):
        return licences.UNTRAINED
    try:
        text = str(load(config.data).protocol.get("licence", "not stated"))
    except DsadError:
        text = "unknown, as the data cannot be read"
    found = Licence(f"follows the training data: {text}", licences.named(text).commercial)
    if config.init_from in ("", runs.RANDOM):
        return found
    return _both(found, "began with", _of_weights(config.init_from, "", load))


def _of_weights(spec: str, weights: str, load: Load) -> Licence:
    if runs.random_seed(weights, 0) is not None:
        return licences.UNTRAINED
    if runs.is_run(weights or spec):
        return of_run(weights or spec, load)
    return licences.published(spec, weights or spec)


def _both(first: Licence, how: str, second: Licence) -> Licence:
    return Licence(f"{first.licence}; {how}: {second.licence}", licences.together(first, second))
