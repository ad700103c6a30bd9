"""The table of token equality: which family generates Transformers' tokens, under which layout, over which transport.

Tests enter what they compare; the table stands at the end of every run that has entries. `conftest.py` beside this file
takes `parity` and `pytest_terminal_summary` from here.
"""

import re
from collections.abc import Callable

import pytest

TRANSPORTS = {"threads": "t", "shm": "s", "gloo": "g", "mpi": "m", "nccl": "n", "p2p": "p", "single": "1"}
KEY = "parity"


@pytest.fixture
def parity(record_property) -> Callable[[str, object, str], None]:
    """`parity(family, layout, transport)`: this test, if it passes, shows equal tokens there."""

    def enter(family: str, layout: object, transport: str) -> None:
        record_property(KEY, (family, str(layout), transport))

    return enter


def pytest_terminal_summary(terminalreporter) -> None:
    cells: dict[tuple[str, str], dict[str, bool]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, entry in getattr(report, "user_properties", ()):
                if name == KEY:
                    family, layout, transport = entry
                    seen = cells.setdefault((family, layout), {})
                    seen[transport] = seen.get(transport, True) and outcome == "passed"
    if cells:
        terminalreporter.section("token equality with Transformers")
        for line in table(cells):
            terminalreporter.write_line(line)


def table(cells: dict[tuple[str, str], dict[str, bool]]) -> list[str]:
    """cells: (family, layout) -> {transport: equal}."""
    families = list(dict.fromkeys(family for family, _ in cells))
    layouts = sorted({layout for _, layout in cells}, key=lambda text: (len(text.split(",")), text))
    used = [t for t in TRANSPORTS if any(t in seen for seen in cells.values())]
    rows = [["", *map(_short, layouts)]]
    for family in families:
        rows.append([family, *(_cell(cells.get((family, layout), {})) for layout in layouts)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    legend = ", ".join(f"{TRANSPORTS[t]} {t}" for t in used)
    return [*lines, f"({legend}; ! before a letter: other tokens there)"]


def _short(layout: str) -> str:
    """`tp 4, moe_tp 2 x ep 2` -> `tp4 moe_tp2 ep2`."""
    return re.sub(r" (?=\d)", "", layout).replace("moe_tp1 x ", "").replace(" x ", " ").replace(",", "")


def _cell(seen: dict[str, bool]) -> str:
    return "".join(("" if seen[t] else "!") + letter for t, letter in TRANSPORTS.items() if t in seen)
