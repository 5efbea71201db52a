"""Damage to data sets of files: of images, of lists, of folders. Each kind draws from ``rng``.

A kind takes the path that it damages and returns the path by which a fault may name it.
"""

import io
import json
import os
import pathlib
import random
import re
import shutil
import struct
import zlib

import numpy as np
from PIL import Image

Path, Rng = pathlib.Path, random.Random
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
LISTS = (".csv", ".json", ".jsonl", ".txt")
SIDES = (0, 1, 2000, 20000, 65535, 2**31 - 1, 2**32 - 1)
NUMBERS = (
    "-1", "0", "1e999", "-0.0", "NaN", "1" + 30 * "0", 5000 * "9", "٣", "1.5", "0x10", "",
)  # fmt: skip
NAMES = (
    "{} (copy)", "-{}", "a\nb{}", "{}[1]*?", "ü{}".encode().decode(), "u\u0308{}", "{} %s#%20",
    "\udcff{}", "{}" + 200 * "x", ".{}", "{}\u202e", " {} ", "{}\\x", "\U0001f600{}", "~{}",
)  # fmt: skip
PATHS = (
    "../../../etc/passwd", "/etc/passwd", "/etc/ssl", "a\0b.png", "\ud800.png", 5000 * "x", "", ".",
    "//", "null", "a/../b.png", "~root/x.png", "con\n.png",
)  # fmt: skip


def rewrite(file: Path, data: bytes) -> Path:
    """A new file: the old one is a hard link of the sound tree."""
    file.unlink()
    file.write_bytes(data)
    return file


def _changed(change):
    """A kind that maps bytes to bytes."""

    def kind(rng: Rng, file: Path) -> Path:
        return rewrite(file, bytes(change(rng, bytearray(file.read_bytes()))))

    kind.__name__ = change.__name__
    return kind


