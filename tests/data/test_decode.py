"""Modes of image files: what is accepted, what is refused, what a declared loss does."""

import concurrent.futures
import io
import multiprocessing
import pathlib
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from dsad.core.errors import DataError
from dsad.data import decode, files
from dsad.data.decode import MaskRule, read_image, read_mask
from tests.data import trees

STATUS = pathlib.Path("/proc/self/statm")


def written(folder, image, name="a.png", **kwargs):
    image.save(folder / name, **kwargs)
    return folder


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_lossless_modes(tmp_path, mode):
    image = Image.fromarray(trees.pixels(0))
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    pixels, found = read_image(written(tmp_path, image), "a.png")
    assert found == mode
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def png16_rgb():
    """A valid 16-bit RGB PNG (1×1): Pillow reads it as 8 bit without a word."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\x00" + struct.pack(">HHH", 1000, 2000, 65535))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def refused(folder, mode, name="a.png"):
    told = (
        rf"{name}: \[K3\] image mode {mode}: expected 8-bit.*--config.data.lossy=\"\('{mode}',\)\""
    )
    with pytest.raises(DataError, match=told):
        read_image(folder, name)


def test_lossy_modes_are_refused(tmp_path):
    rgb = Image.fromarray(trees.pixels(0))
    refused(written(tmp_path, rgb.convert("RGBA")), "RGBA")
    refused(written(tmp_path, rgb.convert("LA")), "LA")
    refused(written(tmp_path, rgb.convert("CMYK"), "b.jpg"), "CMYK", "b.jpg")
    refused(written(tmp_path, rgb.convert("F"), "c.tif"), "F", "c.tif")
    refused(written(tmp_path, Image.fromarray(np.zeros((4, 4), np.uint16))), "I;16")
    refused(written(tmp_path, rgb.quantize(4), "d.png", transparency=0), "RGBA", "d.png")
    (tmp_path / "e.png").write_bytes(png16_rgb())
    refused(tmp_path, "RGB;16", "e.png")


def test_declared_loss(tmp_path):
    values = np.asarray([[0, 128, 257, 32768, 65535]], np.uint16)
    written(tmp_path, Image.fromarray(values))
    pixels, _ = read_image(tmp_path, "a.png", ("I;16",))
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, -1))
    rgba = np.concatenate([trees.pixels(0), np.full((16, 24, 1), 9, np.uint8)], -1)
    written(tmp_path, Image.fromarray(rgba), "b.png")
    pixels, _ = read_image(tmp_path, "b.png", ("RGBA",))
    np.testing.assert_array_equal(pixels, rgba[..., :3])  # alpha dropped, nothing composited


def test_mask_rules(tmp_path):
    written(tmp_path, Image.fromarray(np.asarray([[0, 127, 128, 255]], np.uint8)))
    soft = MaskRule(threshold=127, values=None)
    np.testing.assert_array_equal(read_mask(tmp_path, "a.png", soft), [[0, 0, 1, 1]])
    with pytest.raises(DataError, match=r"a.png: \[K4\] mask values 0, 127, 128, 255: expected"):
        read_mask(tmp_path, "a.png", MaskRule())
    written(tmp_path, Image.fromarray(np.eye(4) > 0), "b.png")
    np.testing.assert_array_equal(read_mask(tmp_path, "b.png", MaskRule()), np.eye(4) > 0)


def test_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"a.png: \[K8\] cannot be decoded"):
        read_image(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"gone.png: \[K8\]"):
        read_image(tmp_path, "gone.png")


# --- whatever a decoder trips over


@pytest.mark.parametrize(
    "problem",
    [KeyError("x"), OverflowError(), struct.error("odd"), RecursionError(), MemoryError(),
     SyntaxError("not there"), ZeroDivisionError(), AssertionError()],
    ids=lambda problem: type(problem).__name__,
)  # fmt: skip
def test_any_exception_of_a_decoder_names_the_file(tmp_path, monkeypatch, problem):
    written(tmp_path, Image.fromarray(trees.pixels(0)), "a.png")

    def failing(*_):
        raise problem

    monkeypatch.setattr(Image.Image, "load", failing)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", failing)
    with pytest.raises(DataError, match=r"a.png: \[K8\] cannot be decoded: \S"):
        read_image(tmp_path, "a.png")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(9))
def test_images_are_turned_as_their_exif_says(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(read_image(tmp_path, "a.png")[0], np.asarray(want))
    assert want.size == ((16, 24) if orientation > 4 else (24, 16))
    grey = encoded(kind, exif=exif, mode="L")
    (tmp_path / "b.png").write_bytes(grey)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(grey)))
    mask = read_mask(tmp_path, "b.png", MaskRule(values=None))
    np.testing.assert_array_equal(mask, np.asarray(want) > 127)


def test_other_formats_are_refused_whatever_the_suffix(tmp_path):
    image = Image.fromarray(trees.pixels(0))
    for kind in ("GIF", "DDS", "WEBP"):
        if kind != "WEBP" or features.check("webp"):
            written(tmp_path, image, "a.png", format=kind)
            with pytest.raises(DataError, match="no image of the formats BMP, JPEG, PNG, TIFF"):
                read_image(tmp_path, "a.png")
    for kind in decode.FORMATS:  # one of these under the suffix of another is read
        written(tmp_path, image, "b.jpg", format=kind)
        assert read_image(tmp_path, "b.jpg")[0].shape == (16, 24, 3)
    named = {Image.registered_extensions()[suffix] for suffix in files.IMAGE_SUFFIXES}
    assert named == set(decode.FORMATS)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_absurd_size_is_refused_by_the_header(tmp_path, monkeypatch):
    data = io.BytesIO()
    Image.new("1", (11586, 11586)).save(data, "PNG")  # 134 million pixels in 17 kB
    (tmp_path / "a.png").write_bytes(data.getvalue())
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"a.png: \[K8\].*11586×11586 pixels.*134,217,728; cut"):
        read_image(tmp_path, "a.png")


def encoded(kind, **kwargs):
    mode = kwargs.pop("mode", "RGB")
    file = io.BytesIO()
    Image.fromarray(trees.pixels(0)).convert(mode).save(file, kind, **kwargs)
    return file.getvalue()


def mutants(count, seed):
    """Encoded images with bytes changed, cut out or repeated, mostly near their headers."""
    rng = random.Random(seed)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "x" * 40, 0x011A: 72.0})
    kinds = [
        encoded("PNG"), encoded("PNG", exif=exif), encoded("PNG", mode="P"), encoded("BMP"),
        encoded("JPEG"), encoded("JPEG", exif=exif), encoded("JPEG", progressive=True),
        encoded("TIFF"), encoded("TIFF", exif=exif), encoded("TIFF", compression="tiff_lzw"),
        encoded("TIFF", mode="1", compression="group4"), encoded("DDS"),
        *([encoded("WEBP")] if features.check("webp") else []),
    ]  # fmt: skip
    words = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\x20\0")
    for number in range(count):
        data = bytearray(kinds[number % len(kinds)])
        for _ in range(rng.choice((1, 2, 4, 8))):
            at = rng.randrange(min(len(data), rng.choice((64, 256, len(data)))))
            change = rng.random()
            if change < 0.5:
                data[at] = rng.randrange(256)
            elif change < 0.7:
                data[at : at + 4] = rng.choice(words)
            elif change < 0.85:
                del data[at + 1 : at + rng.randrange(1, 20)]
            else:
                data[at:at] = data[at : at + rng.randrange(1, 30)]
        yield bytes(data)


def survived(folder, count, seed):
    """How many mutants are read as images; any exception but DataError comes through."""
    good, named = 0, []
    lossy = ("RGBA", "LA", "PA", "I;16", "RGB;16", "CMYK", "YCbCr", "LAB", "I", "F")
    for data in mutants(count, seed):
        (folder / "a.png").write_bytes(data)
        for read, given in ((read_image, (lossy,)), (read_mask, (MaskRule(),))):
            try:
                read(folder, "a.png", *given)
                good += read is read_image
            except DataError as error:
                named.append(str(error).startswith("a.png: [K"))
    assert all(named)
    return good


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused(tmp_path):
    assert 60 < survived(tmp_path, 400, seed=0) < 340


def grown(folder):
    """Bytes by which mutants let this process grow, after the first of them."""
    warnings.simplefilter("ignore")
    survived(folder, 500, seed=1)
    before = held()
    survived(folder, 10_000, seed=2)
    return held() - before


def held():
    """Bytes of memory of this process."""
    return int(STATUS.read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="this system does not tell a process's memory")
def test_mutated_files_leave_no_memory_behind(tmp_path):
    """In a process of their own: other tests free and take memory, too."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(grown, tmp_path).result() < 200e6
