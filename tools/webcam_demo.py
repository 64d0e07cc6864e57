"""Show detections in a camera's picture: python tools/webcam_demo.py [EXPERIMENT CHECKPOINT]."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tinydet.cli import add_detector, load_asked_detector, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="q in the window, or Ctrl-C, ends it. A window needs opencv-python in place of "
        "opencv-python-headless; without one, --out records.",
    )
    add_detector(parser)
    parser.add_argument("--camera-id", type=int, default=0, help="number of the camera, default 0")
    parser.add_argument("--out", type=Path, help="record into this video; nothing is shown then")
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, draw, show or record until it is ended."""
    if args.out and not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {args.out.parent}")

    from tinydet.report.draw import draw_detections
    from tinydet.report.video import VideoFile, Window, open_video

    detector, checkpoint = load_asked_detector(args)
    camera = open_video(args.camera_id)
    print(f"{camera.name}, {checkpoint}: q or Ctrl-C ends it", flush=True)
    begin, frames = time.monotonic(), 0
    rate = camera.frames_per_second
    with VideoFile(args.out, rate) if args.out else Window(camera.name) as screen:
        try:
            for image in camera:
                (found,) = detector([image])
                screen.write(
                    draw_detections(
                        image, found.boxes, found.labels, found.scores, detector.classes
                    )
                )
                frames += 1
                if screen.closed:
                    break
        except KeyboardInterrupt:
            pass  # The usual end.
    seconds = time.monotonic() - begin
    where = f", in {args.out}" if args.out and frames else ""
    print(f"{frames} frames, {frames / seconds:.1f} a second{where}")


if __name__ == "__main__":
    run(main, _parser())
