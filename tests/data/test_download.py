import functools
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from tinydet.data.download import Archive, DownloadError, download_voc07, main, unpack

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "download_voc07.sh"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; a Range request gets the rest of the file, if the server knows ranges."""

    def do_GET(self):
        data = self.server.files.get(self.path)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.requests.append((self.path, int(wanted[1]) if wanted else None))
        if data is None:
            self.send_error(404)
            return
        start = int(wanted[1]) if wanted and self.server.ranges else 0
        if wanted and self.server.ranges and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + (self.server.cut or len(data))])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    httpd.files, httpd.requests, httpd.ranges, httpd.cut = {}, [], True, None
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def tar(members):
    """Return a tar of {name: text} as bytes; a TarInfo as the text is added as it is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, text in members.items():
            if isinstance(text, tarfile.TarInfo):
                file.addfile(text)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(text)
            file.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def voc(split, **more):
    base = "VOCdevkit/VOC2007"
    members = {
        f"{base}/ImageSets/Main/{split}.txt": f"{split}1\n",
        f"{base}/JPEGImages/{split}1.jpg": "x" * 50_000,
        f"{base}/Annotations/{split}1.xml": "<annotation/>",
    }
    return tar({**members, **more})


@pytest.fixture
def archives(server):
    found = []
    for split in ("trainval", "test"):
        data = voc(split)
        server.files[f"/{split}.tar"] = data
        found.append(Archive(f"{split}.tar", hashlib.md5(data).hexdigest(), split))
    return found


@pytest.fixture
def download(server, archives, tmp_path):
    root = tmp_path / "datasets"
    return functools.partial(download_voc07, root, hosts=[server.url], archives=archives)


def check(target):
    for split in ("trainval", "test"):
        assert (target / "ImageSets/Main" / f"{split}.txt").read_text() == f"{split}1\n"
        assert len((target / "JPEGImages" / f"{split}1.jpg").read_text()) == 50_000
        assert (target / "Annotations" / f"{split}1.xml").is_file()
    # No archives, partial downloads or scratch folders are left.
    assert [p.name for p in target.parents[1].iterdir()] == ["VOCdevkit"]


def test_download_voc07__fetches_what_is_missing(server, download):
    target = download()
    check(target)
    assert server.requests == [("/trainval.tar", None), ("/test.tar", None)]
    download()
    assert len(server.requests) == 2
    (target / "ImageSets/Main/test.txt").unlink()
    download()
    assert server.requests[2:] == [("/test.tar", None)]
    check(target)


@pytest.mark.parametrize("ranges", [True, False])
def test_download_voc07__continues_a_partial_download(server, archives, download, ranges):
    server.cut = 20_000  # the connection breaks after this many bytes
    with pytest.raises(DownloadError, match=r"trainval\.tar"):
        download()
    server.cut, server.ranges = None, ranges
    target = download()
    check(target)
    assert server.requests[1] == ("/trainval.tar", 20_000)
    assert archives[0].name not in {p.name for p in target.parents[1].iterdir()}


def test_download_voc07__partial_file_that_is_whole_already(server, download):
    root = download.args[0]
    root.mkdir()
    (root / "trainval.tar.part").write_bytes(server.files["/trainval.tar"])
    check(download())


def test_download_voc07__wrong_checksum(server, download):
    good = server.files["/trainval.tar"]
    server.files["/trainval.tar"] = good[:-1] + b"!"
    with pytest.raises(DownloadError, match="wrong checksum"):
        download()
    root = download.args[0]
    assert list(root.iterdir()) == []
    # What was wrong is not continued.
    server.files["/trainval.tar"] = good
    check(download())
    assert server.requests[1] == ("/trainval.tar", None)


def test_download_voc07__next_host(server, archives, tmp_path):
    hosts = [server.url + "not/here/", "http://127.0.0.1:9/", server.url]
    check(download_voc07(tmp_path / "d", hosts=hosts, archives=archives))


def test_download_voc07__archive_put_there_by_hand(server, archives, tmp_path):
    root = tmp_path / "datasets"
    root.mkdir()
    for archive in archives:
        (root / archive.name).write_bytes(server.files[f"/{archive.name}"])
    check(download_voc07(root, hosts=["http://127.0.0.1:9/"], archives=archives))
    assert server.requests == []

    (root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    (root / "test.tar").write_bytes(b"something else")
    with pytest.raises(DownloadError, match=r"test\.tar: wrong checksum; delete it"):
        download_voc07(root, hosts=[server.url], archives=archives)


def test_download_voc07__no_network_says_what_to_do_by_hand(archives, tmp_path):
    host = "http://127.0.0.1:9/"
    with pytest.raises(DownloadError) as caught:
        download_voc07(tmp_path / "d", hosts=[host], archives=archives)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{host}trainval.tar by hand" in message
    assert f"{tmp_path / 'd'}/" in message


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        {"../escaped.txt": "x"},
        {"VOCdevkit/../../escaped.txt": "x"},
        {"a": link("VOCdevkit/link", "/etc", tarfile.SYMTYPE)},
        {"a": link("VOCdevkit/link", "../../escaped.txt", tarfile.SYMTYPE)},
        {"a": link("VOCdevkit/link", "VOCdevkit/VOC2007/Annotations/test1.xml", tarfile.LNKTYPE)},
        {"a": link("VOCdevkit/pipe", "", tarfile.FIFOTYPE)},
    ],
)
def test_unpack__refuses_what_leads_out_of_the_folder(tmp_path, member):
    folder = tmp_path / "datasets"
    folder.mkdir()
    (tmp_path / "a.tar").write_bytes(voc("test", **member))
    with pytest.raises(DownloadError, match=r"a\.tar: .*(link|unpacked)"):
        unpack(tmp_path / "a.tar", folder)
    assert list(folder.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "datasets"]


def test_unpack__absolute_paths_stay_inside(tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    (tmp_path / "a.tar").write_bytes(tar({f"{tmp_path}/escaped.txt": "x"}))
    unpack(tmp_path / "a.tar", folder)
    assert not (tmp_path / "escaped.txt").exists()


def test_unpack__not_a_tar(tmp_path):
    (tmp_path / "a.tar").write_text("<html>" * 1000)
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        unpack(tmp_path / "a.tar", tmp_path)


def test_main__one_line_and_status_2(tmp_path, capsys, monkeypatch):
    def fail(root):
        raise DownloadError(f"cannot download into {root}")

    monkeypatch.setattr("tinydet.data.download.download_voc07", fail)
    assert main(["--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: cannot download into {tmp_path}\n"


def test_download_script__runs_from_anywhere(tmp_path):
    result = subprocess.run(
        ["bash", str(SCRIPT), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--root" in result.stdout
