"""Check that loaded networks are used in the process that loaded them, not after `os.fork()`."""

from __future__ import annotations

import os


def check_process(loaded_in: int) -> None:
    """Refuses networks that were loaded before `os.fork()`: the child has none of torch's threads and hangs.

    Args:
        loaded_in: the process that loaded them.

    Raises:
        RuntimeError: this is another process.
    """
    if os.getpid() != loaded_in:
        raise RuntimeError(
            f"the networks were loaded in process {loaded_in}, before os.fork(): load them in each process instead, "
            "or start processes with multiprocessing.get_context('spawn')"
        )
