"""Where images lie: a folder or a glob, as a config key names it, and the images there."""

import dataclasses
import glob
import os
import pathlib
import shlex
from collections.abc import Callable, Iterable, Iterator

from dsad.core.config import Refused, suggestion
from dsad.data import files
from dsad.data.base import Fault, error, link_to_nothing, lost_link

#: Stands for a folder whose name is that of a category.
CATEGORY = "{category}"
#: Words that say what the images of a folder are, by the key of ``config.data`` that takes it.
WORDS = {
    "masks": "mask masks masken truth gt annotations",
    "abnormal": "bad nok ng nio defect defects defective defekt abnormal anomaly anomalous"
    " anomalies schlecht fehler fail failed faulty reject rejects",
    "normal": "good ok okay normal normals gut io pass passed clean healthy",
}


def walk(
    root: pathlib.Path, faults: list[Fault], start: str = "",
    stray: Callable[[str], str] = files.stray,
) -> Iterator[tuple[list[str], list[str]]]:  # fmt: skip
    """Per folder from ``start`` down: its images and visible folders, as paths below the root.

    Paths have forward slashes. ``stray`` says why a file of a name is ignored, or "".
    """

    def unlisted(problem: OSError) -> None:
        text = f"the folder cannot be listed: {problem.strerror}; make it readable."
        where = pathlib.Path(problem.filename or root).relative_to(root).as_posix()
        faults.append(error("K8", str(root) if where == "." else where, text))

    for folder, folders, names in os.walk(root / start, onerror=unlisted, followlinks=True):
        below = pathlib.Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        reasons = {name: files.barred(os.path.join(folder, name)) for name in folders}
        reasons |= {name: stray(name) for name in names}
        # Of images reading them will say so; what else is lost may have been a folder of them.
        odd = [name for name in names if files.stray(name) and reasons[name] != "hidden"]
        lost = {name for name in odd if link_to_nothing(os.path.join(folder, name))}
        faults += [lost_link(prefix + name) for name in sorted(lost)]
        faults += [files.ignored(prefix + n, r) for n, r in reasons.items() if r and n not in lost]
        names = [name for name in names if name not in lost]
        folders[:] = [name for name in folders if not reasons[name]]  # what is entered next
        yield [prefix + n for n in names if not reasons[n]], [prefix + n for n in folders]


def labels(root: pathlib.Path, folders: Iterable[str]) -> list[Fault]:
    """K0 where folders that look like categories say whether their images are good or bad."""
    names = {os.path.basename(folder).lower(): folder for folder in folders}
    both = {
        key: next((names[word] for word in WORDS[key].split() if word in names), "")
        for key in ("normal", "abnormal")
    }
    if not all(both.values()):
        return []
    hint = " ".join(
        f"--config.data.{k}={shlex.quote(os.path.abspath(root / f))}" for k, f in both.items()
    )
    text = (
        f"{' and '.join(map(os.path.basename, both.values()))} are no categories but labels, and "
        f"what is bad would be fitted on as if it were good. Name them apart: {hint}"
    )
    return [error("K0", str(root), text)]


def images_below(root: pathlib.Path, faults: list[Fault], start: str) -> list[str]:
    """Paths of all images in the folder ``start`` and the folders below it."""
    return [path for images, _ in walk(root, faults, start) for path in images]


def empty_class(path: str) -> Fault:
    text = (
        "empty class: no image in the folder or below it; remove it or fill it, or let a glob "
        "match files, such as 'pics/*.png'."
    )
    return error("K0", path, text)


def mixed(root: pathlib.Path, loose: list[str], folders: list[str], advice: str) -> list[Fault]:
    """Faults of folders beside images: with images in them, they might be categories."""
    faults: list[Fault] = []
    for folder in sorted(folders):
        if below := images_below(root, faults, folder):
            text = (
                f"{len(below)} images here and {len(loose)} directly in the folder above, such as "
                f"{min(loose)}: expected either folders, one for each category, or a single folder "
                f"of images. {advice}"
            )
            faults.append(error("K0", folder, text))
        else:
            faults.append(files.ignored(folder, "no image in the folder or below it"))
    return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Images as ``config.data.<key>`` names them: those in ``base``, or there matching ``pattern``.

    ``base`` is an absolute folder. ``pattern``, of a glob or with a category in it, is "" for all
    images at any depth.
    """

    key: str
    base: str
    pattern: str = ""

    @property
    def holder(self) -> str:
        """The folder that holds it, from whose name a single category has its own."""
        return self.base if "/" in self.pattern else os.path.dirname(self.base)

    @property
    def by_category(self) -> bool:
        """Whether it says where the categories stand."""
        return CATEGORY in self.pattern.split("/")

    def folders(self) -> list[str]:
        """The folders that may be categories."""
        return files.subfolders(pathlib.Path(self.base, self.pattern.partition(CATEGORY)[0]))

    def within(self) -> "Place":
        """The folders in this one as its categories."""
        return dataclasses.replace(self, pattern=CATEGORY)

    def at(self, category: str) -> "Place | None":
        """The place of one category; None where its folder does not exist."""
        return _place(self.key, self.base, self.pattern.replace(CATEGORY, category).split("/"))

    def images(self, top: pathlib.Path, faults: list[Fault]) -> dict[str, str]:
        """Paths below ``top`` by their paths below ``base``, sorted."""
        start = os.path.relpath(self.base, top).replace(os.sep, "/")
        prefix = "" if start == "." else f"{start}/"
        if self.pattern:
            paths = [prefix + name for name in self._matches(prefix, faults)]
        else:
            paths = images_below(top, faults, prefix)
        return {path.removeprefix(prefix): path for path in sorted(paths)}

    def _matches(self, prefix: str, faults: list[Fault]) -> Iterator[str]:
        for name in sorted(set(glob.glob(self.pattern, root_dir=self.base, recursive=True))):
            reason = files.stray(os.path.basename(name))
            if not reason:
                yield name.replace(os.sep, "/")
            elif not os.path.isdir(os.path.join(self.base, name)):
                faults.append(files.ignored(prefix + name, reason))


def _place(key: str, base: str, parts: list[str]) -> Place | None:
    """The parts of a path as folders, as far as they exist, and a glob; None where it ends before.

    A folder whose name has a bracket or a star in it is that folder and no glob.
    """
    while parts and os.path.isdir(os.path.join(base, parts[0])):
        base, parts = os.path.join(base, parts[0]), parts[1:]
    pattern = "/".join(parts)
    if pattern and not glob.has_magic(pattern) and CATEGORY not in parts:
        return None
    return Place(key=key, base=base, pattern=pattern)


def parse(key: str, text: str, root: str) -> Place:
    """What ``config.data.<key>`` names, relative to ``root``; Refused for what does not exist."""
    full = os.path.abspath(os.path.join(root, os.path.expanduser(text)))
    parts = full.split(os.sep)[1:]
    if place := _place(key, "/", parts):
        return place
    base = os.path.dirname(full)
    while not os.path.isdir(base):
        base = os.path.dirname(base)
    missing = full[len(base) :].split(os.sep)[1 if base != "/" else 0]
    what = "it is a file" if os.path.isfile(full) else f"no {missing!r} in {base}"
    advice = suggestion(missing, files.subfolders(pathlib.Path(base)))
    raise Refused(
        f"config.data.{key}", "a folder of images that exists, or a glob such as 'pics/**/*.png'",
        text, f"{what[0].upper()}{what[1:]}.{advice}",
    )  # fmt: skip
