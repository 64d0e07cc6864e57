"""What pillow's modes and files of more than 8 bits become, by the definition of each."""

import colorsys
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from tinydet.data.builder import check_image
from tinydet.data.image import read_image, rgb_pixels
from tinydet.data.problems import Problems

LEVELS = np.array([[0, 16, 128, 255]], dtype=np.uint8)
COLORS = np.array([[[255, 0, 0], [0, 255, 0], [10, 20, 200], [90, 90, 90]]], dtype=np.uint8)


def converted(image):
    return rgb_pixels(image, b"", deep=False)[0].tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA"])
def test_rgb_pixels__grey_modes(mode):
    grey = Image.fromarray(np.array([[0, 255, 0, 255]] if mode == "1" else LEVELS, dtype=np.uint8))
    expected = [[v] * 3 for v in np.asarray(grey)[0].tolist()]
    assert converted(grey.convert(mode)) == expected


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK"])
def test_rgb_pixels__colour_modes(mode):
    image = Image.fromarray(COLORS)
    image = image.quantize(4, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    assert converted(image) == COLORS[0].tolist()


def test_rgb_pixels__colour_spaces_by_their_formulas():
    hsv = Image.fromarray(np.array([[[85, 255, 200], [0, 0, 77]]], dtype=np.uint8), "HSV")
    exact = [colorsys.hsv_to_rgb(h / 255, s / 255, v / 255) for h, s, v in np.asarray(hsv)[0]]
    np.testing.assert_allclose(converted(hsv), np.array(exact) * 255, atol=2)

    ycc = Image.fromarray(np.array([[[76, 85, 255], [90, 128, 128]]], dtype=np.uint8), "YCbCr")
    np.testing.assert_allclose(converted(ycc), [[254, 0, 0], [90, 90, 90]], atol=2)  # JFIF

    lab = ImageCms.applyTransform(
        Image.fromarray(COLORS),
        ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        ),
    )
    np.testing.assert_allclose(converted(lab), COLORS[0], atol=20)  # 8 bits of LAB


def test_rgb_pixels__alpha_is_dropped():
    rgba = np.dstack([COLORS, np.array([[0, 1, 128, 255]], dtype=np.uint8)])
    assert converted(Image.fromarray(rgba)) == COLORS[0].tolist()
    palette = Image.fromarray(COLORS).quantize(4, dither=Image.Dither.NONE)
    palette.info["transparency"] = b"\0\1\2\3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow's, and `read_image` ignores it
        assert converted(palette) == COLORS[0].tolist()


def test_rgb_pixels__premultiplied_grey_is_refused():
    with pytest.raises(ValueError, match="La"):  # pillow converts it to nothing, and no file has it
        converted(Image.fromarray(LEVELS).convert("LA").convert("La"))


