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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

import seesr
from lab.report import RESULTS, ROOT, read, table
from seesr import Settings
from seesr.config import Configuration, variable

EVALUATED = {  # results/NAME.json: the damage and the images of docs/quality.md
    "pocket-clean": ("clean", "built-in"),
    "held-out-clean": ("clean", "held-out"),
    "pocket-mild": ("mild", "built-in"),
    "held-out-mild": ("mild", "held-out"),
    "pocket-realesrgan": ("strong", "built-in"),
    "held-out-realesrgan": ("strong", "held-out"),
}
TYPES = {"bool": "0 or 1", "int": "whole number", "float": "number", "str": "text", "Path": "path"}
API = {  # what docs/api.md lists, by module
    "seesr.engine.api": ("upscale",),
    "seesr.engine.engine": tuple(
        f"Engine.{name}" for name in ("load", "run", "arun", "quote", "healthy", "about", "unload", "reload")
    ),
    "seesr.pipeline.result": tuple(f"Output.{name}" for name in ("save", "image", "array", "data", "view", "seed")),
    "seesr.settings.settings": ("Settings.replace", "Settings.output_size"),
    "seesr.images.record": ("read_record",),
}
PAGES = (
    "docs/api.md",
    "docs/quality.md",
    "README.md",
    "docs/inputs.md",
    "docs/configuration.md",
    "docs/fleet.md",
    "docs/http-api.md",
    "docs/costs.md",
    "docs/openapi.json",
    "docs/architecture.md",
    "docs/security.md",
    "docs/weights.md",
    "docs/decisions/0015-mutation-testing.md",
    "docs/decisions/0020-flat-areas-thin-images-registration.md",
    "docs/decisions/0023-speed.md",
    "docs/decisions/0025-bundled-model.md",
    "docs/decisions/0028-cached-stages.md",
    "docs/decisions/0029-quotes.md",
    "docs/decisions/0038-trust-map.md",
)


