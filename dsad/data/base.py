"""Configuration of data sets, faults found in them, and the way from a config to a data set."""

import abc
import contextlib
import dataclasses
import os
import pathlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from dsad.core import config as core_config
from dsad.core.channels import Saturation
from dsad.core.config import Refused, Settings, field
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import Record
from dsad.data import about


class SyntheticConfig(Settings, place="config.data.synthetic"):
    """Size and counts of the procedural data set, per category.

    Attributes:
      size: side of the square images in pixels.
      train: normal training images.
      good: normal test images.
      bad: test images of EACH kind of defect.
      seed: draws all of them.

    """

    size: int = field(128, at_least=16)
    train: int = field(32, at_least=1)
    good: int = field(8, at_least=0)
    bad: int = field(4, at_least=0)
    seed: int = field(0, at_least=0)


#: Saturations of the defects of each category, by the value of their pixels.
Saturations = Mapping[str, Mapping[int, Saturation]]
#: The keys that say where images lie.
PLACES = ("root", "normal", "abnormal", "masks", "test_normal", "manifest")


class DataConfig(Settings, place="config.data"):
    """Which data set, from where, and what it is allowed to lose.

    How images are read (``cache``, ``workers``, ``prefetch``) changes neither what is read nor its
    order. The places of own images are folders or globs ("pics/**/ok_*.png"), relative to ``root``
    or to the working directory.

    Attributes:
      name: a module of dsad.data, with a variant after a colon ("mtd:grouped").
      root: folder of the data set.
      normal: own images, ``name`` "folder": the normal ones, a folder or a glob.
      abnormal: own images: the defective ones, if there are any.
      masks: own images: masks of the defective ones, if there are any.
      test_normal: own images: normal ones for the test; empty: ``holdout`` draws them.
      manifest: own images: a list of them instead, CSV or JSON lines.
      holdout: own images: share of the normal ones, at least one, that is drawn by ``seed`` to be
        tested, unless test images are named; 0: none of them is, as in ``dsad fit``; 1: all
        are, as where a fitted model is measured.
      categories: those that are used; empty: all.
      canvas: side in pixels of the square uint8 canvases that training reads.
      cache: where training keeps the decoded canvases: on the devices, on the host, or nowhere.
      split: what is trained on; methods that learn from defects take "test" or "all".
      lossy: image modes ("RGBA", "I;16", "RGB;16", "CMYK", ...) that may be reduced to 8-bit RGB
        although this loses information.
      missing_masks: "image_only" lets anomalous images without a mask take part in image-level
        metrics only.
      strict: counts that differ from the published tables are errors.
      seed: of the hold-out, of drawn defects, of random splits.
      workers: with ``cache`` "none": processes that read and decode the images; 0: threads of this
        process.
      prefetch: with ``cache`` "none": batches that are kept ready, by each worker.

    """

    name: str = "synthetic"
    root: str = ""
    normal: str = ""
    abnormal: str = ""
    masks: str = ""
    test_normal: str = ""
    manifest: str = ""
    holdout: float = field(0.2, at_least=0, at_most=1)
    categories: tuple[str, ...] = field((), distinct=True)
    canvas: int = field(256, at_least=1)
    cache: Literal["device", "host", "none"] = "device"
    split: Literal["train", "test", "all"] = "train"
    lossy: tuple[str, ...] = ()
    missing_masks: Literal["error", "image_only"] = "error"
    strict: bool = False
    seed: int = field(0, at_least=0)
    workers: int = field(0, at_least=0)
    prefetch: int = field(2, at_least=1)
    synthetic: SyntheticConfig = SyntheticConfig()

    @property
    def place(self) -> str:
        """Where the data are, for people."""
        return self.root or self.manifest or self.normal

    @property
    def labelled(self) -> bool:
        """Whether own images are named by their labels."""
        return bool(self.normal or self.manifest)

    def check(self) -> None:
        _check_own(self)
        if self.workers and self.cache != "none":
            raise Refused(
                "workers",
                f'0 with cache="{self.cache}", which decodes every image once before the training',
                self.workers,
                'More processes would have nothing to read; or set config.data.cache="none".',
            )


