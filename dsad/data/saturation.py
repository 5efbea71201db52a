"""The saturation of defects: how many of a defect's pixels have to be found for full credit.

``<category>/defects_config.json`` of MVTec LOCO AD and AutoVI lists the defects of a category by
the value that their pixels have in a mask (Bergmann et al., IJCV 2022, section 4).
"""

import dataclasses
import hashlib
import pathlib

from dsad.core.channels import Saturation
from dsad.core.errors import MetricError
from dsad.data import decode, files
from dsad.data.base import Fault, FaultError, Saturations, error

FILE = "defects_config.json"
_KEYS = {
    "defect_name": str, "pixel_value": int, "saturation_threshold": (int, float),
    "relative_saturation": bool,
}  # fmt: skip


def _file(root: pathlib.Path, category: str) -> str:
    """Its path below the root, which may be the category itself."""
    return f"{category}/{FILE}" if (root / category).is_dir() else FILE


def saturations(root: pathlib.Path, category: str) -> dict[int, Saturation]:
    """Saturations of the defects of a category by the value of their pixels.

    Raises FaultError (K4) with all faults of the list.
    """
    path = _file(root, category)
    try:
        items = files.parsed(decode.regular_bytes(root / path))
    except (OSError, ValueError) as problem:
        text = f"cannot be read: {problem}. Expected the published list of defects; copy it again."
        raise FaultError(error("K4", path, text)) from problem
    faults: list[Fault] = []
    found: dict[int, Saturation] = {}
    for number, item in enumerate(items if isinstance(items, list) else [items]):
        where = f"{path}[{number}]"
        wrong = [
            k for k, t in _KEYS.items() if not isinstance(item, dict) or not _is(item.get(k), t)
        ]
        if wrong:
            faults.append(error("K4", where, f"expected {', '.join(_KEYS)}; wrong: {wrong[0]}."))
            continue
        value, threshold = item["pixel_value"], item["saturation_threshold"]
        if not 1 <= value <= 255 or value in found:
            text = f"pixel_value {value}: expected 1 to 255, each once."
            faults.append(error("K4", where, text))
        try:
            found[value] = Saturation(
                name=item["defect_name"], threshold=threshold, relative=item["relative_saturation"]
            )
        except MetricError as problem:
            faults.append(error("K4", where, f"saturation_threshold {threshold}: {problem}"))
    if faults:
        raise FaultError(*faults)
    return found


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """Whether a value of a JSON file has a type, of which bool is no int."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def listed(data: files.FileDataset, *, needed: bool) -> files.FileDataset:
    """The data set with the saturations of each category, and K4 by its list.

    Without a list there is a fault where it is needed.
    """
    known, faults = {}, []
    for category in data.categories:
        if not needed and not (data.root / _file(data.root, category)).is_file():
            continue
        try:
            known[category] = saturations(data.root, category)
        except FaultError as problem:
            faults += problem.faults
    skipped = {k: v for k, v in data.skipped.items() if k != "K4" or not known}
    return dataclasses.replace(
        data, rules={c: decode.defect_rule(found) for c, found in known.items()},
        faults=(*data.faults, *faults), skipped=skipped, saturations=known,
        protocol={**data.protocol, **described(known)},
    )  # fmt: skip


def described(known: Saturations) -> dict[str, str]:
    """For the protocol: the first 16 hexadecimal digits of a SHA-256 of all thresholds, if any."""
    lines = [
        f"{category}\t{value}\t{x.threshold}\t{x.relative}\n"
        for category, by_value in sorted(known.items())
        for value, x in sorted(by_value.items())
    ]
    return (
        {"saturations": hashlib.sha256("".join(lines).encode()).hexdigest()[:16]} if known else {}
    )
