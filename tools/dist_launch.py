"""torchrun for the two dist_*.sh: python tools/dist_launch.py PROCESSES SCRIPT [ARGUMENTS].

On one machine a free port is used unless PORT is set. On several machines run it on each, with the
same NNODES, MASTER_ADDR and PORT and its own NODE_RANK.
"""

from __future__ import annotations

import logging
import os
import sys


def main(processes: str, *script: str) -> int:
    """Run the script in so many processes and return its exit status."""
    # The process that failed has said why; torchrun's own log would only repeat it.
    logging.disable(logging.CRITICAL)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--standalone"]
    if "PORT" in os.environ or "NNODES" in os.environ:
        options = [
            f"--nnodes={os.environ.get('NNODES', '1')}",
            f"--node-rank={os.environ.get('NODE_RANK', '0')}",
            f"--master-addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master-port={os.environ.get('PORT', '29500')}",
        ]
    try:
        run.main([*options, f"--nproc-per-node={processes}", *script])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # The processes got it too and have ended.
        return 128 + error.sigval
    except (ValueError, RuntimeError) as error:  # a port that is taken, or is not one
        print(f"error: torchrun: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
