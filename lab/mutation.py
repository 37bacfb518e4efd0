"""Mutation testing: changes the code in small ways, one at a time, and counts the changes that tests detect.

python -m lab.mutation [MODULE ...] --json results/mutation.json [--max-mutants 40] [--jobs 2]

Each mutant is written into a copy of the project, where the tests of its module run in a fork of this process, which
has loaded the libraries already; what lives is shown to slower tests. A survivor's `reason`, written by hand into the
file, is kept by the next run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from lab.report import ROOT, read, table, write

UNIT, PIPELINE, SERVE = "tests/unit/test_", "tests/pipeline/test_", "tests/serve/test_"
IMAGES = [UNIT + "images.py"], [UNIT + "inputs.py"]
TESTS = {  # module -> the tests that run on every mutant, and those that run on the survivors of these
    "engine/rates": ([UNIT + "rates.py"], []),
    "engine/quote": ([PIPELINE + "quote.py"], []),
    "serving/keys": ([SERVE + "keys.py"], [SERVE + "parts.py"]),
    "serving/fairness": ([SERVE + "fairness.py"], []),
    "serving/access": ([SERVE + "access.py"], []),
    "serving/requests": ([SERVE + "requests.py"], []),
    "images/xmp": ([UNIT + "xmp.py"], []),
    "images/content_credentials": ([PIPELINE + "provenance.py"], []),
    "pipeline/stages": ([PIPELINE + "stages.py"], []),
    "settings/region": ([PIPELINE + "region.py"], []),
    "settings/settings": ([UNIT + "settings.py"], ["tests/server/test_contract.py", PIPELINE + "region.py"]),
    "settings/validation": ([UNIT + "settings.py"], []),
    "runtime/tiling": ([UNIT + "tiling.py", UNIT + "autoencoder.py"], []),
    "images/color": ([UNIT + "color.py"], []),
    "images/image_data": IMAGES,
    "images/deep": IMAGES,
    "images/read": ([UNIT + "images.py", UNIT + "fuzz.py"], [UNIT + "inputs.py"]),
    "images/write": IMAGES,
    "images/png": IMAGES,
    "images/kinds": ([UNIT + "images.py", UNIT + "fuzz.py"], [UNIT + "inputs.py"]),
    "images/record": IMAGES,
    "runtime/memory": ([UNIT + "memory.py"], []),
    "runtime/precision": ([UNIT + "precision.py"], []),
    "runtime/progress": ([UNIT + "progress.py"], []),
    "pipeline/steering": ([UNIT + "steering.py"], []),
    "pipeline/denoiser": ([UNIT + "denoiser.py", UNIT + "models.py"], [PIPELINE + "work.py"]),
    "engine/engine": ([PIPELINE + "engine.py"], [PIPELINE + "cli.py"]),
}
OPERATORS = [  # one change of each kind: a second of the same place tells nothing new
    *(f"core/ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul")),
    *(f"core/ReplaceBinaryOperator_{pair}" for pair in ("Mod_Add", "Pow_Mul", "BitAnd_Add", "LShift_RShift")),
    *(f"core/ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *(f"core/ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    *(f"core/Replace{pair}" for pair in ("AndWithOr", "OrWithAnd", "TrueWithFalse", "FalseWithTrue")),
    *(f"core/{name}" for name in ("AddNot", "NumberReplacer", "ZeroIterationForLoop")),
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ReplaceUnaryOperator_Delete_USub",
    "core/RemoveDecorator",
]


SEEN_BEFORE = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of libraries that are loaded already


class Mutant(NamedTuple):
    """One change: the module, what was changed where, and the code that has it (None: the code as it is)."""

    module: str
    operator: str
    line: int
    text: str
    code: str | None


def mutants_of(module: str) -> list[Mutant]:
    """Every change of a module that leaves other code."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = (ROOT / f"seesr/{module}.py").read_text()
    lines, result = code.splitlines(), []
    for name in OPERATORS:
        operator = get_operator(name)()
        places = [at for node in ast_nodes(get_ast(code)) for at, _ in operator.mutation_positions(node)]
        for occurrence, (line, _) in enumerate(places):
            changed = mutate_code(code, operator, occurrence)
            if changed not in (None, code):
                result.append(Mutant(module, name.removeprefix("core/"), line, lines[line - 1].strip(), changed))
    return result


def compiles(mutant: Mutant) -> bool:
    """Whether it is a program at all: `**` of a dict cannot be a product."""
    try:
        compile(mutant.code or "", mutant.module, "exec")
    except SyntaxError:
        return False
    return True


