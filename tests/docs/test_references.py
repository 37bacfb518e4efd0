"""Links, files, tests, modules, variables and messages that the documentation names exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from scripts.cog_server import ROOT
from seesr.config import Configuration, variable
from tests.docs.test_code_blocks import PAGES

TEXTS = {page: re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M) for page in PAGES}
VARIABLES = {*map(variable, Configuration.model_fields), "SEESR_CACHE", "SEESR_GITHUB"}  # two of scripts/weights


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub makes them anchors."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def missing(text: str) -> list[str]:
    """What the code spans and commands of a text name and the repository does not have."""
    folders = "tests|lab|seesr|scripts|deploy|results|experiments"
    files = re.findall(rf"`((?:{folders})/[\w/.\-]+)`", text)
    modules = [name.replace(".", "/") for name in re.findall(r"python -m ((?:lab|seesr|experiments)[\w.]*)", text)]
    tests = re.findall(r"`(test_\w+)`", text)
    gone = [name for name in files if not (ROOT / name).exists()]
    gone += [name for name in modules if not list(ROOT.glob(f"{name}.py")) + list(ROOT.glob(f"{name}/__main__.py"))]
    gone += [name for name in re.findall(r"SEESR_[A-Z0-9_]+", text) if name not in VARIABLES]
    find = ["git", "-C", str(ROOT), "grep", "-q", "-E"]
    return gone + [name for name in tests if subprocess.run([*find, rf"def {name}\(", "--", "tests"]).returncode]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_tests_modules_and_variables_exist(page: Path) -> None:
    assert missing(TEXTS[page]) == []


def test_what_does_not_exist_is_noticed() -> None:
    text = "`lab/none.py` `test_that_nobody_wrote` python -m lab.none SEESR_NONE"
    assert missing(text) == ["lab/none.py", "lab/none", "SEESR_NONE", "test_that_nobody_wrote"]


def test_messages_of_the_troubleshooting_page_are_in_the_source() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "seesr").rglob("*.py"))
    rows = re.findall(r"^\| ([^|]*) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 15
    parts = [part.strip(" ;:") for message in messages for part in message.split("...")]
    assert [part for part in parts if part not in source] == []
