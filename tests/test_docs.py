"""The documentation holds: links lead somewhere, commands parse, files that are named exist, examples run."""

import fnmatch
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.launch import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
OURS = re.compile(r"(?<![\w/])(?:benchmarks|docs|examples|shardwise|tests)/[\w./-]*\w")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `shardwise ...` that a page shows."""
    found = []
    for page in PAGES:
        text = page.read_text()
        shell = [block for language, block in FENCE.findall(text) if language != "python"]
        lines = [line.split(" #")[0] for block in shell for line in block.splitlines()]
        inline = re.findall(r"`([^`\n]*)`", FENCE.sub("", text))
        for line in (*lines, *inline):
            for part in re.split(r"&&|;", line.removeprefix("$ ")):
                found += [(name(page), words) for words in re.findall(r"(?:^|\s)shardwise (\w.*|--\w+)$", part.strip())]
    return sorted(set(found))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{name(page)} links to {target}: {sorted(anchors(linked))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page):
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    missing = [path for text in inline for path in OURS.findall(text) if not list(ROOT.glob(path + "*"))]
    assert not missing, f"{name(page)} names {missing}"


@pytest.mark.parametrize("page, command", commands())
def test_commands_parse(page, command, monkeypatch):
    words = [word for word in shlex.split(re.sub(r"[\[\]]| \.\.\.", "", command)) if word]
    module = f"bench_{words[1]}" if words[0] == "bench" else words[0]
    if not words[0].startswith("--"):
        monkeypatch.setattr(importlib.import_module(f"shardwise.launch.cli.{module}"), "run", lambda args: 0)
        assert cli.main(words) == 0


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_compile(page):
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            compile(block, name(page), "exec")


def test_every_benchmark_and_result_is_listed():
    listed = re.findall(r"`([^`\n]+)`", (ROOT / "benchmarks" / "README.md").read_text())
    programs = [path.name for path in (ROOT / "benchmarks").glob("*.py")]
    results = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    assert [program for program in programs if not any(program in text for text in listed)] == []
    assert [result for result in results if not any(fnmatch.fnmatch(result, text) for text in listed)] == []


@pytest.mark.parametrize(
    "example, word",
    [
        (
            "plan_a_model.py benchmarks/shapes/gpt-oss-120b.json",
            "rank 3 holds (25136, 2880) of model.embed_tokens.weight",
        ),
        ("operators.py", "tensor([8.0000, 8.0000, 8.0000, 8.0000])"),
        ("collectives.py", "[0.0, 1.0, 2.0, 3.0, 4.0] [10.0, 10.0]"),
    ],
)
def test_examples_run(example, word):
    script, *words = example.split()
    command = [sys.executable, f"examples/{script}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and word in done.stdout, done.stdout + done.stderr
