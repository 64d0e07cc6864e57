"""Start a script in several processes: torchrun with a free port, and less talkative."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

_PORT = 29500


def launch(processes: int, script: Sequence[str]) -> int:
    """Start the processes and wait for them.

    The port is the environment's PORT, or any free one if that is taken. On several machines it
    runs on each with the same NNODES, MASTER_ADDR and PORT and its own NODE_RANK.

    Args:
        processes: on this machine.
        script: the Python file and its arguments.

    Returns:
        0, or the exit status of the process that failed first, the others being stopped then, or
        that of a process ended by the signal this one got.

    Raises:
        ValueError: PORT is no port.
    """
    # torchrun tells of every failure in its log and again by a traceback; the process has said why.
    logging.disable(logging.ERROR)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    nodes = os.environ.get("NNODES", "1")
    port = os.environ.get("PORT", str(_PORT))
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"PORT={port}: not a port; give a number from 1 to 65535")
    options = {
        "nproc-per-node": str(processes),
        "nnodes": nodes,
        "node-rank": os.environ.get("NODE_RANK", "0"),
        "master-addr": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        # Other machines have to know the port: there it stays.
        "master-port": str(free_port(int(port))) if nodes == "1" else port,
    }
    try:
        run.main([*(f"--{name}={value}" for name, value in options.items()), *script])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A process ended by a signal has a negative one; shells add it to 128.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # The processes were given it too, and have ended.
        return 128 + error.sigval
    return 0


def free_port(wanted: int) -> int:
    """Return the wanted port of this machine, or another one if it is taken."""
    for port in (wanted, 0):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return tried.getsockname()[1]
    raise ValueError("this machine has no free port")
