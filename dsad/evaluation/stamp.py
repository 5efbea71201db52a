"""The protocol stamp: what a number means, stored with it, and compared before numbers are."""

import dataclasses
import datetime
import hashlib
import pathlib
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsad
from dsad.core.detection import Detector, DetectorTraits
from dsad.core.types import Backbone, Dataset, Record
from dsad.evaluation import channels

#: Fields that may differ between comparable numbers: what is compared, and when and by what.
IGNORED = (
    "backbone", "code", "date", "detector_state", "jax", "model_sha256", "name",
    "seed",
    # Settings of speed and memory that change no number beyond rounding or the printed bound.
    "detector.config.cache_gb", "detector.config.precision", "pixel_numbers",
)  # fmt: skip


def plain(value: Any) -> Any:
    """``value`` as JSON types: dataclasses and mappings to dicts, tuples and arrays to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def records_hash(splits: Mapping[str, Sequence[Record]]) -> str:
    """SHA-256 over split, category, path, label, kind and mask paths of all records, sorted."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        lines = (
            f"{split}\t{r.category}\t{r.path}\t{r.label}\t{r.kind}\t{','.join(r.masks)}\n"
            for r in splits[split]
        )
        for line in sorted(lines):
            digest.update(line.encode())
    return digest.hexdigest()


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """Architecture and weights."""
    return {"arch": backbone.arch, "weights": backbone.description}


def describe_detector(detector: Detector) -> dict[str, Any]:
    """Module name and configuration."""
    name = type(detector).__module__.rpartition(".")[2]
    return {"name": name, "config": plain(detector.config)}


def describe_state(state: Any) -> dict[str, Any]:
    """Size of a fitted detector: ``bytes``, array shapes by path, whole numbers by value.

    ``bank_rows`` are the rows of its array ``bank``, or the number beside it under ``rows`` or
    ``valid`` where the bank is padded.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays, whole = {}, {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if np.ndim(leaf) == 0 and jnp.issubdtype(leaf.dtype, jnp.integer):
            whole[name] = int(leaf)
        else:
            arrays[name] = list(np.shape(leaf))
    made: dict[str, Any] = {"bytes": sum(int(x.nbytes) for _, x in leaves), "arrays": arrays}
    if "bank" in arrays:
        made["bank_rows"] = whole.get("rows", whole.get("valid", arrays["bank"][0]))
    return {**made, "numbers": whole} if whole else made


def code_version() -> dict[str, Any]:
    """Package version, and the git commit (with "-dirty") when run from a checkout."""
    root = pathlib.Path(dsad.__file__).resolve().parent.parent
    version: dict[str, Any] = {"dsad": dsad.__version__, "commit": None}
    if not (root / ".git").exists():
        return version
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git here: the version has to do
        return version
    version["commit"] = done.stdout.strip() or None
    return version


def key_data(key: jax.Array) -> list[int]:
    """The words of a random key, old style or new."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return [int(word) for word in np.asarray(key).ravel()]


def make_stamp(
    dataset: Dataset,
    categories: Sequence[str],
    *,
    config: Any,
    detector: Detector,
    backbone: Backbone,
    key: jax.Array,
    name: str = "",
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The stamp of one localization run, JSON types only.

    Args:
      dataset: its ``protocol`` and a hash over the records of both splits are taken.
      categories: the categories evaluated, in order; the mean is over these.
      config: the ``EvalConfig``.
      detector: described by ``describe_detector``.
      backbone: described by ``describe_backbone``.
      key: the random key of the run.
      name: a name for people.
      details: replaces or adds fields, such as ``{"backbone": {"run": ..., "step": ...}}``;
        mappings are merged one level deep. ``localize`` says here how "model", "support" and
        "thresholds" came about, and adds "detector_state" after every fit.

    """
    splits = {
        split: [r for c in categories for r in dataset.source(split, c).records]
        for split in ("train", "test")
    }
    known = channels.known(dataset, categories)
    stamp = {
        "name": name,
        "dataset": {
            "name": dataset.name,
            **plain(dataset.protocol),
            "records_sha256": records_hash(splits),
        },
        "categories": list(categories),
        "model": "one per category",
        "support": "all training images",
        "thresholds": "none",
        "preprocessing": {
            **config.preprocessing.describe(),
            **({} if config.preprocessing.whole else {"uncounted": _uncounted(detector.traits)}),
        },
        "colour": "8-bit values as stored, taken as sRGB: no profile or gamma applied; grey "
        "repeated to three channels",
        "orientation": "images and masks turned as their EXIF orientation says",
        "pixels": "original",
        "normals": "included",
        "regions": "connected components of the mask",
        "connectivity": 8,
        "fpr_limit": config.fpr_limit,
        **({"spro": channels.PROTOCOL} if known else {}),
        "pixel_numbers": "by sorting" if config.method == "exact" else "by counting, error_bound",
        "pooling": "pixels pooled per category, mean over categories",
        "precision": "average precision (step sum, no trapezoid)",
        "detector": describe_detector(detector),
        "layers": list(detector.layers),
        "image_score": _image_score(detector.traits),
        "upsampling": "bilinear, " + ("aligned corners" if config.align_corners else "half-pixel"),
        "smoothing": {"gaussian_sigma_px": detector.traits.sigma},
        "backbone": describe_backbone(backbone),
        "seed": key_data(key),
        "code": code_version(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    for field, value in (details or {}).items():
        old = stamp.get(field)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        stamp[field] = plain({**old, **value}) if both else plain(value)  # type: ignore[dict-item]
    return stamp


def _uncounted(traits: DetectorTraits) -> str:
    """Of a border around the image, and of what counts in another window."""
    if traits.leaves_out:
        return "left out of fit and image score"
    return "no part of the map; this detector's fit or image score does not leave it out"


def _image_score(traits: DetectorTraits) -> str:
    if traits.image_score == "method":
        return "the detector's"
    if traits.image_score == "max":
        return "largest of the smoothed map at input size"
    return f"mean of the highest {traits.image_share:g} of the smoothed map at input size"


def flat(stamp: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    made: dict[str, Any] = {}
    for name, value in stamp.items():
        if isinstance(value, Mapping) and value:
            made.update(flat(value, f"{prefix}{name}."))
        else:
            made[f"{prefix}{name}"] = value
    return made


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], ignore: Iterable[str] = IGNORED
) -> list[str]:
    """Lines "field: this against that" for every field that changes what a number means.

    Args:
      a: one stamp.
      b: the other.
      ignore: top-level or dotted fields that may differ.

    """
    skipped = tuple(ignore)

    def kept(stamp: Mapping[str, Any]) -> dict[str, Any]:
        return {
            n: v
            for n, v in flat(stamp).items()
            if not any(n == s or n.startswith(f"{s}.") for s in skipped)
        }

    left, right = kept(a), kept(b)
    absent = "(absent)"
    names = [*left, *(n for n in right if n not in left)]
    if left.get("detector.name") != right.get("detector.name"):
        # The settings of unlike detectors say nothing more.
        names = [n for n in names if not n.startswith("detector.config.")]
    return [
        f"{n}: {left.get(n, absent)!r} against {right.get(n, absent)!r}"
        for n in names
        if left.get(n, absent) != right.get(n, absent)
    ]
