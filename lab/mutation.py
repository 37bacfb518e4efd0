"""Mutation testing: changes the code in small ways, one at a time, and counts the changes that tests detect.

python -m lab.mutation --map [TEST ...]        # runs the tests, or these, to learn which lines each executes
python -m lab.mutation --json results/mutation.json --seed 1 [--minutes 25] [--jobs 2] [PATH ...]

Mutants are drawn from all modules of `seesr/`. Each is written into a copy of the project, where tests that execute its
line run in a fork of this process, which has loaded the libraries already. Long tests run too, slow ones do not.
Mutants that the file has are not run again: a stopped run continues with the same seed. The `reason` of a survivor is
written into the file by hand; one that begins with "no effect" says why no test can see the change.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.report import ROOT, read, write

MAP = ROOT / "build/mutation-map.json"
SECONDS = 20  # of tests for one mutant
MEMORY = 8 << 30  # bytes of a test process: a mutant that allocates without end fails
LIBRARIES = """celery cv2 diffusers httpx huggingface_hub hypothesis imagecodecs mcp obstore prometheus_client pytest
    pydantic_settings redis requests scipy.ndimage skimage.data starlette.testclient tifffile timm transformers"""
WARNING = "ignore::pytest.PytestAssertRewriteWarning"
PYTEST = ["-q", "--all", "-mnot slow", "-pno:cacheprovider", "-W", WARNING, "--hypothesis-seed=0"]
COVERAGE = """[run]
parallel = true
data_file = {folder}/.coverage
include = {folder}/seesr/*
context = ${{COVERAGE_CONTEXT}}
sigterm = true
disable_warnings = no-data-collected, module-not-measured, couldnt-parse
"""
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


class Mutant(NamedTuple):
    """One change: the file, what was changed where, and the code that has it."""

    module: str
    operator: str
    line: int
    text: str
    changed: str
    code: str


class Map(NamedTuple):
    """What the tests execute.

    Attributes:
        lines: file and text of each line; numbers would move with every edit.
        tests: the seconds of each test with its fixtures, and the places of its lines in `lines`.
    """

    lines: list[tuple[str, str]]
    tests: dict[str, tuple[float, list[int]]]


@functools.cache
def source(module: str) -> str:
    return (ROOT / module).read_text()


def places(module: str) -> list[tuple[str, str, int, int]]:
    """(module, operator, occurrence, line) of every change of a module."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    result, nodes = [], list(ast_nodes(get_ast(source(module))))
    for name in OPERATORS:
        operator = get_operator(name)()
        lines = [start[0] for node in nodes for start, _ in operator.mutation_positions(node)]
        result += [(module, name, occurrence, line) for occurrence, line in enumerate(lines)]
    return result


def mutate(module: str, operator: str, occurrence: int, line: int) -> Mutant | None:
    """One change; None if it leaves the code as it is, or no program: `**` of a dict cannot be a product."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutate_code(source(module), get_operator(operator)(), occurrence) or source(module)
    pairs = zip(source(module).splitlines(), code.splitlines(), strict=False)
    pair = next(((old.strip(), new.strip()) for old, new in pairs if old != new), None)
    try:
        compile(code, module, "exec")
    except SyntaxError:
        return None
    return pair and Mutant(module, operator.removeprefix("core/"), line, *pair, code)


def tests_of(mutant: Mutant, known: Map) -> list[str]:
    """The tests that execute the statement that was changed, those first that execute least else; some `SECONDS`.

    A constant or a field is set at import: it is tested where its name is used. If no test executes the statement, all
    tests that execute the module count.
    """
    inside, first, last, names = False, mutant.line, mutant.line, set[str]()
    for node in ast.walk(ast.parse(source(mutant.module))):  # outer statements come before inner ones
        if isinstance(node, ast.stmt) and node.lineno <= mutant.line <= (node.end_lineno or 0):
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            names = set() if inside else {one.id for one in targets if isinstance(one, ast.Name)}
            first, last = node.lineno, node.end_lineno or node.lineno
            inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    changed = {line.strip() for line in source(mutant.module).splitlines()[first - 1 : last]}
    uses = re.compile(rf"\b({'|'.join(names) or '(?!)'})\b")
    own = {at for at, (module, _) in enumerate(known.lines) if module == mutant.module}
    wanted = {at for at in own if known.lines[at][1] in changed}
    wanted |= {at for at, (_, text) in enumerate(known.lines) if uses.search(text)}
    found = [name for name, (_, lines) in known.tests.items() if not wanted.isdisjoint(lines)]
    found = found or [name for name, (_, lines) in known.tests.items() if not own.isdisjoint(lines)]
    found.sort(key=lambda name: (f"test_{Path(mutant.module).name}" not in name, len(known.tests[name][1]), name))
    ends = itertools.accumulate(known.tests[name][0] for name in found)
    near = [name for place, (name, end) in enumerate(zip(found, ends, strict=True)) if end < SECONDS or place == 0]
    files = list(dict.fromkeys(name.partition("::")[0] for name in near))
    order = {name: place for place, name in enumerate(known.tests)}  # tests of one file may depend on it
    return sorted(near, key=lambda name: (files.index(name.partition("::")[0]), order[name]))


def exists(test: str) -> bool:
    """Whether a test of the map is still there: pytest fails for a name that it does not find."""
    file, _, name = test.partition("::")
    return (ROOT / file).exists() and f"def {name.partition('[')[0].rpartition('::')[2]}(" in source(file)


def load_libraries() -> None:
    """Imports what the tests import besides this project, and starts no thread. OpenMP reads its variables here."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    for name in LIBRARIES.split():
        importlib.import_module(name)


def fork(folder: Path, work: Callable[[], int]) -> int:
    """Starts `work` in a copy of the project; returns the process, which ends with what `work` returns."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.chdir(folder)
        log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for stream in range(3):
            os.dup2(log, stream)
        os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("lab", "seesr")]:
            del sys.modules[name]
        status = int(work())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Failures:
    """A pytest plugin that writes the names of the tests that fail to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            with self.file.open("a") as file:
                file.write(report.nodeid + "\n")


def begin(folder: Path, *arguments: str) -> int:
    """Starts pytest in a copy of the project; the names of failed tests go to `failed` there. Returns the process."""
    plugins = [Failures(folder / "failed")]
    return fork(folder, lambda: pytest.main([*PYTEST, *arguments], plugins=plugins))


def run(mutants: list[Mutant], known: Map, folders: list[Path], end: float) -> dict[Mutant, tuple[str, str]]:
    """Says of each mutant "survived", "too slow", or "killed" and by which test; begins none after `end`."""
    waiting, free, results = list(reversed(mutants)), list(folders), {}
    running: dict[int, tuple[Mutant, Path, float, float]] = {}
    while running or (waiting and time.monotonic() < end):
        while waiting and free and time.monotonic() < end:
            mutant = waiting.pop()
            if not (names := tests_of(mutant, known)):
                results[mutant] = "survived", ""
                continue
            folder = free.pop()
            (folder / mutant.module).write_text(mutant.code)
            limit = 30 + 3 * sum(known.tests[name][0] for name in names)
            running[begin(folder, "-x", *names)] = mutant, folder, time.monotonic(), limit
        time.sleep(0.02)
        for process, (mutant, folder, started, limit) in list(running.items()):
            seconds = time.monotonic() - started
            if late := seconds > limit:
                os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, 0 if late else os.WNOHANG)
            if not ended:
                continue
            del running[process]
            free.append(folder)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # what a stopped test left behind
            (folder / mutant.module).write_text(source(mutant.module))
            verdict = "too slow" if late else "killed" if status else "survived"
            results[mutant] = verdict, (folder / "failed").read_text().partition("\n")[0]
            print(f"{mutant.module}:{mutant.line} {mutant.changed!r} {verdict} {seconds:.0f} s", flush=True)
    return results


def copies(top: Path, count: int) -> list[Path]:
    """Copies of the project's files, as git lists them."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    folders = [top / str(number) for number in range(count)]
    for folder in folders:
        for name in filter(None, names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folders


class Recorder:
    """Runs tests in a copy of the project and records what each executes, here and in processes that it starts.

    A pytest plugin. `tests` has the seconds, the number of passed phases and the fixtures of each test.
    """

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        import coverage

        self.folder, self.arguments, self.context = folder, arguments, ""
        self.tests: dict[str, tuple[float, int, list[str]]] = {}
        (folder / "coveragerc").write_text(COVERAGE.format(folder=folder))
        (folder / "sitecustomize.py").write_text("import coverage\n\ncoverage.process_startup()\n")
        self.coverage = coverage.Coverage(f"{folder}/.coverage.tests", include=[f"{folder}/seesr/*"], config_file=False)

    def switch(self, context: str) -> str:
        """Names what runs from now on, here and in the processes that are started; returns the name before."""
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        os.environ["COVERAGE_CONTEXT"] = context
        return before

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.tests[item.nodeid] = 0.0, 0, list(getattr(item, "fixturenames", ()))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.switch(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        shared = fixturedef.scope != "function"  # what it executes counts for all of its tests
        before = self.switch(f"{fixturedef.argname} of {fixturedef.baseid}" if shared else self.context)
        try:
            return (yield)
        finally:
            self.switch(before)

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds, passed, fixtures = self.tests.get(report.nodeid, (0.0, 0, []))
        self.tests[report.nodeid] = seconds + report.duration, passed + report.passed, fixtures

    def __call__(self) -> int:
        os.environ["COVERAGE_PROCESS_START"] = str(self.folder / "coveragerc")
        with self.coverage.collect():
            pytest.main([*PYTEST, *self.arguments], plugins=[self])
        self.coverage.save()
        (self.folder / "tests.json").write_text(json.dumps(self.tests))
        return 0


def recorded(folder: Path, known: Map) -> Map:
    """Adds what a Recorder recorded in `folder` of the tests that passed."""
    import coverage

    print((folder / "log").read_text()[-3000:])
    places, lines = {line: place for place, line in enumerate(known.lines)}, defaultdict[str, set[int]](set)
    for path in folder.glob(".coverage.*"):
        data = coverage.CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            module = str(Path(file).relative_to(folder))
            texts = source(module).splitlines()
            for line, contexts in data.contexts_by_lineno(file).items():
                text = "".join(texts[line - 1 : line]).strip()  # Python counts a line in an empty file
                place = places.setdefault((module, text), len(places))
                for context in contexts:
                    lines[context].add(place)
    new = {}
    for name, (seconds, passed, fixtures) in json.loads((folder / "tests.json").read_text()).items():
        shared = [context for context in lines if context.partition(" of ")[0] in fixtures]
        shared = [context for context in shared if name.startswith(context.partition(" of ")[2])]
        if passed == 3:  # set-up, call and teardown
            new[name] = seconds, sorted(lines[name].union(*(lines[context] for context in shared)))
    files = {name.partition("::")[0] for name in new}
    return Map(list(places), {a: b for a, b in known.tests.items() if a.partition("::")[0] not in files} | new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", default=["seesr"], help="folders and files to break")
    parser.add_argument("--map", nargs="*", metavar="TEST", help="only learn what tests execute; none named: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--max-mutants", type=int, default=400, help="mutants in total, each as likely as any other")
    parser.add_argument("--minutes", type=float, default=25, help="after which no mutant is begun")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests at once, one core each")
    args = parser.parse_args()
    load_libraries()
    known = Map([], {})
    if MAP.exists() and args.map != []:
        lines, tests = json.loads(MAP.read_text())
        known = Map([(module, text) for module, text in lines], {a: b for a, b in tests.items() if exists(a)})
    with tempfile.TemporaryDirectory() as top:
        folders = copies(Path(top), args.jobs)
        if args.map is not None or not known.tests:
            tests = args.map or sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
            parts = [(folder, tests[number :: len(folders)]) for number, folder in enumerate(folders)]
            for process in [fork(folder, Recorder(folder, part)) for folder, part in parts if part]:
                os.waitpid(process, 0)
            for folder, part in parts:
                known = recorded(folder, known) if part else known
            MAP.write_text(json.dumps(known))
            return
        files = [file for path in args.paths for file in (Path(path).rglob("*.py") if Path(path).is_dir() else [path])]
        every = [place for file in sorted(map(str, files)) for place in places(file)]
        random.Random(args.seed).shuffle(every)
        rows = read(args.json) if args.json and args.json.exists() else []
        tried = {(row["module"], row["operator"], row["line"], row["changed"]) for row in rows}
        drawn = list(itertools.islice(filter(None, itertools.starmap(mutate, every)), args.max_mutants))
        drawn = [one for one in drawn if (one.module, one.operator, one.line, one.changed) not in tried]
        results = run(drawn, known, folders, time.monotonic() + 60 * args.minutes)
        os.waitpid(begin(folders[0], *sorted({test for _, test in results.values() if test})), 0)
        unreliable = set((folders[0] / "failed").read_text().splitlines())  # they fail without a mutant
        reliable = Map(known.lines, {name: test for name, test in known.tests.items() if name not in unreliable})
        results |= run(
            [mutant for mutant, (_, test) in results.items() if test in unreliable], reliable, folders, math.inf
        )
    for mutant, (verdict, test) in results.items():
        row = {name: value for name, value in mutant._asdict().items() if name != "code"} | {"verdict": verdict}
        rows.append(row | ({"test": test} if test else {"reason": ""}))
    if args.json:
        write(args.json, rows, places=len(every), unreliable=sorted(unreliable))
    print(f"{Counter(row['verdict'] for row in rows)} of {len(every)} places; without a mutant fail: {unreliable}")


if __name__ == "__main__":
    main()
