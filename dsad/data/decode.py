"""Image and mask files to arrays: every conversion declared, every fault named with its file.

Accepted without a word, because nothing is lost: 8-bit RGB, 8-bit grey (repeated to three equal
channels), 1-bit (0 and 255) and palettes of opaque colours (looked up). Everything else (alpha,
16 bit, float, CMYK, ...) is a K3 fault unless ``lossy`` names its mode. 16-bit colour gets the
mode name "RGB;16": Pillow itself would drop the low bytes silently. Images and masks are turned
and mirrored as their EXIF orientation says: everything that is said of a size is said after that.
"""

import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from dsad.data.base import Fault, FaultError, error

T = TypeVar("T")
_LOSSLESS = {"RGB", "L", "1", "P"}
_MASK_MODES = {"L", "1"}
#: What the suffixes of data sets name; no other decoder looks at a file, whatever it is called.
FORMATS = ("BMP", "JPEG", "PNG", "TIFF")
#: Larger images are refused by what their header says: 16384 × 8192 are 400 MB as RGB.
MAX_PIXELS = 2**27


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How a mask file becomes bool: True above ``threshold``.

    ``values`` are the only grey values allowed (None: any); ``single``: one of them beside the
    lowest, as each stands for a defect. Binarisation is at the file's own size.
    """

    threshold: int = 127
    values: tuple[int, ...] | None = (0, 255)
    single: bool = False


def defect_rule(known: Iterable[int]) -> MaskRule:
    """How a mask file of a single defect is read, whose value is one of these."""
    return MaskRule(threshold=0, values=(0, *sorted(known)), single=True)


def declared_mode(image: Image.Image, data: bytes) -> str:
    """The mode of the file of content ``data``, with what Pillow hides: alpha and 16 bits."""
    if "transparency" in image.info:
        return "RGBA"
    # A PNG begins with IHDR: length, type, width, height, then the bit depth.
    depth = data[24] if image.format == "PNG" else 8
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        depth = max(image.tag_v2.get(258, (8,)))  # BitsPerSample
    if depth == 16 and image.mode in ("RGB", "RGBA", "LA"):
        return f"{image.mode};16"
    if depth == 16 and image.mode in ("I", "L"):  # Pillow before 11 reads 16-bit grey PNG as "I"
        return "I;16"
    return image.mode


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        if image.mode != "F":  # 16 bit: 65535 becomes 255
            values = values / 257.0
        grey = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    # An RGB image is not converted: that would copy it once more.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def opened(file: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to read; OSError of what is none, such as a pipe that nobody ever fills."""
    with open(file, "rb", opener=_without_waiting) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a device or a pipe", str(file))
        yield stream


def regular_bytes(file: pathlib.Path) -> bytes:
    """The content of a file; OSError as of ``opened``."""
    with opened(file) as stream:
        return stream.read()


def read_bytes(root: pathlib.Path, path: str) -> bytes:
    """The content of a file; FaultError (K8) names it when it cannot be read."""
    try:
        return regular_bytes(root / path)
    except OSError as problem:
        text = f"cannot be read: {problem.strerror}. Expected an image file; copy it again."
        raise FaultError(error("K8", path, text)) from problem


def _said(problem: Exception) -> str:
    return str(problem).rstrip(".") or type(problem).__name__


def _opened(data: bytes, path: str, use: Callable[[Image.Image], T]) -> T:
    """Apply ``use`` to the open image; anything unreadable becomes a K8 fault."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}; cut it"
                )
            return use(image)
    except FaultError:
        raise
    except Exception as problem:  # of any kind: what a decoder trips over depends on the bytes
        unknown = f"no image of the formats {', '.join(FORMATS)}"
        reason = unknown if isinstance(problem, UnidentifiedImageError) else _said(problem)
        what = f"cannot be decoded: {reason}" if data else "the file has zero bytes"
        text = f"{what}. Expected a complete image file; copy it again."
        raise FaultError(error("K8", path, text)) from problem


def stored_size(data: bytes, path: str) -> tuple[int, int]:
    """Width and height by an image's header, before it is turned; FaultError (K8) names it."""
    return _opened(data, path, lambda image: image.size)


