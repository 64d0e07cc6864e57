"""The quickstart as a pipe sees it, cut short."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tinydet.data.image import read_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_ends_with_a_picture_a_report_and_frame_rates(tmp_path):
    for folder in ("deploy", "experiments", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    done = subprocess.run(
        ["bash", "tools/quickstart.sh", "--set", "train.epochs=2", "train.dtype=float32"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    for epoch in (1, 2):
        line = rf"^epoch {epoch}/2: {75 * epoch}/150 steps, loss_cls [\d.]+, loss_box [\d.]+, "
        assert re.search(line + r"lr [\d.e-]+, [\d.]+ img/s", done.stdout, re.MULTILINE)
    # Two epochs from pretrained weights find about half of the shapes; from random ones, none.
    assert float(re.findall(r"^epoch 2/2: AP50 ([\d.]+)", done.stdout, re.MULTILINE)[-1]) > 30
    for form in ("folded", "unfolded"):
        assert re.search(rf"^{form} \(float32\) +[\d.]+ ", done.stdout, re.MULTILINE)
    run = tmp_path / "runs" / "quickstart" / "1"
    assert read_image(run / "detections.jpg").shape == (3, 3 * 228 + 4, 3 * 228 + 4)
    for name in ("detections.jpg", "report.html", "best.pt", "deploy.onnx"):
        assert (run / name).is_file()
        assert name in done.stdout.partition(f"Done. Written to {run.relative_to(tmp_path)}")[2]
    assert done.stdout.count("\n  python tools/") == 2  # what to try next