def _check_own(config: DataConfig) -> None:
    """Refuse keys of own folders that do not go together, and what names no file."""
    for key in PLACES:
        if "\0" in vars(config)[key]:
            raise Refused(key, "the name of a file or folder, without NUL", vars(config)[key])
    keys = PLACES[1:]
    given = {key: value for key, value in vars(config).items() if key in keys and value}
    if given and config.name.partition(":")[0] != "folder":
        raise Refused("name", f"'folder' with config.data.{min(given)}", config.name)
    if config.manifest and (len(given) > 1 or config.root):
        other = next((key for key in given if key != "manifest"), "root")
        advice = f"Leave config.data.{other} out: the list says it all, below its own folder."
        raise Refused("manifest", "nothing beside a list of images", config.manifest, advice)
    for key, needed in dict.fromkeys(keys[1:4], "normal").items() | {("masks", "abnormal")}:
        if key in given and needed not in given:
            raise Refused(key, f"config.data.{needed} beside it", given[key])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a data set.

    ``check`` is K1..K15 (see dsad.data.checks) or K0: the folders of the layout are there and no
    class is empty. ``path`` is relative to the data set's root, or a category.
    """

    check: str
    severity: Literal["error", "warning"]
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: [{self.check}] {self.message}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedDataset(abc.ABC):
    """What the data sets of an index have in common, see ``core.types.Dataset``.

    ``splits`` are "train", "test" and what else the set has, such as "validation". ``saturations``
    are those of defects by category and value of their pixels, where a mask file is one defect.
    """

    name: str
    categories: tuple[str, ...]
    protocol: Mapping[str, Any]
    config: DataConfig
    splits: Mapping[str, tuple[Record, ...]]
    faults: tuple[Fault, ...] = ()
    origin: str = ""
    saturations: Saturations = dataclasses.field(default_factory=dict)

    @abc.abstractmethod
    def source(self, split: str, category: str | None = None) -> Any:
        """Samples of a split, of one category or of all, sorted by path."""

    def damages(self) -> list[Fault]:
        """Faults of files that hold many samples, for which each of them is read whole."""
        return []


class FaultError(DataError):
    """A DataError made of faults, all of them listed in the message and in ``faults``.

    ``command`` makes the full check of what lies at ``where``.
    """

    def __init__(self, *faults: Fault, where: str = "", command: str = ""):
        self.faults = faults
        lines = [str(fault) for fault in faults]
        if where:
            count = f"{len(lines)} fault{'s' if len(lines) != 1 else ''}"
            lines = [f"{where}: {count}", *(f"  {line}" for line in lines)]
            lines.append(f"The full check:\n  {command}")
        super().__init__("\n".join(lines))
        self._where, self._command = where, command

    def __reduce__(self):
        # Worker processes send their faults; an exception is otherwise rebuilt from its message.
        return _fault_error, (self.faults, self._where, self._command)


def _fault_error(faults: tuple[Fault, ...], where: str, command: str) -> FaultError:
    return FaultError(*faults, where=where, command=command)


def check_command(config: DataConfig) -> str:
    """The command that checks the data of a config, as a shell takes it."""
    usual, keys = vars(DataConfig(name="")), vars(config)
    given = [k for k in usual if keys[k] != usual[k] and k != "synthetic"]
    return shlex.join(["dsad", "check-data", *(f"--config.data.{k}={keys[k]}" for k in given)])


def _fault(check: str, severity: Literal["error", "warning"], path: str, message: str) -> Fault:
    """Names that are not UTF-8 are written so that they can be printed."""
    path, message = (t.encode(errors="backslashreplace").decode() for t in (path, message))
    return Fault(check=check, severity=severity, path=path, message=message)


def error(check: str, path: str, message: str) -> Fault:
    """A fault that makes the data set unusable."""
    return _fault(check, "error", path, message)


def warning(check: str, path: str, message: str) -> Fault:
    """A fault that is reported and tolerated."""
    return _fault(check, "warning", path, message)


def variant(config: DataConfig, known: tuple[str, ...] = ("",)) -> str:
    """The part of ``config.name`` after the colon, "" without one.

    Raises ConfigError unless it is one of ``known``.
    """
    name, colon, part = config.name.partition(":")
    if part not in known or (colon and not part):
        options = ", ".join(f"{name}:{k}" if k else name for k in known)
        raise ConfigError(
            f"config.data.name: expected one of {options}; found {config.name!r}."
            f"{core_config.suggestion(part, known)}"
        )
    return part


def chosen(config: DataConfig, known: tuple[str, ...]) -> tuple[str, ...]:
    """The categories asked for, in sorted order; ConfigError names unknown and repeated ones."""
    unknown = [c for c in config.categories if c not in known]
    if unknown:
        raise ConfigError(
            f"config.data.categories: {core_config.listed(unknown)} not found."
            f"{core_config.suggestion(unknown[0], known)} "
            f"{config.place or config.name} has: {core_config.listed(known)}."
        )
    return tuple(sorted(config.categories or known))


def load(config: DataConfig) -> IndexedDataset:
    """The data set of ``config``, its index checked, no image decoded.

    Raises ConfigError for a name or category that does not exist and DataError with ALL faults of
    the index (missing folder, empty class, missing mask, duplicate stem).
    """
    dataset = indexed(config)
    if errors := [f for f in dataset.faults if f.severity == "error"]:
        where = f"{dataset.name} in {config.place}"
        raise FaultError(*errors, where=where, command=check_command(config))
    return dataset


@contextlib.contextmanager
def read_as(config: DataConfig) -> Iterator[None]:
    """Name the full check, which tells all faults at once, where one stops what reads images."""
    try:
        yield
    except FaultError as stop:
        command = check_command(config)
        raise FaultError(*stop.faults, where=config.place, command=command) from stop


def indexed(config: DataConfig) -> IndexedDataset:
    """Likewise with the faults of its index, none of them raised.

    Raises DataError for files and folders that the system refuses to look at, all of them named,
    and Refused for a root that holds another published data set.
    """
    try:
        _refuse_another(config)
        dataset = core_config.resolve("data", config.name.partition(":")[0]).scan(config)
    except OSError as problem:
        if config.root and (faults := _unreadable(os.path.expanduser(config.root))):
            where = f"{config.name} in {config.place}"
            raise FaultError(*faults, where=where, command=check_command(config)) from problem
        where = os.fsencode(problem.filename or config.place).decode(errors="backslashreplace")
        text = f"cannot be read: {problem.strerror}. Make it readable, or copy the data set again."
        raise DataError(f"{where}: {text}") from problem
    faults = _unwritable(dataset) + _untrained(dataset)
    return dataclasses.replace(dataset, faults=(*dataset.faults, *faults)) if faults else dataset


def _refuse_another(config: DataConfig) -> None:
    """Refuse a root of one data set under the name of another, whose rules are not its own."""
    module = config.name.partition(":")[0]
    known = about.every()
    if not config.root or config.labelled or module not in (*known, "folder"):
        return
    root = pathlib.Path(os.path.expanduser(config.root))
    found = about.recognised(root)
    if module == "folder":  # whose images all count as normal, as do those of sets without a test
        found = {name: path for name, path in found.items() if known[name].masks != "none"}
    if found and module not in found:
        names = " or ".join(name for other in found for name in known[other].names(other))
        titles = " or ".join(known[other].title for other in found)
        shown = f"{config.root} holds {titles}, as {min(found.values())} shows."
        raise Refused("config.data.name", names, config.name, shown)


def link_to_nothing(path: str) -> bool:
    """Whether a path is a link whose target is gone."""
    return os.path.islink(path) and not os.path.exists(path)


def lost_link(path: str) -> Fault:
    """The K8 fault of such a link: nobody can tell what it led to."""
    return error("K8", path, "a link to nothing; restore what it led to, or remove it.")


def _unreadable(root: str) -> list[Fault]:
    """K8 of every folder from the root down that may not be listed or entered, and of lost links.

    A folder that links lead to more than once is looked at once.
    """
    faults: list[Fault] = []
    seen: set[str] = set()

    def add(folder: str, what: str | None) -> None:
        text = f"the folder cannot be read: {what}. Make it readable, or copy the data set again."
        faults.append(error("K8", os.path.relpath(folder, root), text))

    def refused(problem: OSError) -> None:
        add(problem.filename or root, problem.strerror)

    for folder, folders, names in os.walk(root, onerror=refused, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or not os.access(folder, os.X_OK):
            if real not in seen:
                add(folder, "its files may not be opened")
            folders.clear()
        seen.add(real)
        inside = (os.path.join(folder, name) for name in names)
        faults += [lost_link(os.path.relpath(x, root)) for x in inside if link_to_nothing(x)]
    return sorted(faults, key=lambda fault: fault.path)


def _unwritable(dataset: IndexedDataset) -> list[Fault]:
    """K9 of names that are not UTF-8: no report and no table could hold them."""
    names = [name for rs in dataset.splits.values() for r in rs for name in (r.path, *r.masks)]
    names += dataset.categories
    text = "the name is not UTF-8, so no report can hold it; rename the file or folder."
    return [error("K9", name, text) for name in dict.fromkeys(names) if not _is_utf8(name)]


def _untrained(dataset: IndexedDataset) -> list[Fault]:
    """K0 of a list that names no training image, where nothing else tells of it."""
    told = any(f.check == "K0" or f.severity == "error" for f in dataset.faults)
    if dataset.splits.get("train") or told or dataset.config.labelled:
        return []
    text = "no training image: nothing can be fitted. Copy the lists of the data set again."
    return [warning("K0", dataset.config.place, text)]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
