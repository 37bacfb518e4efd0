"""Cost of an image: always on, billed by the second with an idle window and cold starts, or self-hosted.

    python scripts/cost.py --size 512 --per-hour 1 10 100                    from measured seconds only
    python scripts/cost.py --size 2048 --per-hour 1 10 100 1000 --goals     with goals where nothing is measured, marked
    python scripts/cost.py --size 2048 --per-hour 1 10 100 1000 --goals --plot docs/costs.png

Seconds come from results/bench/*.jsonl (full-size weights, 2 steps), prices from scripts/prices.toml. Images arrive
at random (Poisson) at the given rates per hour.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STALE = 90  # days after which a price is marked


class Offer(NamedTuple):
    """A machine that is billed by time.

    Attributes:
        rate: US$ a second.
        idle: seconds that it waits for the next image before it is given back.
        cold: seconds from nothing to the first image, billed.
    """

    rate: float
    idle: float
    cold: float


def always_on(rate: float, seconds: float, per_hour: float) -> float | None:
    """US$ per image of a machine that is never given back; None: it cannot make that many."""
    return None if per_hour * seconds > 3600 else rate * 3600 / per_hour


def on_demand(offer: Offer, seconds: float, per_hour: float) -> float | None:
    """US$ per image of a machine that is given back after its idle window; None: it cannot make that many.

    With arrivals at rate L a second, t seconds per image, c of cold start and an idle window w, p = exp(-L w) is the
    probability of no request within the window. A cycle begins with a cold start, has 1 / p idle phases of which the
    last is whole, and images for as long: r (t + (1 - L t) (c p + (1 - p) / L) / (1 + L c p)) per image.
    """
    rate, idle, cold = offer
    arrivals = per_hour / 3600
    if arrivals * seconds >= 1:
        return None
    empty = math.exp(-arrivals * idle)
    waiting = (cold * empty + (1 - empty) / arrivals) / (1 + arrivals * cold * empty)
    return rate * (seconds + (1 - arrivals * seconds) * waiting)


def self_hosted(machine: dict[str, Any], seconds: float, per_hour: float) -> float | None:
    """US$ per image of a bought machine that runs day and night: its price over its months, and power."""
    if per_hour * seconds > 3600:
        return None
    hours, busy = machine["months"] * 730, per_hour * seconds / 3600
    power = (machine["watts"] * busy + machine["idle_watts"] * (1 - busy)) / 1000 * machine["tariff"]
    return (machine["price"] / hours + power) / per_hour


def break_even(offer: Offer, seconds: float, cheapest: float) -> float | None:
    """Images an hour from which the cheapest machine that is always on costs less; None: never.

    Args:
        cheapest: US$ a second of that machine. At the offer's own rate, billing by demand is never dearer.
    """
    if cheapest >= offer.rate:
        return None
    low, high = 1e-6, 3600 / seconds * (1 - 1e-9)
    for _ in range(200):
        middle = math.sqrt(low * high)
        demand, on = on_demand(offer, seconds, middle), always_on(cheapest, seconds, middle)
        if demand is not None and on is not None and on > demand:
            low = middle
        else:
            high = middle
    return high


def measured(folder: Path, size: int) -> dict[str, tuple[float, float]]:
    """Device -> (seconds per image, seconds to load) of the full-size networks at 2 steps; the last row of a device."""
    measured = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if row["size"] == size and row["steps"] == 2 and row["particles"] == 1 and row["weights"] != "pocket":
                measured[row["device"]] = row["seconds_total"], sum(row["setup_seconds"].values())
    return measured


def per_second(price: dict[str, Any]) -> float:
    return price["usd"] / {"second": 1, "minute": 60, "hour": 3600}[price["per"]]


def rows(args: argparse.Namespace, prices: dict[str, Any], today: datetime.date) -> list[dict[str, Any]]:
    """One row per offer.

    Raises:
        ValueError: a device was asked for that has not been measured.
    """
    known = measured(args.results, args.size)
    goals = (
        {device: times.get(str(args.size)) for device, times in prices.get("goals", {}).items()} if args.goals else {}
    )
    table: list[dict[str, Any]] = []
    for price in prices["price"]:
        device = price["device"]
        match = next((times for name, times in known.items() if device in name), None)
        if match is None and goals.get(device) is None:
            if args.device == device:
                raise ValueError(f"{device} has not been measured at {args.size} px: run ./scripts/gpu_check on one")
            continue
        seconds, load = match or (goals[device], 0.0)
        offer = Offer(per_second(price), price["idle_s"], price["boot_s"] + load)
        marks = ("" if match else " (goal)") + (" (old price)" if (today - price["read_on"]).days > STALE else "")
        cheapest = min(per_second(row) for row in prices["price"] if row["device"] == device)
        even = break_even(offer, seconds, cheapest)
        row = {"offer": f"{price['platform']} {device}{marks}", "seconds": seconds, "break-even/h": even}
        for rate_per_hour in args.per_hour:
            row[f"on demand {rate_per_hour:g}/h"] = on_demand(offer, seconds, rate_per_hour)
            row[f"always on {rate_per_hour:g}/h"] = always_on(offer.rate, seconds, rate_per_hour)
        table.append(row)
    machine = prices.get("own")
    if machine and machine["device"] in known:
        seconds = known[machine["device"]][0]
        row = {"offer": f"own machine, {machine['device']}", "seconds": seconds}
        row |= {f"always on {n:g}/h": self_hosted(machine, seconds, n) for n in args.per_hour}
        table.append(row)
    if args.device and not any(args.device in row["offer"] for row in table):
        raise ValueError(f"{args.device} has no price, or has not been measured at {args.size} px")
    return table


def show(table: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown."""
    names = ["offer", "seconds", "break-even/h"]
    names += [f"{kind} {n:g}/h" for kind in ("on demand", "always on") for n in args.per_hour]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in table:
        cells = [row.get(name) for name in names]
        lines.append(
            "| " + " | ".join("" if c is None else c if isinstance(c, str) else f"{c:.4g}" for c in cells) + " |"
        )
    return "\n".join(lines)


def plot(table: list[dict[str, Any]], args: argparse.Namespace, prices: dict[str, Any]) -> None:
    """Cost against the rate, both logarithmic, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in table:
        for kind, style in (("on demand", "-"), ("always on", ":")):
            points = [(n, row.get(f"{kind} {n:g}/h")) for n in args.per_hour]
            points = [(n, cost) for n, cost in points if cost is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{row['offer']}, {kind}")
    axes.set(xscale="log", yscale="log", xlabel="images an hour", ylabel=f"US$ per image of {args.size} px")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(args.plot, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, required=True, help="side of the output, pixels")
    parser.add_argument("--per-hour", type=float, nargs="+", required=True, help="images an hour")
    parser.add_argument("--device", help="only this device; an error if it was not measured")
    parser.add_argument("--goals", action="store_true", help="use goals for devices that have not been measured")
    parser.add_argument("--prices", type=Path, default=ROOT / "scripts/prices.toml")
    parser.add_argument("--results", type=Path, default=ROOT / "results/bench")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    prices = tomllib.loads(args.prices.read_text())
    try:
        table = rows(args, prices, datetime.date.today())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.device:
        table = [row for row in table if args.device in row["offer"]]
    if not table:
        print(f"nothing has been measured at {args.size} px; --goals shows the targets", file=sys.stderr)
        return 2
    print(show(table, args))
    if args.plot:
        plot(table, args, prices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
