"""Creates, changes, pauses and deletes a Hugging Face Inference Endpoint of a repository that hub_folder.py made.

    python scripts/endpoint.py create --name seesr --repository you/seesr --revision SHA \\
        --instance-type nvidia-l4 --instance-size x1 [--dry-run]
    python scripts/endpoint.py pause --name seesr

Scales to zero after --idle minutes. The hardware is checked first: a CPU, less than 8 GB of GPU memory, or an instance
that is not available is refused with the smallest one that fits. --dry-run prints the request; it sends nothing and
needs no token, so it does not check the hardware.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from huggingface_hub import HfApi, InferenceEndpointHardware

MIN_MEMORY = 8  # GB, for the full bundle and a batch of tiles
HOURS = 730  # of a month
AVAILABLE = ("available", "low_availability")


class Refused(Exception):
    """The request is not possible; one line."""


def chosen(hardware: list[InferenceEndpointHardware], kind: str, size: str) -> InferenceEndpointHardware:
    """The instance of this type and size.

    Raises:
        Refused: it is too small, not available, or not known; names the smallest that fits.
    """
    gpus = [row for row in hardware if row.accelerator == "gpu" and (row.gpu_memory_gb or 0) >= MIN_MEMORY]
    fits = sorted((row for row in gpus if row.status in AVAILABLE), key=lambda row: row.price_per_hour)
    small = f"{fits[0].instance_type} {fits[0].instance_size}" if fits else "none that is available"
    remedy = f"; the smallest that fits is {small}"
    same = [row for row in hardware if (row.instance_type, row.instance_size) == (kind, size)]
    if not same:
        raise Refused(f"there is no instance {kind} {size}{remedy}")
    if same[0].accelerator != "gpu":
        raise Refused(f"{kind} {size} is a CPU{remedy}")
    if (same[0].gpu_memory_gb or 0) < MIN_MEMORY:
        raise Refused(f"{kind} {size} has {same[0].gpu_memory_gb} GB; {MIN_MEMORY} are needed{remedy}")
    available = [row for row in same if row.status in AVAILABLE]
    if not available:
        raise Refused(f"{kind} {size} is not available ({same[0].status}){remedy}")
    return available[0]


def request(args: argparse.Namespace, instance: InferenceEndpointHardware | None) -> dict[str, Any]:
    """The arguments of huggingface_hub's create_inference_endpoint; without vendor and region for a dry run."""
    if not re.fullmatch(r"[0-9a-f]{40}", args.revision or ""):
        raise Refused("--revision must be the 40 digits of a commit: a branch may change under a running endpoint")
    if not args.repository:
        raise Refused("--repository is required")
    return {
        "repository": args.repository,
        "revision": args.revision,
        "framework": "custom",
        "task": "custom",
        "accelerator": "gpu",
        **({"vendor": instance.vendor, "region": instance.region} if instance else {}),
        "instance_type": args.instance_type,
        "instance_size": args.instance_size,
        "min_replica": 0,
        "max_replica": args.max_replicas,
        "scale_to_zero_timeout": args.idle,
        "type": "authenticated",
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["create", "update", "pause", "delete"])
    parser.add_argument("--name", required=True)
    parser.add_argument("--namespace", help="default: the namespace of the token")
    parser.add_argument("--repository")
    parser.add_argument("--revision", help="commit of the repository, 40 digits")
    parser.add_argument("--instance-type", default="nvidia-l4")
    parser.add_argument("--instance-size", default="x1")
    parser.add_argument("--idle", type=int, default=15, help="minutes without a request before it scales to zero")
    parser.add_argument("--max-replicas", type=int, default=1, help="the largest number of replicas")
    parser.add_argument("--dry-run", action="store_true")
    return parser


def run(args: argparse.Namespace, api: HfApi) -> int:
    """Runs the command; returns the exit code."""
    if args.verb in ("pause", "delete"):
        if not args.dry_run:
            {"pause": api.pause_inference_endpoint, "delete": api.delete_inference_endpoint}[args.verb](
                args.name, namespace=args.namespace
            )
        print(json.dumps({"verb": args.verb, "name": args.name}))
        return 0
    if args.dry_run:
        print(json.dumps({"verb": args.verb, "name": args.name, **request(args, None)}, indent=1))
        return 0
    hardware = api.list_inference_endpoints_hardware(namespace=args.namespace)
    instance = chosen(hardware, args.instance_type, args.instance_size)
    expected = request(args, instance)
    ceiling = instance.price_per_hour * HOURS * args.max_replicas
    print(f"at most {ceiling:.0f} US$ a month if it never sleeps; 0 while it does", file=sys.stderr)
    print(json.dumps({"verb": args.verb, "name": args.name, **expected}, indent=1))
    if args.verb == "create":
        api.create_inference_endpoint(args.name, namespace=args.namespace, **expected)
    else:
        fixed = ("vendor", "region", "type")
        changes = {name: value for name, value in expected.items() if name not in fixed and value is not None}
        api.update_inference_endpoint(args.name, namespace=args.namespace, **changes)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args, HfApi())
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:  # the hub's client raises those of its HTTP library, which changes with its version
        print(f"the platform rejected the request: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
