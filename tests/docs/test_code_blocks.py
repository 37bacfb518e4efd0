"""Every code block of the documentation runs, line by line, or has a reason here why it cannot."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.cog_server import ROOT
from seesr import Engine, cli
from seesr.cli.commands import COMMANDS, parser, with_command
from seesr.engine import api

# Replicate's client leaves sockets and short programs leave files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [*sorted((ROOT / "deploy").rglob("*.md")), ROOT / "examples/README.md"]
ADDRESS = re.compile(r"(?:http://)?(?:127\.0\.0\.1|localhost):5000")
DRAWINGS = {"mermaid", "text"}
SHELLS = ("", "sh", "bash", "shell", "console")
OTHER_LANGUAGES = {
    "js": "tests/serve/test_replicate.py runs Replicate's JavaScript client",
    "json": "data; tests/serve/test_mcp.py connects as the blocks of docs/mcp.md say",
    "yaml": "tests/deploy reads the real files; tests/serve/test_generated_clients.py uses that of docs/http-api.md",
    "toml": "data",
    "html": "data",
    "ini": "tests/deploy reads the real files",
}
REASONS = {  # programs that a test cannot run: why not
    "claude": "needs the assistant",
    "cog": "needs Cog and Docker",
    "docker": "needs Docker",
    "kubectl": "needs a cluster",
    "modal": "needs an account",
    "hf": "needs an account and uploads",
    "sudo": "changes the machine",
    "git": "needs the address of the repository",
    "helm": "needs a cluster",
    "aws": "needs an account",
    "gcloud": "needs an account",
    "pip": "changes the environment",
    "apt-get": "changes the machine",
    ".venv/bin/pip": "changes the environment",
    "openssl": "a part of setting a key",
    "npm": "needs a registry",
    "npx": "needs a registry",
    "nvidia-smi": "needs a GPU",
    "openapi-python-client": "tests/serve/test_generated_clients.py runs it",
}


ELSEWHERE = {  # parts of lines that other tests run
    "localhost:5000/predictions": "needs Cog's own server; tests/server sends it the same request",
}


class Block(NamedTuple):
    """One code block: the page, its line, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    results = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.S | re.M):
            line = text.count("\n", 0, match.start()) + 1
            results.append(Block(page.relative_to(ROOT).as_posix(), line, match[1], match[2]))
    return results


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines are joined, prompts and comments left out."""
    lines = re.sub(r"\\\n|\|\n", lambda match: match[0][0].replace("\\", " ") + " ", text).splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def is_drawing(block: Block) -> bool:
    """Boxes and arrows, or what a program prints; no line of it begins with a program."""
    return block.language in DRAWINGS or (not block.language and ("->" in block.text or "|" in block.text[:2]))


@pytest.fixture(autouse=True)
def one_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "load", lambda *args, **named: engine)
    monkeypatch.setattr(Engine, "__exit__", lambda *error: None)
    api.cached_engine.cache_clear()


@pytest.mark.parametrize("block", [block for block in blocks() if block.language in ("python", "py")], ids=str)
def test_python(block: Block, reader: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    text = block.text.replace("<you>", "you")
    if "replicate" in text or ADDRESS.search(text):
        url = request.getfixturevalue("echo")
        monkeypatch.setenv("REPLICATE_BASE_URL", url)
        monkeypatch.setenv("REPLICATE_API_TOKEN", "none")
        text = ADDRESS.sub(url, text)
    exec(compile(text, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "block", [block for block in blocks() if block.language in ("", "sh", "bash", "shell")], ids=str
)
def test_shell(block: Block, reader: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if is_drawing(block) and not any(line.split()[0] in (*COMMANDS, "curl") for line in commands(block.text)):
        return
    for line in commands(block.text):
        run_line(line, reader, request)


def run_line(line: str, reader: Path, request: pytest.FixtureRequest) -> None:
    """Runs one command, or sees that it could be run.

    `seesr` runs here, or is only parsed where it would not end; `curl` asks a server that gives its input back; of our
    scripts the file must be there and be executable.
    """
    if any(part in line for part in ELSEWHERE):
        return
    parts = shlex.split(re.sub(r"\$\([^)]*\)", "X", line), comments=True)
    while parts and re.fullmatch(r"[A-Z_]+=.*", parts[0]):
        parts.pop(0)
    program = Path(parts[0]).name if parts else ""
    if not parts or program in ("export", "cd", "echo", "eval", "mkdir", "cp") or parts[0] in REASONS:
        return
    if program == "seesr":
        end = next((n for n, word in enumerate(parts) if word in ("&&", "|", ">", "&", ";")), len(parts))
        arguments = with_command(parts[1:end])
        if "|" in parts or ">" in parts or "-" in arguments:
            piped(line, reader)
        elif arguments[0] in ("upscale", "verify"):
            assert cli.main(arguments) == 0, line
        elif "--version" not in arguments and "--help" not in arguments:
            parser().parse_args(arguments)
    elif program == "curl":
        url = request.getfixturevalue("echo")
        text = re.sub(r"/jobs/ID/\w+", "/status", ADDRESS.sub(url, line))
        done = subprocess.run(["bash", "-c", text], cwd=reader, env={**os.environ, "TOKEN": "x"}, capture_output=True)
        assert done.returncode == 0, (line, done.stderr)
    elif program in ("python", "python3"):
        target = next(word for word in parts[1:] if not word.startswith("-"))
        file = ROOT / target if target.endswith(".py") else ROOT / (target.replace(".", "/") + ".py")
        assert file.exists() or file.with_suffix("").is_dir() or target in ("pip", "pytest", "venv"), line
    elif parts[0].startswith(("./scripts/", "scripts/")):
        assert os.access(ROOT / parts[0], os.X_OK), line
    elif program == "cat" or "seesr" in parts:
        piped(line, reader)
    else:
        pytest.fail(f"no test can run {line!r}: run it in run_line, or give the reason in REASONS")


def piped(line: str, reader: Path) -> None:
    """Runs a line of the shell in which `seesr` is this package's."""
    bin_folder = reader / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "seesr").write_text(f'#!/bin/sh\nexec {sys.executable} -m seesr "$@"\n')
    (bin_folder / "seesr").chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=reader, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_every_language_is_known(block: Block) -> None:
    known = {*SHELLS, "python", "py", *DRAWINGS, *OTHER_LANGUAGES}
    assert block.language in known, f"{block}: run {block.language} blocks, or give the reason in OTHER_LANGUAGES"