def titled(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Rows as a table whose headings are not their keys.

    Args:
        columns: the keys to show, in order, each with its heading and the format of its values.
    """
    shown = [{title: row.get(key) for key, (title, _) in columns.items()} for row in rows]
    return table(shown, dict(columns.values()))


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


def limits(field: FieldInfo) -> Iterator[str]:
    """What a number can be, as pydantic checks it."""
    words = {"ge": "at least", "gt": "above", "le": "at most"}
    for limit in field.metadata:
        yield from (f"{text} {getattr(limit, name)}" for name, text in words.items() if hasattr(limit, name))


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
        kind = TYPES.get(kind, kind)
        value = "" if field.default is None else str(int(field.default) if kind == TYPES["bool"] else field.default)
        kind = ", ".join([kind, *limits(field)])
        rows.append({"variable": f"`{variable(name)}`", "type": kind, "default": value, "effect": field.description})
    return table(rows, {"variable": "", "type": "", "default": "", "effect": ""})


FLEET = {  # figures of lab.fleet that their names do not explain
    "begun": "starts (the last one only fails the job)",
    "full": "answer when full",
    "frozen": "status/seconds of three answers",
    "gateway_memory_mb": "memory of a gateway before and after, MB",
    "gateway_median_ms": "median answer of a gateway, ms",
    "gateway_p99_ms": "p99 answer of a gateway, ms",
    "live": "/live",
    "live_asked": "calls of /live",
    "live_ms": "/live, ms",
    "cancel_seconds": "seconds to cancel",
    "job_asked_ms": "slowest answer about a job, ms",
    "lost_ends": "lost ends of jobs",
    "served_after_seconds": "seconds to the next result",
}


def plain(value: Any) -> str:
    """A figure in words: lists and mappings without their brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        parts = ["/".join(map(str, part)) if isinstance(part, list) else plain(part) for part in value]
        return (" " if isinstance(value[-1], str) else ", ").join(parts)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def fleet() -> str:
    """What `python -m lab.fleet all --json results/fleet` wrote, with what lab/fleet/figures.py says of each."""
    described = ast.get_docstring(ast.parse((ROOT / "lab/fleet/figures.py").read_text())) or ""
    about, rows = dict(re.findall(r"^(\w+) {2,}(.+)$", described, re.M)), []
    for path in sorted((RESULTS / "fleet").glob("*.json")):
        (result,) = read(path)
        name = result.pop("experiment")
        measured = "; ".join(
            f"{FLEET.get(key, key.replace('_', ' '))}: {plain(value)}" for key, value in result.items()
        )
        rows.append({"experiment": name, "what happens": about[name], "measured": measured})
    return table(rows, {"experiment": "", "what happens": "", "measured": ""})


def fidelity() -> str:
    """What `python -m lab.quality.fidelity` wrote of the setting."""
    names = {"ours": "", "ours, particles": "on"}
    rows = [{**row, "way": names[row["way"]]} for row in read(RESULTS / "fidelity.json") if row["way"] in names]
    columns = {
        "fidelity": ("`fidelity`", ".1f"), "way": ("`use_kds`", ""), "psnr to plain": ("PSNR to bicubic, dB", ".2f"),
        "psnr to truth": ("PSNR to the original, dB", ".2f"), "sharpness": ("sharpness", ".3f"),
        "niqe": ("NIQE", ".2f"), "invented": ("`invented`", ".4f"), "faithful": ("`faithful`, dB", ".2f"),
    }  # fmt: skip
    return titled(rows, columns)


def evaluated() -> list[dict[str, Any]]:
    """Means that `python -m lab.quality.evaluate --json results/NAME.json` wrote, with damage and images."""
    rows = []
    for name, (damage, kind) in EVALUATED.items():
        images = {row["picture"].partition("/")[0] for row in read(RESULTS / f"{name}.json")}
        for row in read(RESULTS / f"{name}.json", "means"):
            method = row["method"].replace("ours", "pocket").replace(" 1 steps", " 1 step")
            rows.append({**row, "damage": damage, "images": f"{kind}, {len(images)}", "method": method})
    return rows


GAIN = {"gain y, dB": ("gain, dB", "+.2f"), "95 %": ("95 % interval", ""), "least": ("worst image, dB", "+.2f")}


def quality() -> str:
    """The gain over bicubic with two steps."""
    rows = [row for row in evaluated() if row["method"] == "pocket, 2 steps"]
    return titled(rows, {"damage": ("damage", ""), "images": ("images", ""), **GAIN})


def quality_all() -> str:
    """Every method and measure."""
    columns = {
        "damage": ("damage", ""), "images": ("images", ""), "method": ("method", ""), "psnr_y": ("PSNR, dB", ".2f"),
        "ssim_y": ("SSIM", ".4f"), "niqe": ("NIQE", ".2f"), "delta_e": ("color error", ".2f"),
        "shift": ("color shift", ".2f"), **GAIN,
    }  # fmt: skip
    return titled(evaluated(), columns)


def quality_commands() -> str:
    """The command that wrote each file."""
    rows = [
        {
            "damage": damage, "images": kind,
            "command": f"`{json.loads((RESULTS / f'{name}.json').read_text())['command']}`",
        }
        for name, (damage, kind) in EVALUATED.items()
    ]  # fmt: skip
    return table(rows, dict.fromkeys(rows[0], ""))


def ablation() -> str:
    """What `python -m lab.quality.ablate` wrote."""
    rows = [{**row, "degradation": row["degradation"].replace("realesrgan", "strong")}
            for row in read(RESULTS / "ablation.json", "means")]  # fmt: skip
    columns = {"degradation": ("damage", ""), "variant": ("variant", ""), "psnr_y": ("PSNR, dB", ".2f")}
    columns |= {"change": ("change, dB", "+.2f"), "ssim_y": ("SSIM", ".4f"), "niqe": ("NIQE", ".2f")}
    return titled(rows, columns)


def presets() -> str:
    """The presets, and what `python -m lab.quality.fidelity --presets` wrote of them."""
    from seesr.settings.presets import PRESETS

    def sets(name: str) -> str:
        return ", ".join(f"`{setting}={value}`" for setting, value in PRESETS[name].items()) or "the defaults"

    rows = [{**row, "sets": sets(row["preset"])} for row in read(RESULTS / "presets.json")]
    columns = {
        "preset": ("preset", ""), "sets": ("sets", ""), "seconds": ("seconds", ".2f"), "psnr_y": ("PSNR, dB", ".2f"),
        "niqe": ("NIQE", ".2f"), "invented": ("`invented`", ".4f"), "faithful": ("`faithful`, dB", ".2f"),
    }  # fmt: skip
    return titled(rows, columns)


def mutation() -> str:
    """What `python -m lab.mutation` wrote, by package."""
    rows, result = read(RESULTS / "mutation.json"), []
    packages = {row["module"]: row["module"].split("/")[1] for row in rows}
    for name in [*sorted(set(packages.values())), "all"]:
        own = [row for row in rows if name in ("all", packages[row["module"]])]
        left = [row for row in own if row["verdict"] == "survived"]
        equal = sum(row["reason"].startswith("no effect") for row in left)
        killed = len(own) - len(left)
        counts = {"package": name, "tried": len(own), "killed": killed, "share": killed / len(own), "no effect": equal}
        result.append({**counts, "share without these": killed / max(1, len(own) - equal)})
    forms = {"package": "", "tried": "", "killed": "", "share": ".0%", "no effect": "", "share without these": ".0%"}
    return table(result, forms)


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


def signature(name: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """How a function is called, without types; a property has no parentheses."""
    if any(ast.unparse(mark).endswith("property") for mark in function.decorator_list):
        return name
    arguments = function.args
    arguments.args = [argument for argument in arguments.args if argument.arg not in ("self", "cls")]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    call = f"{name}({ast.unparse(arguments)})"
    return f"await {call}" if isinstance(function, ast.AsyncFunctionDef) else call


def api() -> str:
    """The public functions with the first sentences of their docstrings."""
    rows = []
    for module, names in API.items():
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        for name in names:
            found: ast.AST = tree
            for part in name.split("."):  # the last one of a name: the others are overloads
                *_, found = (node for node in getattr(found, "body", []) if getattr(node, "name", "") == part)
            assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
            about = (ast.get_docstring(found) or "").partition("\n\n")[0].replace("\n", " ")
            shown = name if name.partition(".")[0] in seesr.__all__ else f"{module}.{name}"
            rows.append({"call": f"`{signature(shown, found)}`", "what it does": about})
    return table(rows, {"call": "", "what it does": ""})


def h200() -> str:
    """What `python -m lab.speed.gpu_check` measured of whole images, and of the same networks run by other means."""
    peers = {"plain": "plain diffusers modules", "compiled blocks": "with `torch.compile`"}
    evidence = json.loads((RESULTS / "gpu-h200/evidence.json").read_text())["parts"]
    ours = [row for row in read(RESULTS / "gpu-h200/ratio.json") if row["evidence"] == "evidence.json"]
    rows = [{"networks": "this package", "output": row["size"], "seconds": row["seconds"]} for row in ours]
    rows += [{**row, "networks": peers[row["peer"]]} for row in evidence["peers"]["rows"] if row["peer"] in peers]
    columns = {"networks": ("networks", ""), "output": ("output, pixels", "d"), "seconds": ("seconds", ".3f")}
    return titled(rows, columns)


def soak() -> str:
    """What the soak test of Cog's server logged, see results/soak.txt."""
    parts = ast.literal_eval(re.findall(r"third: (\[.*\])", (RESULTS / "soak.txt").read_text())[0])
    rows = [
        {"third": name, "memory": part["memory"] / 1e6, "files": part["files"], "threads": part["threads"]}
        for name, part in zip(("second", "last"), parts, strict=True)
    ]
    columns = {"third": ("third", ""), "memory": ("memory, MB", ".1f"), "files": ("open files", "d")}
    return titled(rows, {**columns, "threads": ("threads", "d")})


def conversion() -> str:
    """What `python -m lab.conversion` measured."""
    (row,) = read(RESULTS / "conversion.json")
    took = f"{row['seconds']:.0f} s and {row['peak_gb']:.1f} GB of memory with {row['threads']} threads"
    return f"The conversion took {took} ([results/conversion.json](../results/conversion.json))."


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


def versus() -> str:
    """What `python -m lab.speed.versus` measured, with all instructions and with AVX2 alone."""
    columns = {
        "instructions": ("instructions", ""), "settings": ("settings", ""), "other": ("76de13d, s", ".2f"),
        "this": ("this state, s", ".2f"), "times": ("times as fast", ".1f"),
    }  # fmt: skip
    return titled([*read(RESULTS / "bench/versus-native.json"), *read(RESULTS / "bench/versus-avx2.json")], columns)


def cpu_options() -> str:
    """What `python -m lab.speed.cpu_options` measured."""
    columns = {
        "size": ("output, pixels", "d"), "threads": ("threads", "d"), "option": ("option", ""),
        "seconds": ("seconds", ".2f"), "cpu_seconds_per_mp": ("CPU seconds per megapixel", ".1f"),
        "peak_mb": ("memory, MB", "d"),
        "level": ("difference, levels", ".2f"),
    }  # fmt: skip
    return titled(read(RESULTS / "bench/cpu-options.json"), columns)


def peers() -> str:
    """What `python -m lab.quality.peers` measured on photographs."""
    from lab.quality.peers import COLUMNS

    titles = {
        "gain_db": "gain, dB", "least_db": "worst image, dB", "ssim": "SSIM", "alex": "LPIPS alex", "vgg": "LPIPS vgg",
        "niqe": "NIQE", "seconds_per_mp": "seconds per megapixel",
    }  # fmt: skip
    rows = [row for row in read(RESULTS / "peers.json", "means") if row["kind"] == "photograph"]
    rows = [{**row, "method": row["method"].replace("truth", "the original")} for row in rows]
    columns = {key: (titles.get(key, key), form) for key, form in COLUMNS.items() if key not in ("kind", "images")}
    return titled(rows, columns)


def by_kind(file: str, methods: Mapping[str, str], photographs: bool) -> str:
    """Gain in dB and LPIPS (alex) of some methods that `python -m lab.quality.peers` measured.

    Args:
        file: its name in results.
        methods: their names in the file -> in the table.
        photographs: with a row for them.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in read(RESULTS / file, "means"):
        if row["damage"] != "bicubic" and (photographs or row["kind"] != "photograph"):
            cell = cells.setdefault((row["kind"], row["damage"]), {"kind": row["kind"], "damage": row["damage"]})
            if row["method"] in methods:
                cell[methods[row["method"]]] = f"{row['gain_db']:+.2f}, {row['alex']:.3f}"
            elif row["method"] == "bicubic upscale":
                cell["bicubic"] = f"{row['alex']:.3f}"
    return table(cells.values(), dict.fromkeys(("kind", "damage", "bicubic", *methods.values()), ""))


def peers_kinds() -> str:
    """What `python -m lab.quality.peers` measured on other images than photographs."""
    names = ("RealESRGAN_x4plus", "DAT-light")
    return by_kind("peers.json", {"pocket, 1 step": "pocket", **dict(zip(names, names, strict=True))}, False)


def finetuned() -> str:
    """What `python -m lab.quality.peers` measured of bundles between the present one and a fine-tuned one."""
    shares = {f"cand-{share:g}, 1 step": f"{share:.0%} fine-tuned" for share in (0.5, 0.75, 1)}
    return by_kind("pocket-finetuned-teacher.json", {"pocket, 1 step": "present bundle", **shares}, True)


def region() -> str:
    """What `python -m lab.quality.region` counted, of the regions of 1 % and 10 %."""
    columns = {
        "output": ("output", ""), "region": ("region", ""), "area": ("share of the area", ".1%"),
        "tiles": ("tiles of the whole output", "d"), "corner": ("computed for a corner", ".1%"),
        "middle": ("computed for the middle", ".1%"),
    }  # fmt: skip
    return titled([row for row in read(RESULTS / "region.json") if 0.008 < row["area"] < 0.12], columns)


def stages() -> str:
    """What `python -m lab.speed.stages` measured."""
    columns = {"after": "", "change": "", "cold": ".2f", "warm": ".2f", "reused": "", "tiles_reused": "d"}
    return table(read(RESULTS / "stages.json"), columns)


def shard() -> str:
    """What `python -m lab.speed.shard` measured."""
    columns = {
        "processes": ("processes", "d"), "fault": ("fault", ""),
        "denoise_s": ("denoiser, s", ".2f"), "speedup": ("speedup", ".2f"), "tiles": ("tiles", "d"),
        "tiles_shared": ("of them by the other process", "d"), "encode_s": ("encoder, s", ".2f"),
        "decode_s": ("decoder, s", ".2f"), "same_bytes": ("same bytes", ""),
    }  # fmt: skip
    return titled(
        [{**row, "same_bytes": "yes" if row["same_bytes"] else "no"} for row in read(RESULTS / "shard.json")], columns
    )


def shard_simulated() -> str:
    """What `python -m lab.speed.shard` computed for more workers, of the largest output that is accepted."""
    rows = read(RESULTS / "shard.json", "simulated")
    rows = [
        row for row in rows
        if row["workers"] > 2 and row["output"] == "8192x8192" and not row["network"].startswith("100 ")
    ]  # fmt: skip
    columns = {
        "bundle": ("weights, worker", ""), "network": ("network", ""), "workers": ("workers", "d"),
        "denoise_s": ("denoiser, s", ".1f"), "denoise_speedup": ("speedup of the denoiser", ".1f"),
        "image_s": ("whole image, s", ".0f"), "image_speedup": ("speedup of the image", ".1f"),
    }  # fmt: skip
    return titled(rows, columns)


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
        "error": ("bound, levels", ".0f"), "tested": ("squares", "d"), "within": ("kept", ".1%"),
        "within_over_splits": ("kept, 200 splits", ".1%"), "trusted": ("white", ".0%"),
        "trusted_clean": ("white, clean", ".0%"), "trusted_mild": ("white, mild", ".0%"),
        "without_a_mask": ("kept without a mask", ".0%"),
    }  # fmt: skip
    return titled(read(RESULTS / "trust.json"), columns)


def contention() -> str:
    """What `python -m lab.speed.contention` measured."""
    names = {
        "as OpenMP does by default": "OpenMP default", "as seesr sets it": "seesr (`GOMP_SPINCOUNT=5000`)",
        "passive": "`OMP_WAIT_POLICY=PASSIVE`",
    }  # fmt: skip
    rows = [{**row, "waiting": names.get(row["waiting"], row["waiting"])} for row in read(RESULTS / "contention.json")]
    columns = {"waiting": ("setting", ""), "times": ("ratio", ".2f")}
    columns = {name: columns.get(name, (name, ".2f")) for name in rows[0]}
    return titled(rows, columns)


def costs(side: int) -> str:
    """What `scripts/cost.py` wrote."""
    return (RESULTS / f"costs-{side}.md").read_text().strip()


def price_dates() -> str:
    """From when the prices of scripts/prices.toml are."""
    import tomllib

    prices = tomllib.loads((ROOT / "scripts" / "prices.toml").read_text())["price"]
    days = sorted(price["read_on"] for price in prices)
    return f"The {len(prices)} prices were read from {days[0]} to {days[-1]}."


TABLES: dict[str, Callable[[], str]] = {
    "api": api,
    "inputs": inputs,
    "effects": effects,
    "variables": variables,
    "fleet": fleet,
    "fidelity": fidelity,
    "presets": presets,
    "ablation": ablation,
    "quality": quality,
    "quality-all": quality_all,
    "quality-commands": quality_commands,
    "flat": flat,
    "flat-photographs": flat_photographs,
    "cpu-options": cpu_options,
    "versus": versus,
    "peers": peers,
    "peers-kinds": peers_kinds,
    "finetuned": finetuned,
    "cards": cards,
    "h200": h200,
    "soak": soak,
    "conversion": conversion,
    "ratio": ratio,
    "packages": packages,
    "routes": routes,
    "price-dates": price_dates,
    "costs-512": functools.partial(costs, 512),
    "costs-2048": functools.partial(costs, 2048),
    "contention": contention,
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
