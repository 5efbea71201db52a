"""What a stopped evaluation had measured: one folder per category, until all of them are done."""

import dataclasses
import urllib.parse
from collections.abc import Mapping
from typing import Any

from etils import epath

from dsad.core import paths
from dsad.core.errors import WorkdirError
from dsad.evaluation import stamp
from dsad.evaluation.results import Results, read_results, write_results

FOLDER = "parts"
#: In the stamp of a part: ``support.version`` of what it was measured on.
_FILES = "files_sha256"
#: What may differ between two parts of one evaluation.
_VARIES = ("date", "detector_state", "backbone.per_category")


class Parts:
    """The measured categories of an evaluation below its working directory."""

    def __init__(self, workdir: str | epath.PathLike) -> None:
        self._folder = paths.directory(workdir) / FOLDER

    def read(self, title: str, protocol: Mapping[str, Any], version: str) -> Results | None:
        """The results of a category, None unless they are whole and were measured alike.

        ``protocol`` is the stamp of the evaluation, ``version`` that of the files: with other code,
        data or settings a category is measured anew.
        """
        try:
            part = read_results(self._of(title))
        except WorkdirError:
            return None
        alike = part.stamp.pop(_FILES, None) == version
        return part if alike and not stamp.differences(part.stamp, protocol, _VARIES) else None

    def write(self, title: str, results: Results, version: str) -> None:
        """Keep the results of a category."""
        stamped = dataclasses.replace(results, stamp={**results.stamp, _FILES: version})
        write_results(stamped, self._of(title))

    def remove(self) -> None:
        """All are in the whole results now."""
        if self._folder.is_dir():
            self._folder.rmtree()

    def _of(self, title: str) -> epath.Path:
        return self._folder / urllib.parse.quote(title, safe=" ")
