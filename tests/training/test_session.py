import subprocess
import sys

import pytest
import torch

from tinydet import __version__
from tinydet.training.session import git_state, this_session


def _git(folder, *arguments):
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    _git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_checkout_is_clean_or_changed(checkout):
    commit = _git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == f"commit {commit}, clean"
    (checkout / "file").write_text("b")
    assert git_state(checkout) == f"commit {commit}, 1 file changed or new"
    (checkout / "new").touch()
    assert git_state(checkout) == f"commit {commit}, 2 files changed or new"


def test_settings_of_the_checkout_run_no_program(checkout):
    ran = checkout / "ran"
    hook = checkout / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {ran}\n")
    hook.chmod(0o755)
    _git(checkout, "config", "core.fsmonitor", str(hook))
    assert "changed or new" in git_state(checkout)
    assert not ran.exists()


def test_without_git_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == "not a git checkout"
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == "not a git checkout"


def test_a_session_names_command_device_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "tools/train.py", "a file.py"])
    session = this_session(torch.device("cpu"))
    assert session["command"] == "python tools/train.py 'a file.py'"
    assert session["tinydet"] == __version__
    assert session["torch"] == torch.__version__
    assert "thread" in session["device"]
    assert all(isinstance(value, str) and value for value in session.values())
