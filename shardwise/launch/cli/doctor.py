"""`shardwise doctor`: what this machine offers to a job, and what is wrong with it."""

import argparse
import json
from pathlib import Path

from shardwise.launch.cli import DONE, FAILED
from shardwise.launch.doctor import OK, Finding, examine, problems, to_json

_MARKS = {"ok": " ", "note": "-", "warning": "!", "problem": "X"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="all findings as JSON, to FILE or standard output"
    )


def run(args: argparse.Namespace) -> int:
    """0; 1 when something is broken."""
    findings = examine()
    if args.json:
        text = json.dumps(to_json(findings), indent=1)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")
    if args.json != "-":
        print(table(findings))
    return FAILED if problems(findings) else DONE


def table(findings: list[Finding]) -> str:
    """The report: one block a section, marked - absent, ! warning, X problem."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines.append(f"{_MARKS[finding.state]} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"  {'':<{width}}  -> {finding.advice}")
    bad = [finding for finding in findings if finding.state not in (OK, "note")]
    lines += ["", f"{len(bad)} finding(s) need attention" if bad else "nothing needs attention"]
    return "\n".join(lines)
