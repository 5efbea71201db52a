"""One page of the predictions for new pictures: what is flagged first, with its contour."""

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from dsad.core import paths
from dsad.core.errors import WorkdirError
from dsad.evaluation.report import figures, gallery
from dsad.evaluation.report.page import template

#: Pictures of a page, and their longest side in pixels; further images are listed without.
PICTURES, SIDE = 300, 288


def write_predictions(
    out_path: str | epath.PathLike,
    folder: epath.Path,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "Predictions",
) -> epath.Path:
    """Write the page of a finished ``dsad predict`` and return its path.

    Small pictures are in the page; a click opens the overlay beside the predictions.

    Args:
      out_path: the page.
      folder: that of the predictions.
      about: its ``about.json``.
      rows: its ``predictions.jsonl``.
      title: heading of the page.

    Raises WorkdirError for an overlay that is missing or a page that cannot be written.

    """
    scored = sorted((r for r in rows if "error" not in r), key=lambda r: (-r["score"], r["path"]))
    flagged = [r for r in scored if r.get("flagged")]
    others = [r for r in scored if not r.get("flagged")]
    shown = [*flagged, *others][:PICTURES]
    place = os.path.dirname(os.fspath(paths.directory(out_path)))
    cards = {r["path"]: _card(r, folder, place) for r in shown}
    page = template("predicted").render(
        title=title,
        about=about,
        scores=_scores(about, flagged, others),
        groups=[(name, [cards[r["path"]] for r in group if r["path"] in cards], len(group))
                for name, group in (("Flagged", flagged), ("Not flagged", others))],
        unreadable=[r for r in rows if "error" in r],
    )  # fmt: skip
    return paths.write_whole(out_path, page, "Give another --out=FILE.")


def _card(row: Mapping[str, Any], folder: epath.Path, place: str) -> dict[str, Any]:
    """Picture, link and caption of an image."""
    path = folder / row["overlay"]
    try:
        with path.open("rb") as file:
            picture = np.asarray(PIL.Image.open(file).convert("RGB"))
    except OSError as error:
        raise WorkdirError(
            f"{path}: cannot be read ({paths.cause(error)}); expected an overlay of `dsad "
            "predict`. Run it again with --overwrite."
        ) from error
    link = os.path.relpath(os.fspath(path), place).replace(os.sep, "/")
    size = gallery.fit(picture.shape, SIDE)
    return {
        **row,
        "uri": figures.data_uri(gallery.shrunk(picture, SIDE)),
        "link": urllib.parse.quote(os.fsencode(link)),
        "ratio": f"{size[0]} / {size[1]}",
    }


def _scores(
    about: Mapping[str, Any],
    flagged: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
) -> str:
    """The chart of the image scores."""
    if not flagged and not others:
        return ""
    rows = {"flagged": flagged, "passed": others} if about["image"] is not None else {"": others}
    values = {name: np.array([r["score"] for r in group]) for name, group in rows.items()}
    run = figures.Scores(
        rows=values, filled="flagged", threshold=about["image"],
        colour=figures.COLOURS[0],
    )  # fmt: skip
    return figures.score_chart([run], name="predictions")
