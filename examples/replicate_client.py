"""Upscale through a server with Replicate's client. Start the server first: seesr serve

REPLICATE_BASE_URL=http://127.0.0.1:5000 REPLICATE_API_TOKEN=none python examples/replicate_client.py photo.jpg

Without REPLICATE_BASE_URL and with the name of a model on Replicate the same lines run there.
"""

import sys
from pathlib import Path

import replicate

with Path(sys.argv[1]).open("rb") as image:
    output = replicate.run("local/seesr", input={"image": image, "scale_factor": 2, "num_inference_steps": 1})
Path("photo-x2.png").write_bytes(output.read())
