"""Any folder of images, to pretrain on: everything counts as normal, nothing is held out.

``<category>/**/<name>.<suffix>``: folders directly in the root are the categories, at any depth
below them lie images. A root that holds images itself is one category of its own name; one that
holds both is refused, as nobody can tell what its categories are meant to be. Copies, hidden files
and other suffixes are ignored with a warning. There is no test image: the set cannot be evaluated.

The index opens no file and asks for no file's size: it can hold the 1.28 million images of
ImageNet, with ``data.cache="none"``.
"""

import os
import pathlib

from dsad.data import files
from dsad.data.base import DataConfig, Fault, chosen, error, variant
from dsad.data.decode import MaskRule


class _Walk:
    """Lists folders below a root; paths are relative to it, with forward slashes."""

    def __init__(self, root: pathlib.Path, faults: list[Fault]):
        self.root, self.faults = os.fspath(root), faults

    def listing(self, path: str) -> tuple[list[str], list[str]]:
        """Paths of the images and of the visible folders directly in the folder ``path``."""
        images, folders = [], []
        prefix = f"{path}/" if path else ""
        try:
            with os.scandir(os.path.join(self.root, path)) as entries:
                for entry in entries:
                    # Most file systems tell folders from files in the listing itself.
                    if entry.is_dir():
                        if self._enters(entry, prefix + entry.name):
                            folders.append(prefix + entry.name)
                    elif reason := files.stray(entry.name):
                        self.faults.append(files.ignored(prefix + entry.name, reason))
                    else:
                        images.append(prefix + entry.name)
        except OSError as problem:
            text = f"the folder cannot be listed: {problem.strerror}; make it readable."
            self.faults.append(error("K8", path or self.root, text))
        return images, folders

    def below(self, path: str) -> list[str]:
        """Paths of all images in the folder ``path`` and the folders below it."""
        found, waiting = [], [path]
        while waiting:
            images, folders = self.listing(waiting.pop())
            found += images
            waiting += folders
        return found

    def _enters(self, entry: os.DirEntry[str], path: str) -> bool:
        reason = "hidden" if entry.name.startswith(".") else ""
        if not reason and entry.is_symlink():
            # Links to other places are followed; one to a folder above would never end.
            target = os.path.realpath(entry.path)
            above = os.path.realpath(os.path.dirname(entry.path))
            if os.path.commonpath((target, above)) == target:
                reason = "a link to a folder that it lies in"
        if reason:
            self.faults.append(files.ignored(path, reason))
        return not reason


def _root_name(root: pathlib.Path) -> str:
    return root.resolve().name or "images"  # the root of a file system has no name


def _index(root: pathlib.Path, config: DataConfig, faults: list[Fault]) -> dict[str, list[str]]:
    """Image paths by category, of those that the config asks for."""
    walk = _Walk(root, faults)
    loose, folders = walk.listing("")
    if not loose:
        if not folders:
            suffixes = ", ".join(files.IMAGE_SUFFIXES)
            text = f"no image and no folder with images; expected files with {suffixes}."
            faults.append(error("K0", str(root), text))
            return {}
        found = {name: walk.below(name) for name in chosen(config, tuple(folders))}
        for name, paths in found.items():
            if not paths:
                text = "empty class: no image in the folder or below it; remove it or fill it."
                faults.append(error("K0", name, text))
        return found
    name = _root_name(root)
    chosen(config, (name,))
    for folder in sorted(folders):
        if below := walk.below(folder):
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
        name="folder",
        categories=tuple(sorted(found)),
        protocol=files.protocol(
            config, splits, licence=files.licence(root),
            dataset=f"{_root_name(root)} (folder of images)",
            split="all images train, none is held out",
        ),
        config=config,
        root=root,
        splits=splits,
        rule=MaskRule(),
        faults=tuple(faults),
        skipped={
            **dict.fromkeys(("K1", "K2", "K4", "K5", "K6", "K15"), "no image has a mask"),
            "K7": "nothing is matched by stem",
            "K11": "every image counts as normal",
            "K12": "no published table",
            "K13": "the layout names no groups",
            "K14": "there is no test image",
        },
    )  # fmt: skip


def build(config: DataConfig) -> files.FileDataset:
    """The data set; raises DataError with every error of the index."""
    return files.accepted(scan(config))
