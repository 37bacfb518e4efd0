"""Writes a model repository for Hugging Face Inference Endpoints: handler, seesr/, weights, requirements, model card.

python scripts/hub_folder.py OUT [--bundle weights/full]     then: hf upload <you>/seesr OUT
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from seesr.networks import weights
from seesr.networks.weights import WeightsError

ROOT = Path(__file__).resolve().parent.parent
CARD = """---
license: {licence}
pipeline_tag: image-to-image
tags: [super-resolution, endpoints-template]
---

# SeeSR super-resolution, ready for Inference Endpoints

`handler.py` loads the bundle `{name}` in `bundle/`. Its licences: {licences}

POST `{{"inputs": "<base64>", "parameters": {{"scale_factor": 4, "seed": 1}}}}` as JSON; the answer holds the image in
base64, its format, the seed and metrics.
"""


def write(out: Path, bundle: Path) -> None:
    """Writes the repository.

    Raises:
        WeightsError: the bundle is missing or damaged.
        ValueError: OUT has something else in it.
    """
    verified = weights.verify(bundle)
    if out.exists() and any(path.name not in (".git", ".gitattributes") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty: choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("handler.py", "requirements.txt"):
        shutil.copy(ROOT / "deploy/huggingface" / name, out)
    shutil.copy(ROOT / "NOTICE", out)
    shutil.copytree(ROOT / "seesr", out / "seesr", ignore=shutil.ignore_patterns("__pycache__", "serving"))
    shutil.copytree(bundle, out / "bundle")
    licence = "apache-2.0" if verified.licence == "Apache-2.0" else "other"
    card = CARD.format(licence=licence, name=verified.name, licences=verified.licence)
    (out / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundle", type=Path, default=weights.locate())
    args = parser.parse_args()
    try:
        write(args.out, args.bundle)
    except (WeightsError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"{args.out} is ready: hf upload <you>/seesr {args.out}")


if __name__ == "__main__":
    main()
