"""A file is the old one or the new one, whatever happens in between."""

import os
import signal
import subprocess
import sys

import pytest

from tinydet.atomic import create_text, replacing, write_text


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".txt"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, pathlib, signal\n"
        "from tinydet.atomic import replacing\n"
        f"with replacing(pathlib.Path({str(path)!r})) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_write_text__utf8_whatever_the_system_has(tmp_path):
    code = (
        "import pathlib, sys, tinydet.atomic as atomic\n"
        "atomic.write_text(pathlib.Path(sys.argv[1]), '\\u00b1 \\u732b')"
    )
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x"], env={**os.environ, **ascii_only}, check=True
    )
    assert (tmp_path / "x").read_bytes() == "± 猫".encode()


def test_create_text__of_many_processes_the_first_one_s_stays(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    code = (
        "import pathlib, sys\n"
        "from tinydet.atomic import create_text\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "sys.stdin.readline()\n"
        "create_text(path, sys.argv[2] * 100_000)\n"
        "print(path.read_text()[:1] + str(len(set(path.read_text()))))\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path, letter], **pipes) for letter in "abcdef"
    ]
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    read = {writer.communicate()[0] for writer in writers}
    assert len(read) == 1  # All read the same letter, and nothing else.
    assert read.pop()[1:] == "1\n"
    assert list(path.parent.iterdir()) == [path]


def test_create_text__without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    create_text(tmp_path / "a", "one")
    create_text(tmp_path / "a", "two")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["one"]
