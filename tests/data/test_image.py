import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tinydet.data.image import files_below, find_images, probe_image, read_image


def gradient(height=40, width=60):
    ys, xs = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([xs * 4, ys * 6, 255 - xs * 4], -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_read_image__jpeg_modes_like_pillow(tmp_path, mode):
    path = tmp_path / "a.jpg"
    gradient().convert(mode).save(path, quality=95)
    image = read_image(path)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 40, 60)
    assert np.abs(image.numpy().astype(int) - expected).max() <= 2
    assert probe_image(path).mode == mode


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", ".png"), ("P", ".png"), ("RGB", ".bmp")])
def test_read_image__other_formats(tmp_path, mode, suffix):
    path = tmp_path / f"a{suffix}"
    source = gradient().convert(mode)
    source.save(path)
    expected = np.asarray(source.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(path).numpy(), expected)


def test_read_image__sixteen_bits_are_scaled(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 256 * 7, 65535]], dtype=np.uint16)).save(path)
    assert read_image(path)[0].tolist() == [[0, 7, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image__orientation_only_when_asked(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient().save(path, exif=exif, quality=95)
    stored = np.asarray(Image.open(path)).transpose(2, 0, 1)
    rotated = np.asarray(ImageOps.exif_transpose(Image.open(path))).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(path).numpy(), stored)
    np.testing.assert_array_equal(read_image(path, orientation=True).numpy(), rotated)
    assert probe_image(path).orientation == orientation
    assert probe_image(path).rotated_size == rotated.shape[1:]


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("size", [(40, 60), (41, 63)])
def test_read_image__reduced_jpeg_is_like_the_mean_of_its_blocks(tmp_path, reduction, size):
    path = tmp_path / "a.jpg"
    gradient(*size).save(path, quality=95, subsampling=0)
    image = read_image(path, reduction=reduction).double()
    assert image.shape == (3, *(-(-side // reduction) for side in size))
    whole = read_image(path).double()
    tall, wide = (side // reduction for side in size)  # of whole pixels
    whole = whole[:, : tall * reduction, : wide * reduction]
    means = whole.reshape(3, tall, reduction, wide, reduction).mean((2, 4))
    assert (image[:, :tall, :wide] - means).abs().max() < 4
    grey = tmp_path / "grey.jpg"
    gradient(*size).convert("L").save(grey)
    assert read_image(grey, reduction=reduction).shape == image.shape


def test_read_image__only_jpeg_is_reduced(tmp_path):
    path = tmp_path / "a.png"
    gradient().save(path)
    assert torch.equal(read_image(path, reduction=4), read_image(path))


def encoded(file_format):
    buffer = io.BytesIO()
    gradient().save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.8])
def test_probe_image__finds_truncated_files(tmp_path, file_format, kept):
    data = encoded(file_format)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert probe_image(path).size == (40, 60)
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"a\.jpg|not a readable image"):
        probe_image(path)
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be decoded") as caught:
        read_image(path)
    assert " at 0x" not in str(caught.value)  # the address of an object of ours


def test_probe_image__bytes_after_the_end_do_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    for tail in (b"\0" * 40, b"trailing text of some camera" * 10):
        path.write_bytes(encoded("JPEG") + tail)
        assert probe_image(path).size == (40, 60)


def test_probe_image__not_an_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="not a readable image"):
        probe_image(path)


def test_find_images__files_folders_and_patterns(tmp_path):
    names = ["b.png", "a.JPG", "notes.txt", "a_detections.jpg", ".hidden.jpg", "odd[1].jpg"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    inside = [tmp_path / name for name in ("a.JPG", "b.png", "odd[1].jpg")]
    assert find_images([tmp_path]) == inside
    assert find_images([tmp_path / "b.png", tmp_path]) == [inside[1], inside[0], inside[2]]
    assert find_images([tmp_path / "*.[jp][pn]g"]) == [
        tmp_path / name for name in ("a_detections.jpg", "b.png", "odd[1].jpg")
    ]
    # Whatever is named is taken, brackets and all.
    for name in ("notes.txt", "a_detections.jpg", "odd[1].jpg"):
        assert find_images([tmp_path / name]) == [tmp_path / name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.jpg", r"gone\.jpg: no such image file"),
        ("*.webp", "no file matches this pattern"),
        ("empty", "empty: no images in this folder"),
    ],
)
def test_find_images__what_means_none_is_named(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=says):
        find_images([tmp_path / name])


@pytest.mark.parametrize("suffix", [".jfif", ".gif", ".jp2", ".avif", ".webp"])
def test_find_images__formats_that_are_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    kind = Image.registered_extensions()[suffix]
    if kind not in Image.SAVE:
        pytest.skip(f"this pillow has no {kind}")
    source = gradient().quantize(16) if suffix == ".gif" else gradient()
    more = {"save_all": True, "append_images": [source.rotate(180)]} if kind == "GIF" else {}
    source.save(path, **more)
    assert find_images([tmp_path]) == [path]
    assert probe_image(path).size == (40, 60)
    expected = np.asarray(source.convert("RGB")).astype(int).transpose(2, 0, 1)
    assert np.abs(read_image(path).numpy() - expected).mean() < 6  # of an animation the first image


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [100, 2000])
def test_read_image__large_images_are_read_without_a_word(tmp_path, monkeypatch, limit):
    path = tmp_path / "a.png"
    gradient().save(path)
    # Above its limit pillow warns, and above twice that it refuses.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert probe_image(path).size == (40, 60)
    assert read_image(path).shape == (3, 40, 60)
    assert limit == Image.MAX_IMAGE_PIXELS, "other code of the process keeps its protection"


@pytest.mark.filterwarnings("error")
def test_probe_image__more_than_179_megapixels(tmp_path):
    path = tmp_path / "a.jpg"
    data = encoded("JPEG")
    size = data.index(b"\xff\xc0") + 5  # of the frame header: height and width
    path.write_bytes(data[:size] + (13_500).to_bytes(2, "big") * 2 + data[size + 4 :])
    assert probe_image(path).size == (13_500, 13_500)


def test_read_image__too_large_for_the_memory_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    gradient().save(path)
    monkeypatch.setattr("tinydet.data.image.machine_memory", lambda: 40 * 60 * 16 - 1)
    for read in (probe_image, read_image):
        with pytest.raises(ValueError, match="60x40 pixels are too many for the memory"):
            read(path)
    monkeypatch.setattr("tinydet.data.image.machine_memory", lambda: 40 * 60 * 16)
    assert probe_image(path).size == (40, 60)


def test_files_below__links_to_folders_are_followed_but_not_in_circles(tmp_path):
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for path in (folder / "b" / "2.jpg", folder / "1.jpg", elsewhere / "3.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "a").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "b" / "circle").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    assert files_below(folder) == ["1.jpg", "a/3.jpg", "again/3.jpg", "b/2.jpg"]
