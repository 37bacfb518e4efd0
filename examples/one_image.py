"""Upscale one image: python examples/one_image.py photo.jpg"""

import sys

from seesr import upscale

output = upscale(sys.argv[1], scale_factor=2, seed=1)
output.save("photo-x2.png")
print(output, output.metrics["tags"])
