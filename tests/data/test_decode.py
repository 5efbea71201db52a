"""Modes of image files: what is accepted, what is refused, what a declared loss does."""

import numpy as np
import pytest
from PIL import Image

from dsad.core.errors import DataError
from dsad.data.decode import MaskRule, read_image, read_mask
from tests.data import trees


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
    import struct
    import zlib

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\x00" + struct.pack(">HHH", 1000, 2000, 65535))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def refused(folder, mode, name="a.png"):
    with pytest.raises(DataError, match=rf"{name}: \[K3\] image mode {mode}: expected 8-bit"):
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