def load_libraries() -> None:
    """Imports what the tests import besides this project, and starts no thread. OpenMP reads its variables here."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    import diffusers
    import hypothesis
    import pytest
    import skimage.data
    import timm
    import transformers

    del diffusers, hypothesis, pytest, skimage, timm, transformers


def begin(mutant: Mutant, tests: list[str], folder: Path, core: int) -> int:
    """Starts the tests of one mutant in `folder`; returns the process, which ends with 0 if they pass."""
    path = folder / f"seesr/{mutant.module}.py"
    path.write_text(mutant.code or (ROOT / f"seesr/{mutant.module}.py").read_text())
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()
        os.sched_setaffinity(0, {core})
        os.chdir(folder)
        log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for stream in range(3):
            os.dup2(log, stream)
        os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("lab", "seesr")]:
            del sys.modules[name]
        import pytest

        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *SEEN_BEFORE, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run(mutants: list[Mutant], tests: list[str], folders: list[Path], limit: float) -> list[tuple[Mutant, str, float]]:
    """(mutant, "survived", "killed" or "killed: too slow", seconds) of each, as many at once as there are folders."""
    cores = sorted(os.sched_getaffinity(0))
    waiting, free, result = list(reversed(mutants)), list(range(len(folders))), []
    running: dict[int, tuple[Mutant, int, float]] = {}
    while waiting or running:
        while waiting and free:
            mutant, place = waiting.pop(), free.pop()
            running[begin(mutant, tests, folders[place], cores[place % len(cores)])] = mutant, place, time.monotonic()
        time.sleep(0.05)
        for process, (mutant, place, started) in list(running.items()):
            seconds = time.monotonic() - started
            late = seconds > limit
            if late:
                os.killpg(process, signal.SIGKILL)
            ended, status = os.waitpid(process, 0 if late else os.WNOHANG)
            if not ended:
                continue
            del running[process]
            free.append(place)
            (folders[place] / f"seesr/{mutant.module}.py").write_text((ROOT / f"seesr/{mutant.module}.py").read_text())
            verdict = "killed: too slow" if late else "killed" if status else "survived"
            result.append((mutant, verdict, seconds))
            print(f"{mutant.module}:{mutant.line} {mutant.operator} {verdict} {seconds:.0f} s", flush=True)
    return result


def copies(top: Path, count: int) -> list[Path]:
    """Copies of the project's files, as git lists them."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    folders = [top / str(number) for number in range(count)]
    for folder in folders:
        for name in filter(None, names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folders


def as_it_is(module: str, tests: list[str], folders: list[Path]) -> float:
    """Seconds of the tests with nothing broken; they must pass."""
    [(_, verdict, seconds)] = run([Mutant(module, "nothing", 0, "", None)], tests, folders, 3600)
    if verdict != "survived":
        output = "\n".join(line for folder in folders for line in (folder / "log").read_text().splitlines()[-20:])
        raise SystemExit(f"the tests of {module} fail as they are:\n{output}")
    return seconds


def summary(module: str, left: list[Mutant], tried: int, total: int, old: dict[Any, str]) -> dict[str, Any]:
    """The row of one module."""
    survivors = []
    for mutant in left:
        about = {"line": mutant.line, "operator": mutant.operator, "text": mutant.text}
        survivors.append({**about, "reason": old.get((module, mutant.operator, mutant.text), "")})
    killed = tried - len(left)
    row = {"module": module, "mutants": total, "tried": tried, "killed": killed, "share": killed / max(1, tried)}
    return {**row, "survivors": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; none: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--max-mutants", type=int, default=10**6, help="of a module, drawn with seed 0 if there are more"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests at once, one core each")
    args = parser.parse_args()
    rows = {row["module"]: row for row in read(args.json)} if args.json and args.json.exists() else {}
    old = {
        (name, mutant["operator"], mutant["text"]): mutant["reason"]
        for name, row in rows.items()
        for mutant in row["survivors"]
    }
    load_libraries()
    with tempfile.TemporaryDirectory() as top:
        folders = copies(Path(top), args.jobs)
        for module in args.modules or TESTS:
            every = mutants_of(module)
            drawn = random.Random(0).sample(every, min(args.max_mutants, len(every)))
            left = [mutant for mutant in drawn if compiles(mutant)]
            tried = len(left)
            for tests in filter(None, TESTS[module]):
                if left:
                    result = run(left, tests, folders, 3 * as_it_is(module, tests, folders) + 20)
                    left = [mutant for mutant, verdict, _ in result if verdict == "survived"]
            rows[module] = summary(module, left, tried, len(every), old)
            if args.json:
                write(args.json, [rows[name] for name in TESTS if name in rows])
    print(table(rows.values(), {"module": "", "mutants": "d", "tried": "d", "killed": "d", "share": ".0%"}))


if __name__ == "__main__":
    main()
