"""A helper process: loads a bundle once and computes tile batches for the process that started it.

python -m seesr.engine.tile_worker FD BUNDLE DEVICE THREADS ATTENTION CUDA_GRAPHS PRECISION
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

READY, RESULT, FAULT = b"r", b"d", b"f"  # first byte of a reply: loaded, prediction, or a line with the reason


def main(descriptor: str, bundle: str, device: str, threads: str, attention: str, graphs: str, precision: str) -> None:
    """Answers until the other side closes the connection.

    Each request is two messages: the image's name, then its context where the name begins with "+", else a task.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that started this one, and that this one
    connection = Connection(int(descriptor))
    try:
        import torch

        from seesr.pipeline.tile_helper import TileHelper
        from seesr.pipeline.upscaler import Upscaler

        torch.set_num_threads(int(threads))
        upscaler = Upscaler.load(bundle, device, attention, graphs == "1", precision=precision)
        if upscaler.networks.device.type == "cuda":
            upscaler.warm_up()
        helper = TileHelper(upscaler.networks, upscaler.graphs)
    except (RuntimeError, ValueError, OSError) as error:
        connection.send_bytes(FAULT + f"{type(error).__name__}: {error}".encode())
        return
    connection.send_bytes(READY)
    while True:
        name, data = connection.recv_bytes().decode(), connection.recv_bytes()
        if name.startswith("+"):
            helper.learn(name.removeprefix("+"), data)
            continue
        try:
            reply = RESULT + helper(name, data)
        except RuntimeError as error:  # such as too little memory
            reply = FAULT + f"{type(error).__name__}: {error}".encode()
        connection.send_bytes(reply)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (EOFError, ConnectionError):
        sys.exit(0)
