"""Draw detections into a video: python tools/video_demo.py VIDEO [EXPERIMENT] [CHECKPOINT]."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.atomic import check_out
from tinydet.cli import add_predictor, load_predictor, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path, help="any video that OpenCV reads")
    add_predictor(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="frames in a batch, default 8")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: NAME_detections.mp4 in this folder; a name in .webm plays in browsers too",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Detect, draw and write frame by frame; if interrupted, keep what is written."""
    out = args.out or Path(f"{args.video.stem}_detections.mp4")
    check_out(out, [args.video])
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")

    from tinydet.deployment.demos import draw_frames
    from tinydet.progress import Progress
    from tinydet.report.video import VideoFile, open_video

    video = open_video(args.video)
    with (
        VideoFile(out, video.frames_per_second) as file,
        Progress(args.video.name, video.frames, "frames") as progress,
    ):
        predictor, checkpoint = load_predictor(args)
        progress.pause()
        detections = 0
        try:
            for picture, found in draw_frames(predictor, video, args.batch_size):
                file.write(picture)
                detections += found
                progress.advance()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {out} has {file.frames} frames") from None
    if not file.frames:
        raise ValueError(f"{args.video}: OpenCV cannot read any frame of it")
    if problem := video.missing(file.frames):
        print(problem)
    print(f"{detections} detections in {file.frames} frames ({checkpoint}), drawn in {out}")


if __name__ == "__main__":
    run(main, _parser())
