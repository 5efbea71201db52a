"""Any folder of images, to pretrain on: everything counts as normal, nothing is held out.

``<category>/**/<name>.<suffix>``: folders directly in the root are the categories, at any depth
below them lie images. A root that holds images itself is one category of its own name; one that
holds both is refused, as nobody can tell what its categories are meant to be. Copies, hidden files
and other suffixes are ignored with a warning. There is no test image: nothing is measured.

The index opens no file and asks for no file's size: it can hold the 1.28 million images of
ImageNet, with ``data.cache="none"``.
"""

import os
import pathlib
from collections.abc import Iterator

from dsad.data import files
from dsad.data.base import DataConfig, Fault, chosen, error, variant
from dsad.data.decode import MaskRule


def _walk(
    root: pathlib.Path, faults: list[Fault], start: str = ""
) -> Iterator[tuple[list[str], list[str]]]:
    """Per folder from ``start`` down: its images and visible folders, as paths below the root.

    Paths have forward slashes.
    """

    def unlisted(problem: OSError) -> None:
        text = f"the folder cannot be listed: {problem.strerror}; make it readable."
        where = pathlib.Path(problem.filename or root).relative_to(root).as_posix()
        faults.append(error("K8", str(root) if where == "." else where, text))

    for folder, folders, names in os.walk(root / start, onerror=unlisted, followlinks=True):
        below = pathlib.Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        reasons = {name: _barred(os.path.join(folder, name)) for name in folders}
        reasons |= {name: files.stray(name) for name in names}
        faults += [files.ignored(prefix + n, reason) for n, reason in reasons.items() if reason]
        folders[:] = [name for name in folders if not reasons[name]]  # what is entered next
        yield [prefix + n for n in names if not reasons[n]], [prefix + n for n in folders]


def _barred(folder: str) -> str:
    """Why a folder is not entered, or ""."""
    above, name = os.path.split(folder)
    if name.startswith("."):
        return "hidden"
    if os.path.islink(folder):
        # Links to other places are followed; one to a folder above would never end.
        target = os.path.realpath(folder)
        if os.path.commonpath((target, os.path.realpath(above))) == target:
            return "a link to a folder that it lies in"
    return ""


def _images(root: pathlib.Path, faults: list[Fault], start: str) -> list[str]:
    """Paths of all images in the folder ``start`` and the folders below it."""
    return [path for images, _ in _walk(root, faults, start) for path in images]


def _root_name(root: pathlib.Path) -> str:
    return root.resolve().name or "images"  # the root of a file system has no name


def _index(root: pathlib.Path, config: DataConfig, faults: list[Fault]) -> dict[str, list[str]]:
    """Image paths by category, of those that the config asks for."""
    loose, folders = next(_walk(root, faults), ([], []))
    if not loose and not folders:
        suffixes = ", ".join(files.IMAGE_SUFFIXES)
        text = f"no image and no folder with images; expected files with {suffixes}."
        faults.append(error("K0", str(root), text))
        return {}
    if not loose:
        found = {name: _images(root, faults, name) for name in chosen(config, tuple(folders))}
        for name, paths in found.items():
            if not paths:
                text = "empty class: no image in the folder or below it; remove it or fill it."
                faults.append(error("K0", name, text))
        return found
    name = _root_name(root)
    chosen(config, (name,))
    for folder in sorted(folders):
        if below := _images(root, faults, folder):
            text = (
                f"{len(below)} images here and {len(loose)} directly in the root, such as "
                f"{min(loose)}: expected either folders, one for each category, or a single folder "
                "of images. Move the loose ones into a folder of their own."
            )
            faults.append(error("K0", folder, text))
        else:
            faults.append(files.ignored(folder, "no image in the folder or below it"))
    return {name: loose}


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    variant(config)
    root = files.root_folder(config)
    faults = [] if root.is_dir() else [files.missing_root(root)]
    found = _index(root, config, faults) if root.is_dir() else {}
    train = ((category, path) for category, paths in found.items() for path in paths)
    splits = {"train": files.normals(train), "test": ()}
    return files.FileDataset(
        name="folder", categories=tuple(sorted(found)), config=config, root=root, splits=splits,
        rule=MaskRule(), faults=tuple(faults),
        protocol=files.protocol(
            config, splits, licence=files.licence(root),
            dataset=f"{_root_name(root)} (folder of images)",
            split="all images train, none is held out",
        ),
        skipped={
            **dict.fromkeys(("K1", "K2", "K4", "K5", "K6", "K15"), "no image has a mask"),
            "K7": "nothing is matched by stem",
            "K11": "every image counts as normal",
            "K12": "no published table",
            "K13": "the layout names no groups",
            "K14": "there is no test image",
        },
    )  # fmt: skip
