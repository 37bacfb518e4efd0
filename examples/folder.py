"""Upscale all JPEG files of a folder with one loaded engine: python examples/folder.py FOLDER"""

import sys
from pathlib import Path

from seesr import Engine, Settings

folder = Path(sys.argv[1])
settings = Settings(scale_factor=2, output_format="webp")
with Engine.load() as engine:
    for path in sorted(folder.glob("*.jpg")):
        output = engine.run(path, settings)
        output.save(path.with_name(f"{path.stem}-x2.webp"))
        print(path.name, "seed", output.seed)
