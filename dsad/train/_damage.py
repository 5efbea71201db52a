"""Why a checkpoint could not be read: its own damage, or the disk, the network, the memory."""

import json
import re

import jax
from etils import epath

from dsad.core import paths
from dsad.core.digests import DigestError
from dsad.core.errors import WorkdirError

#: How tensorstore begins what it says of files that are missing, cut off or do not decode; the
#: second kind may also be a refused request, unless the words after it tell of decoding.
_DAMAGE = re.compile(r"DATA_LOSS|OUT_OF_RANGE|NOT_FOUND")
_REFUSED = re.compile(r"FAILED_PRECONDITION|INVALID_ARGUMENT")
_DECODING = re.compile(r"compress|decod|truncat|checksum|crc|corrupt|json", re.I)


def unread(
    path: epath.Path, error: BaseException, older: list[int] | None, more_memory: str
) -> WorkdirError:
    """What to tell of a checkpoint that could not be read.

    Advises to delete it only if it is surely of no use to anybody. ``older`` are the steps of those
    before it; None: it is not there any more, or nobody can say.
    """
    chain = causes(error)
    damage = next(filter(is_damage, chain), None)
    if damage and older is not None and not any(map(is_outside, chain)):
        remove = "gcloud storage rm -r" if paths.is_remote(path) else "rm -r"
        back = (
            f"Older ones: {', '.join(map(str, older))}. To go back, remove it "
            f"({remove} {path}); --resume then continues at step {older[-1]}. To only "
            f"read, name an older one: run:DIR@{older[-1]}."
            if older
            else "There is no older one: start again with --overwrite."
        )
        told = WorkdirError(f"{path}: this checkpoint is damaged: {paths.cause(damage)}. {back}")
        told.older_one = bool(older)
        return told
    why = next(filter(is_outside, chain), chain[-1])
    advice = f" {more_memory}" if is_device_memory(why) else ""
    return WorkdirError(
        f"{path}: could not be read: {paths.cause(why)}; the checkpoint was left as it is.{advice}"
    )


def causes(error: BaseException) -> list[BaseException]:
    """An error and those it came from, the first of all last."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return found


def is_damage(error: BaseException) -> bool:
    """Whether a file of a checkpoint is missing, cut off, changed, or cannot be decoded."""
    if isinstance(
        error, (DigestError, FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError)
    ):
        return True
    text = str(error)
    if isinstance(error, KeyError):
        return "was not found in the checkpoint" in text
    # Neither the names of files nor the description of the arrays, which names their compression.
    told = re.sub('"[^"]*"', "", text.partition("[tensorstore_spec")[0])
    undecoded = _REFUSED.match(told) and _DECODING.search(told) and "os_toldcode" not in text
    return bool(_DAMAGE.match(told) or undecoded)


def is_outside(error: BaseException) -> bool:
    """Whether the disk, the network or the memory failed, whatever is in the files."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return isinstance(error, (MemoryError, jax.errors.JaxRuntimeError))


def is_device_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
