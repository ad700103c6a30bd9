"""`shardwise doctor`: what this machine offers to a job, and what is wrong with it."""

import argparse

from shardwise.launch.cli import DONE, FAILED
from shardwise.launch.cli.output import add_json, require_writable, write_json
from shardwise.launch.doctor import OK, Finding, examine, problems, to_json

_MARKS = {"ok": " ", "note": "-", "warning": "!", "problem": "X"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser, "all findings")


def run(args: argparse.Namespace) -> int:
    """0; 1 when something is broken."""
    require_writable(args.json)
    findings = examine()
    write_json(to_json(findings), args.json)
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
