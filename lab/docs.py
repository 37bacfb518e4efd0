"""Writes the generated tables and diagrams of the docs, between their markers: python -m lab.docs [--check]

A mark is a line `<!-- NAME -->`; the table reaches to the next `<!-- end -->`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.report import RESULTS, ROOT, read, table
from seesr import Settings
from seesr.config import Configuration, variable

EVALUATED = (
    "pocket-clean",
    "pocket-mild",
    "pocket-realesrgan",
    "held-out-clean",
    "held-out-mild",
    "held-out-realesrgan",
)
PEERS = {
    "damage": "", "method": "", "images": "d", "gain_db": "+.2f", "least_db": "+.2f", "ssim": ".3f", "alex": ".3f",
    "vgg": ".3f", "niqe": ".2f", "seconds_per_mp": ".1f",
}  # fmt: skip
PAGES = (
    "docs/quality.md",
    "README.md",
    "docs/inputs.md",
    "docs/configuration.md",
    "docs/fleet.md",
    "docs/http-api.md",
    "docs/costs.md",
    "docs/openapi.json",
    "docs/architecture.md",
    "docs/decisions/0015-mutation-testing.md",
    "docs/decisions/0020-flat-areas-thin-images-registration.md",
    "docs/decisions/0023-speed.md",
    "docs/decisions/0028-cached-stages.md",
    "docs/decisions/0029-quotes.md",
    "docs/decisions/0038-trust-map.md",
)


def span(field: dataclasses.Field[Any]) -> str:
    """What a setting can be."""
    about = field.metadata
    if "choices" in about:
        return ", ".join(about["choices"])
    if "ge" in about:
        return f"{about['ge']} to {about['le']}"
    return {bool: "on, off", str: f"text, at most {about.get('max_length')} characters"}[about["kind"]]


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is None:
        return field.metadata.get("empty", "none")
    if field.metadata["kind"] is bool:
        return "on" if field.default else "off"
    return "empty" if field.default == "" else f"`{field.default}`"


def inputs() -> str:
    """The settings in short."""
    rows = [{"input": f"`{f.name}`", "range": span(f), "default": default(f)} for f in dataclasses.fields(Settings)]
    return table(rows, {"input": "", "range": "", "default": ""})


def effects() -> str:
    """The settings with what they do."""
    rows = [
        {"input": f"`{f.name}`", "range": span(f), "default": default(f), "effect": f.metadata["description"]}
        for f in dataclasses.fields(Settings)
    ]
    return table(rows, {"input": "", "range": "", "default": "", "effect": ""})


def variables() -> str:
    """The environment."""
    rows = []
    for name, field in Configuration.model_fields.items():
        kind = (
            str(field.annotation)
            .replace("pathlib.", "")
            .replace("pydantic.types.SecretStr", "str")
            .removeprefix("<class '")
            .removesuffix("'>")
        )
        kind = re.sub(r"(?:typing\.\w+\[)+(.*?)\]+", r"\1", kind).replace(" | None", "").replace("'", "")
        value = "" if field.default is None else str(field.default)
        rows.append({"variable": f"`{variable(name)}`", "type": kind, "default": value, "effect": field.description})
    return table(rows, {"variable": "", "type": "", "default": "", "effect": ""})


def fleet() -> str:
    """What `python -m lab.fleet all --json results/fleet` wrote, with what lab/fleet/figures.py says of each."""
    described = ast.get_docstring(ast.parse((ROOT / "lab/fleet/figures.py").read_text())) or ""
    about, rows = dict(re.findall(r"^(\w+) {2,}(.+)$", described, re.M)), []
    for path in sorted((RESULTS / "fleet").glob("*.json")):
        (result,) = read(path)
        name = result.pop("experiment")
        measured = ", ".join(f"{key} {value}" for key, value in result.items())
        rows.append({"experiment": name, "what happens": about[name], "measured": measured})
    return table(rows, {"experiment": "", "what happens": "", "measured": ""})


def fidelity() -> str:
    """What `python -m lab.quality.fidelity` wrote, without the alternative methods."""
    rows = [row for row in read(RESULTS / "fidelity.json") if row["way"].startswith("ours")]
    columns = {"way": "", "fidelity": ".1f", "psnr to plain": ".2f", "psnr to truth": ".2f", "sharpness": ".3f"}
    return table(rows, {**columns, "niqe": ".2f", "invented": ".4f", "faithful": ".2f"})


def evaluated(name: str) -> str:
    """Means that `python -m lab.quality.evaluate --json results/NAME.json` wrote."""
    columns = {"method": "", "psnr_y": ".2f", "ssim_y": ".4f", "niqe": ".2f", "delta_e": ".2f", "shift": ".2f"}
    columns |= {"gain y, dB": "+.2f", "95 %": "", "least": "+.2f"}
    return table(read(RESULTS / f"{name}.json", "means"), columns)


def ablation() -> str:
    """What `python -m lab.quality.ablate` wrote."""
    columns = {"degradation": "", "variant": "", "psnr_y": ".2f", "change": "+.2f", "ssim_y": ".4f", "niqe": ".2f"}
    return table(read(RESULTS / "ablation.json", "means"), columns)


def presets() -> str:
    """What `python -m lab.quality.fidelity --presets` wrote."""
    columns = {"preset": "", "seconds": ".2f", "psnr_y": ".2f", "niqe": ".2f", "invented": ".4f", "faithful": ".2f"}
    return table(read(RESULTS / "presets.json"), columns)


def mutation() -> str:
    """What `python -m lab.mutation` wrote, and the sum."""
    rows, counts = read(RESULTS / "mutation.json"), ("mutants", "tried", "killed")
    whole = {name: sum(row[name] for row in rows) for name in counts}
    rows.append({"module": "all", **whole, "share": whole["killed"] / whole["tried"]})
    return table(rows, {"module": "", **dict.fromkeys(counts, ""), "share": ".0%"})


def packages() -> str:
    """The packages in the order of the import contract, with what each says of itself, and a diagram of the imports."""
    import tomllib

    import grimp

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [names.split(" : ") for names in next(c for c in contracts if c["type"] == "layers")["layers"]]
    names = [name for layer in layers for name in layer]
    graph = grimp.build_graph("seesr")
    uses = {
        a: {b for b in names if a != b and graph.direct_import_exists(importer=a, imported=b, as_packages=True)}
        for a in names
    }
    shown = {a: bs - {c for b in bs for c in reachable(uses, b)} for a, bs in uses.items()}  # without detours

    def node(name: str) -> str:
        return name.removeprefix("seesr.")

    arrows = [f"    {node(a)} --> {node(b)}" for a in names for b in names if b in shown[a]]
    rows = []
    for name in names:
        folder = ROOT / name.replace(".", "/")
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        about = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0].replace("\n", " ")
        suffix = "/" if folder.is_dir() else ".py"
        rows.append({"package": f"`{node(name)}{suffix}`", "what it is": about})
    return "\n".join([table(rows, {"package": "", "what it is": ""}), "", "```mermaid", "graph TD", *arrows, "```"])


def reachable(uses: dict[str, set[str]], start: str) -> set[str]:
    """Everything that `start` uses, directly or not."""
    results: set[str] = set()
    todo = [start]
    while todo:
        for name in uses[todo.pop()] - results:
            results.add(name)
            todo.append(name)
    return results


def cards() -> str:
    """What `python -m lab.speed.count --table` computed for GPUs."""
    rows = read(RESULTS / "counts.json", "cards")
    return table(rows, dict.fromkeys(rows[0], ""))


def flat() -> str:
    """What `python -m lab.quality.flat` measured on a white background."""
    columns = {"color_fix": "", "not white without": ".0%", "not white": ".0%"}
    return table(read(RESULTS / "flat-areas.json"), columns)


def flat_photographs() -> str:
    """What `python -m lab.quality.flat` counted in photographs."""
    rows = read(RESULTS / "flat-areas.json", "photographs")
    return table(rows, {name: "" if name == "photograph" else ".1%" for name in rows[0]})


def ratio() -> str:
    """What `python -m lab.speed.ratio` computed from measured and counted figures."""
    from lab.speed.ratio import COLUMNS

    return table(read(RESULTS / "gpu-h200/ratio.json"), {"evidence": "", **COLUMNS})


def peers() -> str:
    """What `python -m lab.quality.peers` measured."""
    return table(read(RESULTS / "peers.json", "means"), PEERS)


def region() -> str:
    """What `python -m lab.quality.region` counted."""
    from lab.quality.region import COLUMNS

    return table(read(RESULTS / "region.json"), COLUMNS)


def stages() -> str:
    """What `python -m lab.speed.stages` measured."""
    columns = {"after": "", "change": "", "cold": ".2f", "warm": ".2f", "reused": "", "tiles_reused": "d"}
    return table(read(RESULTS / "stages.json"), columns)


def shard() -> str:
    """What `python -m lab.speed.shard` measured."""
    columns = {"input": "", "fault": "", "processes": "d", "denoise_s": ".2f", "speedup": ".2f"}
    columns |= {"tiles": "d", "tiles_shared": "d", "encode_s": ".2f", "decode_s": ".2f", "same_bytes": ""}
    return table(read(RESULTS / "shard.json"), columns)


def shard_simulated() -> str:
    """What `python -m lab.speed.shard` computed for more workers."""
    rows = read(RESULTS / "shard.json", "simulated")
    rows = [row for row in rows if row["workers"] > 2 and row["output"] != "16384x16384"]
    columns = {"bundle": "", "network": "", "output": "", "workers": "d", "denoise_s": ".1f", "denoise_speedup": ".1f"}
    return table(rows, {**columns, "image_s": ".0f", "image_speedup": ".1f"})


def openapi() -> str:
    """docs/openapi.json."""
    from seesr.serving import app
    from seesr.serving.openapi import document, operations_of

    return json.dumps(document(operations_of(app.all_routes())), indent=1) + "\n"


def routes() -> str:
    """Every route with its methods."""
    rows = [
        {"route": f"`{method.upper()} {path}`", "what it does": about["summary"]}
        for path, methods in json.loads(openapi())["paths"].items()
        for method, about in methods.items()
        if about["tags"] != ["Page"]
    ]
    return table(rows, {"route": "", "what it does": ""})


def errors() -> str:
    """The error codes of the HTTP API."""
    from seesr.serving.refusal import ERRORS

    rows = [
        {"code": f"`{code}`", "status": about.status, "when": about.meaning, "what to do": about.remedy,
         "setting": f"`{about.setting}`" if about.setting else ""}
        for code, about in ERRORS.items()
    ]  # fmt: skip
    return table(rows, {"code": "", "status": "", "when": "", "what to do": "", "setting": ""})


def quote() -> str:
    """What `python -m lab.speed.quote` measured, and what became of the deadlines."""
    columns = {"jobs": "", "images": "d", "within_20_percent": ".0%", "median_error": ".0%", "p95_error": ".0%"}
    promises = json.loads((RESULTS / "quote.json").read_text())["promises"]
    return f"{table(read(RESULTS / 'quote.json'), columns)}\n\n{table([promises], dict.fromkeys(promises, '.3g'))}"


def scaling() -> str:
    """What `python -m lab.scaling` simulated."""
    from lab.scaling.__main__ import COLUMNS

    return table(read(RESULTS / "scaling.json"), COLUMNS)


def scaling_inputs() -> str:
    """What that simulation read."""
    about = json.loads((RESULTS / "scaling.json").read_text())
    images = ", ".join(f"{seconds:.2f}" for seconds in about["image_s"])
    start = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in about["start_s"].items())
    files = ", ".join(f"`{name}`" for name in about["files"])
    return f"Seconds of an image of 512, 1024, 2048 and 4096 px: {images}. A worker's start: {start}. From {files}."


def trust() -> str:
    """What `python -m lab.quality.trust` measured on the photographs that were not used for the calibration."""
    columns = {
        "error": ".0f", "squares": "d", "within": ".1%", "within_over_splits": ".1%", "white": ".0%",
        "white_clean": ".0%", "white_mild": ".0%", "without_a_mask": ".0%",
    }  # fmt: skip
    names = {"tested": "squares", "trusted": "white", "trusted_clean": "white_clean", "trusted_mild": "white_mild"}
    rows = [{names.get(key, key): value for key, value in row.items()} for row in read(RESULTS / "trust.json")]
    return table(rows, columns)


def price_dates() -> str:
    """From when the prices of scripts/prices.toml are."""
    import tomllib

    prices = tomllib.loads((ROOT / "scripts" / "prices.toml").read_text())["price"]
    days = sorted(price["read_on"] for price in prices)
    return f"The {len(prices)} prices were read from {days[0]} to {days[-1]}."


TABLES: dict[str, Callable[[], str]] = {
    "inputs": inputs,
    "effects": effects,
    "variables": variables,
    "fleet": fleet,
    "fidelity": fidelity,
    "presets": presets,
    "ablation": ablation,
    **{name: functools.partial(evaluated, name) for name in EVALUATED},
    "flat": flat,
    "flat-photographs": flat_photographs,
    "peers": peers,
    "cards": cards,
    "ratio": ratio,
    "packages": packages,
    "routes": routes,
    "price-dates": price_dates,
    "scaling": scaling,
    "scaling-inputs": scaling_inputs,
    "errors": errors,
    "mutation": mutation,
    "region": region,
    "stages": stages,
    "quote": quote,
    "trust": trust,
    "shard": shard,
    "shard-simulated": shard_simulated,
}


def filled(page: Path) -> str:
    """The page with its tables as they should be."""
    if page.name == "openapi.json":
        return openapi()
    text = page.read_text()
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text, flags=re.S)
    return text


def main() -> None:
    stale = [name for name in PAGES if filled(ROOT / name) != (ROOT / name).read_text()]
    if "--check" in sys.argv:
        sys.exit(f"stale tables in {', '.join(stale)}: python -m lab.docs" if stale else 0)
    for name in stale:
        (ROOT / name).write_text(filled(ROOT / name))
        print(f"{name} written")


if __name__ == "__main__":
    main()
