"""Own images: folders of good and bad ones, a list of images, or any images to pretrain on.

``config.data.normal`` names the normal images: a folder, or a glob. In a folder either images lie,
which are one category, or folders, which are the categories, with images at any depth below them;
both is refused, as nobody can tell what is meant. The images of a glob are one category, unless a
folder in it is written ``{category}`` ("pics/{category}/good", "pics/{category}/ok_*.png"). A
single category has the name of the folder that holds ``normal``.

``abnormal``, ``masks`` and ``test_normal`` have the same categories: as folders in theirs, or as
``{category}``. Folders in an ``abnormal`` folder, below the category if there are several, are
the kinds of defects; all other abnormal images are of kind "bad". A mask has the path of its image
below ``masks``, with any suffix, and perhaps "_mask" after the name; if no mask lies in a folder,
names alone are compared. Without ``masks`` there are numbers of images only.

``manifest`` is a list instead, CSV with a first line of names or JSON lines: ``path`` and ``label``
(normal or abnormal, good or bad, 0 or 1), and perhaps ``split`` (train, test), ``mask``, ``group``,
``category``, ``kind``; paths are relative to its folder.

Where no normal test images are named, the share ``holdout`` of the normal ones, at least one a
category, is held out for the test by ``heldout.RULE``; groups that have an abnormal image come
first, as no group is on both sides. 0 tests none of them, 1 all. Without abnormal images the test
images are these, clean and with a procedural defect each, which their kinds and the protocol say.

With ``root`` alone, ``<category>/**/<name>.<suffix>``, everything is normal and trained on, and
nothing is measured. That index opens no file and asks for no file's size: it can hold the 1.28
million images of ImageNet, with ``data.cache="none"``. Copies, hidden files and other suffixes are
always ignored with a warning.
"""

import pathlib

from dsad.core.errors import ConfigError
from dsad.data import _labelled, files
from dsad.data._labelled import MASKED
from dsad.data._places import empty_class, images_below, labels, mixed, walk
from dsad.data.base import DataConfig, Fault, chosen, error, variant
from dsad.data.decode import MaskRule


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised; Refused for a place that does not exist."""
    variant(config)
    if config.manifest:
        return _labelled.of_list(config)
    return _labelled.of_places(config) if config.normal else _unlabelled(config)


def _index(root: pathlib.Path, config: DataConfig, faults: list[Fault]) -> dict[str, list[str]]:
    """Image paths by category, of those that the config asks for."""
    loose, folders = next(walk(root, faults), ([], []))
    if not loose and not folders:
        suffixes = ", ".join(files.IMAGE_SUFFIXES)
        text = f"no image and no folder with images; expected files with {suffixes}."
        faults.append(error("K0", str(root), text))
        return {}
    if not loose:
        faults += labels(root, folders)
        found = {name: images_below(root, faults, name) for name in chosen(config, tuple(folders))}
        faults += [empty_class(name) for name, paths in found.items() if not paths]
        return found
    name = files.folder_name(root)
    chosen(config, (name,))
    faults += mixed(root, loose, folders, "Move the loose ones into a folder of their own.")
    return {name: loose}


def _unlabelled(config: DataConfig) -> files.FileDataset:
    if not config.root:
        raise ConfigError(
            "config.data.root: empty, and so is config.data.normal. Name your good images with "
            "--config.data.normal=DIR and the bad ones, if any, with --config.data.abnormal=DIR; "
            "or any images to pretrain on with --config.data.root=DIR."
        )
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
            dataset=f"{files.folder_name(root)} (folder of images)",
            split="all images train, none is held out",
        ),
        skipped={
            **dict.fromkeys(MASKED, "no image has a mask"),
            "K7": "nothing is matched by stem",
            "K11": "every image counts as normal",
            "K12": "no published table",
            "K13": "the layout names no groups",
            "K14": "there is no test image",
        },
    )  # fmt: skip