def _refuse(fault: Fault, faults: list[Fault] | None) -> None:
    """Raise a fault that leaves pixels to look at, or append it where all are wanted."""
    if faults is None:
        raise FaultError(fault)
    faults.append(fault)


def decoded_image(
    data: bytes, path: str, lossy: tuple[str, ...] = (), faults: list[Fault] | None = None
) -> tuple[np.ndarray, str]:
    """Pixels (h, w, 3) uint8 and the mode of a file's content; FaultError (K3, K8) names it.

    With a list of ``faults`` those of K3 are appended there, and the image is decoded all the same.
    """
    mode = ""

    def use(image: Image.Image) -> np.ndarray:
        nonlocal mode
        mode = declared_mode(image, data)
        if mode not in _LOSSLESS and mode not in lossy:
            text = (
                f"image mode {mode}: expected 8-bit RGB or grey. Reducing it loses information; "
                "convert the file, or allow it (of new pictures: in the fit of their model) with "
                f"""--config.data.lossy="('{mode}',)"."""
            )
            _refuse(error("K3", path, text), faults)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)

    return _opened(data, path, use), mode


def read_image(
    root: pathlib.Path, path: str, lossy: tuple[str, ...] = (), faults: list[Fault] | None = None
) -> tuple[np.ndarray, str]:
    """``decoded_image`` of a file."""
    return decoded_image(read_bytes(root, path), path, lossy, faults)


def decoded_mask(
    data: bytes, path: str, rule: MaskRule, faults: list[Fault] | None = None
) -> np.ndarray:
    """Mask (h, w) bool of a file's content, at its size; FaultError (K3, K4, K8) names it.

    With a list of ``faults`` those of K3 and K4 are appended there, and the mask is decoded all the
    same.
    """
    return mask_values(data, path, rule, faults) > rule.threshold


def mask_values(
    data: bytes, path: str, rule: MaskRule, faults: list[Fault] | None = None
) -> np.ndarray:
    """Likewise its grey values (h, w) uint8, as they are."""

    def use(image: Image.Image) -> np.ndarray:
        mode = declared_mode(image, data)
        if mode not in _MASK_MODES:
            text = f"mask mode {mode}: expected 8-bit grey (L) or 1 bit; convert."
            _refuse(error("K3", path, text), faults)
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(image.convert("L"), np.uint8)

    before = len(faults or ())
    grey = _opened(data, path, use)
    if rule.values is not None and len(faults or ()) == before:
        found = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
        if not set(found.tolist()) <= set(rule.values):
            shown = ", ".join(str(v) for v in found[:8]) + (", ..." if len(found) > 8 else "")
            text = f"mask values {shown}: expected only {rule.values}. Binarise the mask at its "
            _refuse(error("K4", path, f"{text}full size and save it again."), faults)
        elif rule.single and np.count_nonzero(found) > 1:
            text = f"mask values {', '.join(str(v) for v in found if v)}: expected one, that of the"
            text += " file's defect; save a file for each defect."
            _refuse(error("K4", path, text), faults)
    return grey


def read_mask(
    root: pathlib.Path, path: str, rule: MaskRule, faults: list[Fault] | None = None
) -> np.ndarray:
    """``decoded_mask`` of a file."""
    return decoded_mask(read_bytes(root, path), path, rule, faults)


def size_fault(path: str, mask: np.ndarray, shape: tuple[int, ...]) -> Fault | None:
    """The K2 fault of a mask (h, w) whose size is not its image's ``shape`` (h, w), or None."""
    if mask.shape == shape:
        return None
    return error(
        "K2",
        path,
        f"mask of {mask.shape[1]}×{mask.shape[0]} pixels (width × height) for an image of "
        f"{shape[1]}×{shape[0]}, turned as its EXIF orientation says: they must agree; masks are "
        "never resized or turned silently.",
    )
