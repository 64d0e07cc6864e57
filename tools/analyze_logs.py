"""Plot or summarize logs: python tools/analyze_logs.py plot_curve runs/NAME/1/log.jsonl."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinydet.cli import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    help_logs = "log.jsonl of a run, or the run folder"
    plot = tasks.add_parser("plot_curve", help="plot curves over the training step")
    plot.add_argument("logs", type=Path, nargs="+", metavar="LOG", help=help_logs)
    plot.add_argument(
        "--keys", nargs="+", default=["loss"], help="such as loss lr AP50; one panel for each"
    )
    plot.add_argument("--title", default="", help="above the plot")
    plot.add_argument("--legend", nargs="+", help="one name for each log, or for each log and key")
    plot.add_argument("--backend", help="matplotlib backend (default: matplotlib's choice)")
    plot.add_argument(
        "--style", default="default", help="matplotlib or seaborn style, such as ggplot or dark"
    )
    plot.add_argument("--out", type=Path, help="write this picture (.png, .svg, .pdf); no window")
    summary = tasks.add_parser("summary", help="print the best epoch, speed and time of each log")
    summary.add_argument("logs", type=Path, nargs="+", metavar="LOG", help=help_logs)
    return parser


def main(args: argparse.Namespace) -> None:
    """Read the logs; plot or print."""
    from tinydet.report.run_folder import find_log, read_log, summarize, train_seconds

    paths = [find_log(path) for path in args.logs]
    logs = [read_log(path) for path in paths]
    for path, log in zip(paths, logs, strict=True):
        if log.skipped:
            print(f"{path}: skipped {log.skipped} unreadable line{'s'[: log.skipped > 1]}")
    if args.task == "summary":
        seconds = [train_seconds(path.parent) for path in paths]
        print("\n".join(summarize(list(zip(map(str, args.logs), logs, seconds, strict=True)))))
        return

    from tinydet.report.figures import plot_curves

    legend = args.legend or [str(path) for path in args.logs]
    plot_curves(logs, legend, args.keys, args.title, args.backend, args.style, args.out)
    if args.out:
        print(f"written to {args.out}")


if __name__ == "__main__":
    run(main, _parser())
