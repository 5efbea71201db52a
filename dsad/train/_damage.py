"""Why a checkpoint could not be read: its own damage, or the disk, the network, the memory."""

import json
import re

import jax

#: How tensorstore begins what it says of files that are missing, cut off or do not decode; the
#: second kind may also be a refused request, unless the words after it tell of decoding.
_DAMAGE = re.compile(r"DATA_LOSS|OUT_OF_RANGE|NOT_FOUND")
_REFUSED = re.compile(r"FAILED_PRECONDITION|INVALID_ARGUMENT")
_DECODING = re.compile(r"compress|decod|truncat|checksum|crc|corrupt|json", re.I)


def causes(error: BaseException) -> list[BaseException]:
    """An error and those it came from, the first of all last."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return found


def is_damage(error: BaseException) -> bool:
    """Whether a file of a checkpoint is missing, cut off, or cannot be decoded."""
    if isinstance(error, (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError)):
        return True
    text = str(error)
    if isinstance(error, KeyError):
        return "was not found in the checkpoint" in text
    # Neither the names of files nor the description of the arrays, which names their compression.
    told = re.sub('"[^"]*"', "", text.partition("[tensorstore_spec")[0])
    undecoded = _REFUSED.match(told) and _DECODING.search(told) and "os_error_code" not in text
    return bool(_DAMAGE.match(told) or undecoded)


def is_outside(error: BaseException) -> bool:
    """Whether the disk, the network or the memory failed, whatever is in the files."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return isinstance(error, (MemoryError, jax.errors.JaxRuntimeError))


def is_device_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
