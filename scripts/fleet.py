"""Starts Redis, a store, a gateway, workers and Flower; runs an image through Replicate's client; Ctrl+C ends all."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import replicate
import skimage.data
from PIL import Image

from lab.fleet.servers import Fleet, free_port


def stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--store", choices=("folder", "s3"), default="folder", help="s3: a SeaweedFS on this machine")
    parser.add_argument("--once", action="store_true", help="end after the image")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    folder = Path(tempfile.mkdtemp(prefix="seesr-fleet-"))
    try:
        fleet = Fleet(folder, worker="seesr worker", lease=60)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    with contextlib.suppress(KeyboardInterrupt):
        try:
            run(fleet, args)
        finally:
            print("ending workers, gateway, store and Redis, in this order", flush=True)
            fleet.close()
    return 0


def run(fleet: Fleet, args: argparse.Namespace) -> None:
    print(f"data and logs are in {fleet.folder}", flush=True)
    fleet.start_redis()
    if args.store == "s3":
        fleet.start_store()
    address = fleet.start_gateway()
    names = [f"worker{number}" for number in range(args.workers)]
    for name in names:
        fleet.start_worker(name, wait=False)
    print("loading the weights", flush=True)
    fleet.until(lambda: all(fleet.state(name) == "idle" for name in names), 300)
    port = free_port()
    fleet.spawn(
        "flower", sys.executable, "-m", "celery", "-A", "seesr.fleet.worker", "flower",
        f"--port={port}", "--address=127.0.0.1",
    )  # fmt: skip
    image = fleet.folder / "coffee.png"
    Image.fromarray(skimage.data.coffee()).reduce(4).save(image)
    client = replicate.Client(api_token="any, as no SEESR_API_KEYS are set", base_url=address)
    started = time.monotonic()
    with image.open("rb") as file:
        output = client.run("you/seesr", input={"image": file, "num_inference_steps": 2, "seed": 1})
    result = fleet.folder / "coffee-x4.png"
    result.write_bytes(output.read())  # pyright: ignore[reportAttributeAccessIssue]
    print(f"{image} -> {result} in {time.monotonic() - started:.1f} s, through Replicate's client", flush=True)
    print(f"page    {address}/\nFlower  http://127.0.0.1:{port}/")
    print(f"status  SEESR_REDIS={fleet.environment['SEESR_REDIS']} .venv/bin/seesr fleet status")
    print("Ctrl+C ends all", flush=True)
    while not args.once:
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
