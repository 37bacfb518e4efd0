"""Upscale an image without blocking the event loop: python examples/asynchronous.py photo.jpg"""

import asyncio
import sys

from seesr import Engine, Settings


async def main(path: str) -> None:
    engine = await asyncio.to_thread(Engine.load)
    task = asyncio.create_task(engine.arun(path, Settings(scale_factor=2, seed=1)))
    while not task.done():
        print("still free for other work")
        await asyncio.sleep(0.2)
    (await task).save("photo-x2.png")


asyncio.run(main(sys.argv[1]))
