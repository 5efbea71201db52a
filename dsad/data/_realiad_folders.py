"""Where images and lists of Real-IAD's families lie, and which categories have both."""

import pathlib
from collections.abc import Sequence

from dsad.core.config import listed
from dsad.data import files
from dsad.data.base import DataConfig, Fault, chosen, error, warning


def _has_images(folder: pathlib.Path) -> bool:
    return any((folder / part).is_dir() for part in ("OK", "NG"))


def image_root(root: pathlib.Path, prefix: str, faults: list[Fault]) -> pathlib.Path:
    """The folder of the categories: the root, or the one release in it, by its ``prefix``."""
    inside = files.subfolders(root)
    if any(_has_images(root / name) for name in inside):
        return root
    lists = f"{prefix}jsons"
    releases = [n for n in inside if n.startswith(prefix) and not n.startswith(lists)]
    if len(releases) > 1:
        text = f"several releases: {listed(releases)}; set config.data.root to one of them."
        faults.append(error("K0", str(root), text))
    return root / releases[0] if releases else root


def list_folder(
    root: pathlib.Path, images: pathlib.Path, places: Sequence[str], faults: list[Fault]
) -> pathlib.Path | None:
    """Where the lists lie: in the first of the ``places``, beside the images."""
    bases = dict.fromkeys((root.absolute(), images.absolute(), images.absolute().parent))
    for folder in (base / place for base in bases for place in places):
        if any(folder.glob("*.json")):
            return folder
    archive = places[0].partition("/")[0]
    text = f"no lists: expected <category>.json in {' or '.join(places)}, in "
    text += f"{listed(map(str, bases))}. Unpack {archive}.zip there."
    faults.append(error("K0", places[-1], text))
    return None


def readable_categories(
    images: pathlib.Path, lists: pathlib.Path, prefix: str, config: DataConfig, faults: list[Fault]
) -> tuple[str, ...]:
    """Categories to read, both with images and with a list; a fault of each other one."""
    inside = files.subfolders(images)
    folders = {name for name in inside if _has_images(images / name)}
    listed_names = {file.stem for file in lists.glob("*.json") if not file.name.startswith(".")}
    for name in inside:
        if name not in folders | listed_names and not name.startswith(prefix):
            faults.append(files.ignored(name, "not a category (no OK/ or NG/ inside)"))
    if not folders:
        text = f"no category found: expected {images.name}/<category>/OK and NG."
        faults.append(error("K0", str(images), text))
        return ()
    wanted = chosen(config, tuple(sorted(folders | listed_names)))
    for name in wanted:
        if name not in folders:
            text = "its list is here, but no folder with OK/ or NG/: "
            packed = (images / f"{name}.zip").is_file()
            text += f"unpack {name}.zip." if packed else "the category is left out."
            needed = config.strict or name in config.categories
            faults.append((error if needed else warning)("K0", name, text))
        elif name not in listed_names:
            text = f"no list {lists.name}/{name}.json: labels and split are known by it alone."
            faults.append(error("K0", name, text))
    return tuple(name for name in wanted if name in folders & listed_names)
