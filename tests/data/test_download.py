"""The download of VOC 2007, with the archives of a fake torchvision."""

import os
import subprocess
import sys
import tarfile
import urllib.error
from pathlib import Path

import pytest
from torchvision.datasets import utils

from tinydet.data.download import DownloadError, download_voc07

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "download_voc07.sh"
PARTS = ("Annotations/{}.xml", "ImageSets/Main/{}.txt", "JPEGImages/{}.jpg")


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Let torchvision's download write a small archive; returns the names of those it wrote."""
    names = []

    def write(url, folder, filename, md5):
        assert url.startswith("http")
        assert len(md5) == 32
        split = "test" if "test" in filename else "trainval"
        names.append(filename)
        content = tmp_path / "content"
        content.write_text(split)
        with tarfile.open(Path(folder) / filename, "w") as tar:
            for part in PARTS:
                tar.add(content, f"VOCdevkit/VOC2007/{part.format(split)}")

    monkeypatch.setattr(utils, "download_url", write)
    return names


def files(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_download_voc07__fetches_what_is_missing(downloads, tmp_path):
    root = tmp_path / "datasets"
    target = download_voc07(root)
    assert target == root / "VOCdevkit" / "VOC2007"
    expected = [p.format(split) for p in PARTS for split in ("test", "trainval")]
    # The archives and what they were unpacked in are gone.
    assert files(root) == [f"VOCdevkit/VOC2007/{part}" for part in sorted(expected)]
    assert (target / "ImageSets/Main/test.txt").read_text() == "test"
    assert [name[:7] for name in downloads] == ["VOCtrai", "VOCtest"]
    (target / "ImageSets/Main/test.txt").unlink()
    download_voc07(root)
    assert [name[:7] for name in downloads] == ["VOCtrai", "VOCtest", "VOCtest"]


def test_download_voc07__interrupted_while_moving_is_not_taken_for_complete(
    downloads, tmp_path, monkeypatch
):
    rename = os.rename

    def interrupted(source, target):
        if "JPEGImages" in str(target):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_voc07(tmp_path / "datasets")
    assert not list((tmp_path / "datasets").rglob("*.txt"))
    download_voc07(tmp_path / "datasets")
    assert len(files(tmp_path / "datasets")) == 6
    assert len(downloads) == 3


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("File not found or corrupted.")]
)
def test_download_voc07__failure_says_what_to_do_by_hand(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(utils, "download_url", fail)
    says = r"cannot download VOCtrainval.*(no route|corrupted).*http.*trainval.*by hand.*datasets/"
    with pytest.raises(DownloadError, match=says):
        download_voc07(tmp_path / "datasets")
    assert files(tmp_path) == []


def test_download_voc07__folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot download"):
        download_voc07(tmp_path / "file")


@pytest.mark.slow
def test_download_script__without_a_network_is_one_line_and_status_2(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    # A proxy that nobody listens at, with or without a network.
    environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        ["bash", SCRIPT, "--root", tmp_path], env=environment, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.decode().strip().splitlines()
    assert line.startswith("error: cannot download VOCtrainval")
