"""The names that `tinydet` itself has, for notebooks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinydet

ROOT = Path(__file__).resolve().parents[1]


def test_importing_it_imports_nothing_heavy():
    code = "import sys, tinydet; print({'torch', 'numpy', 'timm'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


def test_every_name_is_there_and_others_are_not():
    assert set(tinydet.__all__) <= set(dir(tinydet))
    assert all(callable(getattr(tinydet, name)) for name in tinydet.__all__)
    assert tinydet.fold is sys.modules["tinydet.reparam"].fold
    with pytest.raises(AttributeError, match="'tinydet' has no attribute 'fodl'"):
        tinydet.fodl  # noqa: B018


@pytest.mark.slow
def test_the_example_of_the_front_page_runs(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## From Python\n+```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # The same experiment for a moment: two epochs of few images.
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quickstart.py").write_text(
        "from dataclasses import replace\n"
        "from tinydet import load_experiment\n"
        "from tinydet.data.shapes import render_shapes\n"
        f"plain = load_experiment({str(ROOT / 'experiments' / 'quickstart.py')!r})\n"
        "render_shapes('datasets/shapes', num_train=240, num_test=8)\n"
        "experiment = replace(plain, train=replace(plain.train, epochs=2, device='cpu'))\n"
    )
    exec(compile(code, "README.md", "exec"), {})
    number, rest = capsys.readouterr().out.split("\n", 1)[0].split(" ", 1)
    assert int(number) > 0
    assert "tensor(" in rest
    assert (tmp_path / "found.jpg").stat().st_size > 1000
