"""The example of a made-up block in the package's README prints what the README shows."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "tinydet" / "reparam" / "README.md"


def test_example_prints_what_the_readme_shows(capsys):
    text = README.read_text(encoding="utf-8")
    code, output = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", text, re.DOTALL)[1]
    exec(code, {})
    assert capsys.readouterr().out == output
