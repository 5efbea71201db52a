"""The saturation of defects: how many of a defect's pixels have to be found for full credit.

``<category>/defects_config.json`` of MVTec LOCO AD and AutoVI lists the defects of a category by
the value that their pixels have in a mask (Bergmann et al., IJCV 2022, section 4).
"""

import dataclasses
import math
import pathlib

from dsad.data import decode, files
from dsad.data.base import Fault, FaultError, error
from dsad.data.decode import MaskRule

FILE = "defects_config.json"
_KEYS = {
    "defect_name": str, "pixel_value": int, "saturation_threshold": (int, float),
    "relative_saturation": bool,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saturation:
    """When the defect ``name`` is found completely.

    ``threshold`` is a number of pixels or, of a ``relative`` one, a share of the defect's area.
    """

    name: str
    threshold: float
    relative: bool

    def pixels(self, area: int) -> int:
        """Pixels that have to be found of a defect of ``area`` pixels: at least one."""
        needed = math.floor(self.threshold * area) if self.relative else self.threshold
        return max(1, int(min(needed, area)))


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
        if not 0 < threshold < math.inf or (item["relative_saturation"] and threshold > 1):
            text = f"saturation_threshold {threshold}: expected pixels above 0, or a share to 1."
            faults.append(error("K4", where, text))
        found[value] = Saturation(
            name=item["defect_name"], threshold=threshold, relative=item["relative_saturation"]
        )
    if faults:
        raise FaultError(*faults)
    return found


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """Whether a value of a JSON file has a type, of which bool is no int."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def listed(data: files.FileDataset, *, needed: bool) -> files.FileDataset:
    """The data set with K4 of each category by its list; without one a fault where it is needed."""
    rules, faults = {}, []
    for category in data.categories:
        if not needed and not (data.root / _file(data.root, category)).is_file():
            continue
        try:
            values = (0, *sorted(saturations(data.root, category)))
            rules[category] = MaskRule(threshold=0, values=values)
        except FaultError as problem:
            faults += problem.faults
    skipped = {k: v for k, v in data.skipped.items() if k != "K4" or not rules}
    return dataclasses.replace(data, rules=rules, faults=(*data.faults, *faults), skipped=skipped)
