"""Show detections in a camera's picture: python tools/webcam_demo.py [EXPERIMENT CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import add_detector, load_asked_detector, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="q in the window, or Ctrl-C, ends it. A window needs opencv-python in place of "
        "opencv-python-headless; without one, --out records.",
    )
    add_detector(parser)
    parser.add_argument(
        "--camera-id",
        type=_camera,
        default=0,
        metavar="N",
        help="number of the camera, default 0; or a video file, which is played as one",
    )
    parser.add_argument("--out", type=Path, help="record into this video; nothing is shown then")
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, draw, show or record until it is ended."""
    if args.out and not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {args.out.parent}")

    from tinydet.deployment.demos import draw_camera
    from tinydet.report.camera import Window, as_camera, newest_frames
    from tinydet.report.video import VideoFile, open_video

    camera = open_video(args.camera_id)
    source = as_camera(camera) if isinstance(args.camera_id, Path) else camera
    with (
        VideoFile(args.out, camera.frames_per_second) if args.out else Window(camera.name) as screen
    ):
        detector, checkpoint = load_asked_detector(args)
        print(f"{camera.name}, {checkpoint}: q or Ctrl-C ends it", flush=True)
        drawn, left_out, seconds = draw_camera(detector, newest_frames(source), screen.show)
    where = f"; in {args.out}" if args.out and drawn else ""
    print(
        f"{drawn} frames, {drawn / max(seconds, 1e-6):.1f} a second; {left_out} that came "
        f"meanwhile were left out{where}"
    )


def _camera(text: str) -> int | Path:
    return int(text) if text.isdecimal() else Path(text)


if __name__ == "__main__":
    run(main, _parser())