def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(values, bits=None):
    """Encode (H, W) or (H, W, 3) uint16 values as a PNG that perhaps states significant bits."""
    height, width, *channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    stated = chunk(b"sBIT", bytes([bits] * (3 if channels else 1))) if bits else b""
    parts = [
        chunk(b"IHDR", header),
        stated,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read(path):
    """Read an image in each of the ways that there are, and return its grey levels."""
    problems = Problems()
    assert check_image("a", path, None, problems) is not None, problems.examples
    image = read_image(path)
    assert (read_image(path, True, 4) == image).all()
    assert (image == image[:1]).all()
    return image[0, 0].tolist()


RAMP = np.array([[0, 1 / 256, 1 / 4, 1 / 2, 1]])


@pytest.mark.parametrize(
    ("dtype", "order"),
    # Pillow reads no uint32 of the other order.
    [(f"{order}{kind}", order) for order in "<>" for kind in ("u2", "i2", "i4")] + [("<u4", "<")],
)
def test_read_image__integer_tiff_is_scaled_from_its_type(tmp_path, dtype, order):
    top = np.iinfo(dtype).max
    path = tmp_path / "a.tif"
    write_tiff(path, np.minimum(RAMP * (float(top) + 1), top).astype(dtype), order)
    assert read(path) == [0, 1, 64, 128, 255]


def write_tiff(path, values, order="<", bits=None, photometric=1, width=None):
    """Write a grey TIFF by the book: one strip, one directory."""
    data = values.tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height = len(values)
    entries = [
        (256, 4, width or values.shape[1]),
        (257, 4, height),
        (258, 3, bits or values.itemsize * 8),
    ]
    entries += [(259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, height)]
    entries += [(279, 4, len(data)), (339, 3, kind)]
    pack = {3: f"{order}HHIHxx", 4: f"{order}HHII"}
    directory = b"".join(struct.pack(pack[t], tag, t, 1, value) for tag, t, value in entries)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    count = struct.pack(f"{order}H", len(entries))
    path.write_bytes(head + data + count + directory + b"\0\0\0\0")


def test_read_image__negative_values_are_black(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, np.array([[-5, -(2**31), 2**30, 2**31 - 1]], dtype=np.int32))
    assert read(path) == [0, 0, 128, 255]


def test_read_image__tiff_of_twelve_bits(tmp_path):
    path = tmp_path / "a.tif"
    packed = np.frombuffer(bytes.fromhex("000800FFF400"), np.uint8)[None]
    write_tiff(path, packed, bits=12, width=4)  # 0x000, 0x800, 0xFFF, 0x400
    assert read(path) == [0, 128, 255, 64]


def test_read_image__white_is_zero(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, np.array([[0, 256 * 55, 65535]], dtype=np.uint16), photometric=0)
    assert read(path) == [255, 200, 0]


def test_read_image__floats_from_0_to_1(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, np.array([[0, 0.2, 0.5, 1]], dtype=np.float32))
    assert read(path) == [0, 51, 128, 255]


@pytest.mark.parametrize("values", [[0, 300], [-0.5, 1], [float("nan"), 1], [0, float("inf")]])
def test_read_image__other_floats_are_refused(tmp_path, values):
    path = tmp_path / "a.tif"
    write_tiff(path, np.array([values], dtype=np.float32))
    with pytest.raises(ValueError, match=r"a\.tif: .*floats have to be from 0 to 1"):
        read_image(path)


def test_read_image__png_of_twelve_bits(tmp_path):
    path = tmp_path / "a.png"
    raw = np.array([[0, 16, 1024, 2048, 4095]], dtype=np.uint16)
    path.write_bytes(png(raw, bits=12))
    assert read(path) == [0, 1, 64, 128, 255]
    # By the standard the samples are scaled up to 16 bits whatever their number was before.
    path.write_bytes(png(raw << 4 | raw >> 8, bits=12))
    assert read(path) == [0, 1, 64, 128, 255]
    path.write_bytes(png(raw << 4))
    assert read(path) == [0, 1, 64, 128, 255]


@pytest.mark.parametrize(
    "write",
    [
        lambda path, values: path.write_bytes(png(values)),
        lambda path, values: path.write_bytes(png(np.dstack([values] * 3))),
        lambda path, values: path.write_bytes(png(np.dstack([values] * 3), bits=12)),
        lambda path, values: write_tiff(path, values),
        lambda path, values: write_tiff(path, values.astype(np.int32)),
        lambda path, values: write_tiff(path, values.astype(np.float32) / 65535),
    ],
)
def test_check_image__what_would_be_nearly_black_is_left_out_and_told(tmp_path, write):
    path = tmp_path / "a.png"
    write(path, np.array([[0, 1000, 4095]], dtype=np.uint16))
    problems = Problems()
    assert check_image("a", path, None, problems) is None
    (told,) = problems.examples["bad_image"]
    assert told.startswith("a: ")
    assert "nearly black; scale" in told
    with pytest.raises(ValueError, match=r"a\.png: .*nearly black"):
        read_image(path)


def test_check_image__dark_eight_bits_stay(tmp_path):
    for suffix in ("png", "tif", "jpg"):
        path = tmp_path / f"a.{suffix}"
        Image.new("RGB", (16, 16), (3, 3, 3)).save(path)
        assert check_image("a", path, None, Problems()) is not None
