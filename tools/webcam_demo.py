"""Show detections in a camera's picture: python tools/webcam_demo.py [EXPERIMENT] [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.atomic import check_out
from tinydet.cli import add_predictor, load_predictor, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="q in the window, or Ctrl-C, stops. The window needs opencv-python instead of "
        "opencv-python-headless; without it, use --out.",
    )
    add_predictor(parser)
    parser.add_argument(
        "--camera-id",
        type=_camera,
        default=0,
        metavar="N",
        help="number of the camera, default 0; or a video file, played in real time",
    )
    parser.add_argument("--out", type=Path, help="record to this video instead of showing a window")
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, draw, show or record until stopped."""
    check_out(args.out, [args.camera_id] if isinstance(args.camera_id, Path) else [])

    from tinydet.deployment.demos import draw_camera
    from tinydet.report.camera import Window, as_camera, newest_frames
    from tinydet.report.video import VideoFile, open_video

    camera = open_video(args.camera_id)
    source = as_camera(camera) if isinstance(args.camera_id, Path) else camera
    with (
        VideoFile(args.out, camera.frames_per_second) if args.out else Window(camera.name) as screen
    ):
        predictor, checkpoint = load_predictor(args)
        print(f"{camera.name}, {checkpoint}: q or Ctrl-C stops", flush=True)
        drawn, skipped, seconds = draw_camera(predictor, newest_frames(source), screen.show)
    where = f", written to {args.out}" if args.out and drawn else ""
    rate = drawn / max(seconds, 1e-6)
    print(f"{drawn} frames at {rate:.1f} fps{where}; {skipped} skipped to keep up")


def _camera(text: str) -> int | Path:
    return int(text) if text.isdecimal() else Path(text)


if __name__ == "__main__":
    run(main, _parser())
