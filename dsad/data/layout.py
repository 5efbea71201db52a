"""What a folder of images is, by the names of the folders in it."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError
from dsad.data import about, files
from dsad.data._places import CATEGORY, WORDS, images_below, walk

_KEYS = {word: key for key, words in WORDS.items() for word in words.split()}
_LISTS = (".csv", ".jsonl")


class Layout(NamedTuple):
    """Keys of ``config.data`` with their values, and what lies beside the folders they name."""

    keys: dict[str, str]
    others: tuple[str, ...] = ()


def of(path: str) -> Layout:
    """The data set at a path: a published one, folders of good and bad images, good ones, a list.

    No image is decoded. Raises ConfigError for a path that is none of these, or may be two.
    """
    top = pathlib.Path(path).expanduser()
    if top.is_file() and top.suffix in _LISTS:
        return Layout({"name": "folder", "manifest": path})
    if not top.is_dir():
        what = "is a file" if top.is_file() else "does not exist"
        near = files.subfolders(top.parent)
        raise ConfigError(
            f"{path}: {what}; expected a folder of images, or a list of them "
            f"({', '.join(_LISTS)}).{suggestion(top.name, near)}"
        )
    if found := about.recognised(top):
        return Layout({"name": _published(path, found), "root": path})
    names = files.subfolders(top)
    if any((p / "train" / "good").is_dir() for p in (top, *(top / n for n in names))):
        return Layout({"name": "mvtec", "root": path})
    inner = sorted({name for n in names for name in files.subfolders(top / n)})
    for between, known in (("", names), (CATEGORY, inner)):
        roles = _roles(path, known)
        if "normal" in roles:
            keys = {key: os.path.join(path, between, name) for key, name in roles.items()}
            holders = ("", *names) if between else ("",)
            loose = sum(len(next(walk(top, [], x), ([], []))[0]) for x in holders)
            beside = (f"{loose} images beside the folders",) if loose else ()
            return Layout(
                {"name": "folder", **keys}, (*sorted({*known} - {*roles.values()}), *beside)
            )
    if not any(images_below(top, [], name) for name in names) and images_below(top, [], ""):
        return Layout({"name": "folder", "normal": path})
    raise ConfigError(
        f"{path}: nothing says which images are good: expected images in it, or a folder such as "
        f"good, ok or normal, and perhaps bad and masks; found the folders {listed(names)}. Name "
        "them: --config.data.name=folder --config.data.normal=DIR --config.data.abnormal=DIR"
    )


def _published(path: str, found: Mapping[str, str]) -> str:
    """The first name of the one data set that was found."""
    known = about.every()
    if len(found) > 1:
        names = " or ".join(f"--config.data.name={name}" for name in found)
        titles = " or ".join(known[name].title for name in found)
        raise ConfigError(f"{path}: {titles}, as {min(found.values())} shows; say which: {names}")
    (name,) = found
    return known[name].names(name)[0]


def _roles(path: str, names: Sequence[str]) -> dict[str, str]:
    """Folders by what they hold; ConfigError where two hold the same."""
    roles: dict[str, str] = {}
    for name in names:
        words = re.findall(r"[^\W\d_]+", name.lower())
        held = {_KEYS[word] for word in words if word in _KEYS}
        if not held or {"no", "not", "kein", "nicht"} & set(words):
            continue
        key = "masks" if "masks" in held else min(held)  # "bad, not good" is bad
        if key == "normal" and "test" in words:
            key = "test_normal"
        if (other := roles.setdefault(key, name)) != name:
            raise ConfigError(
                f"{path}: both {other} and {name} may be the {key} images. Name one of them: "
                f"--config.data.name=folder --config.data.{key}=DIR"
            )
    return roles