@_changed
def bits(rng, data):
    for _ in range(rng.choice((1, 4, 64))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


@_changed
def header(rng, data):
    for _ in range(rng.choice((1, 3, 10))):
        if data:
            data[rng.randrange(min(len(data), 64))] = rng.randrange(256)
    return data


@_changed
def truncated(rng, data):
    return data[: rng.choice((0, 1, 8, 33, len(data) * 2 // 3, max(0, len(data) - 1)))]


@_changed
def zeros(rng, data):
    start = rng.randrange(len(data) + 1)
    data[start : start + rng.choice((1, 16, len(data)))] = bytes(rng.choice((0, 1, 16)))
    return data


@_changed
def inserted(rng, data):
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 7, 500)))
    return data


@_changed
def huge(rng, data):
    """A header that declares another size."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:2] == b"BM":
        data[18:26] = struct.pack("<II", width, height)
    elif (at := re.search(b"\xff[\xc0-\xc2]", data)) and data[:2] == b"\xff\xd8":
        data[at.start() + 5 : at.start() + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
    return data


@_changed
def segment(rng, data):
    """Huffman or quantisation tables, or the checksum or type of a chunk."""
    marks = [m.start() for m in re.finditer(b"\xff[\xc4\xdb\xda\xc0]|IDAT|IHDR|IEND", data)]
    if marks:
        at = rng.choice(marks) + rng.choice((2, 3, 4, 5, 20))
        data[at : at + rng.choice((1, 4, 16))] = rng.randbytes(4)
    return data


_FORMATS = {".bmp": "BMP", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGBA", "I;16"), "JPEG": ("L", "CMYK"), "BMP": ("1", "L", "P"),
    "TIFF": ("1", "L", "P", "RGBA", "I;16", "F", "CMYK", "LAB", "YCbCr"),
}  # fmt: skip


def mode(rng: Rng, file: Path) -> Path:
    """Another mode or format under the same name; floats may be no numbers."""
    form = rng.choice((_FORMATS.get(file.suffix.lower(), "JPEG"), "TIFF", "PNG"))
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    wanted, out = rng.choice(_MODES[form]), io.BytesIO()
    if wanted == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    elif wanted == "F":
        image = Image.fromarray(np.full((16, 24), rng.choice((np.nan, np.inf, -1e30)), np.float32))
    elif wanted == "LAB":
        image = Image.new("LAB", image.size)
    else:
        image = image.convert(wanted)
    keys = {"transparency": rng.randrange(2)} if wanted == "P" and form == "PNG" else {}
    image.save(out, form, **keys)
    return rewrite(file, out.getvalue())


def exif(rng: Rng, file: Path) -> Path:
    """EXIF data of any orientation, or none that can be read."""
    with Image.open(file) as opened:
        image, out = opened.convert("RGB"), io.BytesIO()
    tag = struct.pack("<HHIHH", 0x112, rng.choice((3, 2, 77)), rng.choice((1, 0, 2**31)),
                      rng.randrange(12), 0)  # fmt: skip
    data = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + tag + struct.pack("<I", rng.choice((0, 8, 9999)))
    if rng.random() < 0.4:
        data = b"Exif\0\0" + rng.randbytes(rng.choice((0, 3, 40)))
    image.save(out, rng.choice(("JPEG", "PNG")), exif=data)
    return rewrite(file, out.getvalue())


def tiff(rng: Rng, file: Path) -> Path:
    """A TIFF file whose directories run in circles or whose tags point anywhere."""
    tags = {256: (4, 24), 257: (4, 16), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, 8),
            277: (3, 1), 278: (4, 16), 279: (4, 384), 330: (4, 8), 34665: (4, 8)}  # fmt: skip
    for _ in range(rng.randrange(3)):
        tags[rng.choice(list(tags))] = rng.choice((3, 4, 12)), rng.choice((0, 2, 2**16, 2**32 - 1))
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    for tag, (kind, value) in sorted(tags.items()):
        data += struct.pack("<HHII", tag, kind, rng.choice((1, 1, 1, 0, 2**28)), value)
    return rewrite(file, data + struct.pack("<I", 8) + bytes(rng.choice((0, 384))))


@_changed
def bomb(rng, data):
    """A chunk of text that unpacks to much more."""
    text = b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))
    profile = b"iCCP", b"k\0\0" + zlib.compress(bytes(2**24))
    name, body = rng.choice((text, profile))
    chunk = struct.pack(">I", len(body)) + name + body
    if data[:4] == b"\x89PNG":
        data[33:33] = chunk + struct.pack(">I", zlib.crc32(name + body))
    return data


BYTES = (bits, header, truncated, zeros, inserted)
PICTURES = (*BYTES, huge, segment, mode, exif, tiff, bomb)


# --- lists


def _text(change):
    """A kind that maps text to text or bytes."""

    def kind(rng: Rng, file: Path) -> Path:
        made = change(rng, file.read_bytes().decode("latin-1"))
        data = made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")
        return rewrite(file, data)

    kind.__name__ = change.__name__
    return kind


@_text
def columns(rng, text):
    """Fields go, come, or change places, in all lines or in one."""
    lines = text.splitlines()
    chosen = rng.choice((range(len(lines)), [rng.randrange(len(lines) or 1)]))
    how = rng.randrange(4)
    for i in (i for i in chosen if lines):
        parts = re.split(r"([,;\s])", lines[i])
        parts = (parts[:-2], [*parts, ",x"], parts[2:], parts[::-1])[how]
        lines[i] = "".join(parts)
    return "\n".join(lines)


@_text
def lines(rng, text):
    rows = text.split("\n")
    at = rng.randrange(len(rows))
    how = rng.randrange(5)
    if how == 0:
        rows = rows[:1] * 2
    elif how == 1:
        rows[at:at] = rows[at : at + 1] * 3
    elif how == 2:
        rng.shuffle(rows)
    elif how == 3:
        del rows[at:]
    else:
        rows[at] *= 5000
    return "\n".join(rows)


@_text
def quotes(rng, text):
    for _ in range(rng.choice((1, 5))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(('"', '"', "'", '""', "\\", "\\u")) + text[at:]
    return text


@_text
def encoding(rng, text):
    return rng.choice((
        b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.encode() + b"\xff\xfe\x80",
        text.replace("\n", "\r\n").encode(), text.replace("\n", "\r").encode(),
        text.encode().replace(b"a", b"\xe4", 1), text.encode().replace(b"/", b"\0", 1),
        b"\xef\xbb\xbf" * 2 + text.encode(), text.replace("\n", "\x0b").encode(),
    ))  # fmt: skip


@_text
def nested(rng, text):
    depth = rng.choice((3, 100_000))
    deep = depth * "[" + depth * "]" if rng.random() < 0.5 else depth * '{"a":'
    return deep if rng.random() < 0.5 else re.sub(r'(?<=: )("[^"]*"|null)', deep, text, count=1)


@_text
def numbers(rng, text):
    found = list(re.finditer(r"-?\d+(\.\d+)?", text))
    for match in rng.sample(found, min(len(found), 2))[:1]:
        text = text[: match.start()] + rng.choice(NUMBERS) + text[match.end() :]
    return text


@_text
def paths(rng, text):
    """A path, word or field becomes another one."""
    found = list(re.finditer(r"[^\s,;\"]+", text))
    if not found:  # damaged twice
        return PATHS[0]
    match = rng.choice(found)
    other = rng.choice((*PATHS, rng.choice(found)[0], match[0].swapcase()))
    if "{" in text:  # as JSON writes it
        other = json.dumps(other)[1:-1]
    return text[: match.start()] + other + text[match.end() :]


@_text
def values(rng, text):
    """A value of JSON becomes one of another type."""
    found = list(re.finditer(r'(?<=: )("[^"]*"|[\w.]+)|(?<=\[)\{', text))
    if not found:
        return "null"
    match = rng.choice(found)
    other = rng.choice(("null", "[]", "{}", "3", '""', "true", "[[]]", '"x"', "Infinity", "NaN"))
    return text[: match.start()] + other + text[match.end() :]


TEXTS = (*BYTES, columns, lines, quotes, encoding, nested, numbers, paths, values)


# --- files and folders


def _removed(place: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def missing(rng: Rng, place: Path) -> Path:
    _removed(place)
    return place


def exchanged(rng: Rng, place: Path) -> Path:
    """A folder where a file is expected, or a file for a folder."""
    folder = place.is_dir()
    _removed(place)
    if folder:
        place.write_bytes(rng.choice((b"", b"x")))
    else:
        place.mkdir()
        if rng.random() < 0.5:
            (place / f"x{place.suffix}").write_bytes(b"x")
    return place


def suffix(rng: Rng, place: Path) -> Path:
    return place.rename(place.with_suffix(rng.choice((".png", ".jpg", ".JPG", ".tiff", ".x", ""))))


def named(rng: Rng, place: Path) -> Path:
    name = rng.choice(NAMES).format(place.stem)
    other = place.with_name(
        os.fsdecode(os.fsencode(name)[: 250 - len(place.suffix)]) + place.suffix
    )
    return place.rename(other)


def copied(rng: Rng, place: Path) -> Path:
    """A second file of a name that differs a little."""
    name = rng.choice(NAMES).format(place.stem) + rng.choice((place.suffix, ".bmp"))
    other = place.with_name(os.fsdecode(os.fsencode(name)[:255]))
    if not other.exists():
        if place.is_dir():
            shutil.copytree(place, other, symlinks=True)
        else:
            shutil.copy(place, other)
    return other


def linked(rng: Rng, place: Path) -> Path:
    """A link to nothing, to itself, to a device, or to another place of the tree."""
    others = [p for p in place.parent.iterdir() if p != place]
    target = rng.choice((
        "nowhere", place.name, "/dev/zero", "/dev/null", "/proc/self/mem", *map(str, others[:3]),
    ))  # fmt: skip
    _removed(place)
    place.symlink_to(target)
    return place


def loops(rng: Rng, place: Path) -> Path:
    """Links that lead from folder to folder for ever."""
    folder, base = place if place.is_dir() else place.parent, place.parent
    for i in range(rng.choice((1, 2, 5))):
        target = rng.choice((".", "..", str(base), str(base.parent), str(folder)))
        (folder / f"loop{i}").symlink_to(target)
    for i in range(rng.choice((0, 3))):
        for name, other in (("left", "right"), ("right", "left")):
            side = folder / name
            side.mkdir(exist_ok=True)
            (side / f"{i}").symlink_to(f"../{other}")
    return folder


def queue(rng: Rng, place: Path) -> Path:
    """A named pipe, in which nobody ever writes."""
    _removed(place)
    os.mkfifo(place)
    return place


def unreadable(rng: Rng, place: Path) -> Path:
    """Of no effect where everything may be read."""
    if not place.is_dir():
        rewrite(place, place.read_bytes())
    place.chmod(rng.choice((0, 0o200)))
    return place


PLACES = (missing, exchanged, suffix, named, copied, linked, loops, queue, unreadable)


def damaged(rng: Rng, root: Path) -> tuple[str, Path]:
    """Damage a file or folder below a root once; the name of the kind, and the path."""
    every = sorted(p for p in root.rglob("*") if p.is_dir() or p.is_file())
    if not every:
        return "nothing left", root
    lists = [p for p in every if p.suffix in LISTS and p.is_file()]
    pictures = [p for p in every if p.suffix.lower() in IMAGES and p.is_file()]
    choice = rng.random()
    if lists and choice < 0.3:
        file, kinds = rng.choice(lists), TEXTS
    elif pictures and choice < 0.7:
        file, kinds = rng.choice(pictures), PICTURES
    elif choice < 0.75 and (plain := [p for p in every if p.is_file()]):
        file, kinds = rng.choice(plain), BYTES
    else:
        file, kinds = rng.choice(every), PLACES
    kind = rng.choice(kinds)
    try:
        return kind.__name__, kind(rng, file)
    except (OSError, ValueError) as problem:  # a name that is taken, pixels that no format holds
        return f"{kind.__name__} impossible ({type(problem).__name__})", file
