"""Writes the results of the zoo into docs/zoo.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zoo.case import CASES, Case

OUTCOMES = ("equal", "refused", "different", "failed")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"


@dataclass(frozen=True)
class Result:
    """outcome: one of OUTCOMES. detail: the message, or what is different."""

    case: Case
    outcome: str
    detail: str = ""


def write_report(results: list[Result]) -> None:
    """Replace these results' rows in the table of docs/zoo.md. Rows of cases that no longer exist are dropped."""
    page = PAGE.read_text(encoding="utf-8")
    rows = {
        f"{row[1]}/{row[3]}": row[0] for row in re.finditer(r"^\| (\S+) \| (\S+) \| (.+?) \|.*\|$", page, re.MULTILINE)
    }
    rows |= {result.case.name: _row(result) for result in results}
    found = [(name, rows[name]) for name in sorted(CASES, key=str.lower) if name in rows]
    packages = {CASES[name].package for name, _ in found}
    counts = [(outcome, sum(f"| {outcome}" in row for _, row in found)) for outcome in OUTCOMES]
    lines = [
        f"{len(found)} models and losses from {len(packages)} packages, with torch {version('torch')}: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts if count)
        + ".",
        "",
        "| package | version | model | what is special | result |",
        "|---|---|---|---|---|",
        *(row for _, row in found),
    ]
    text = "\n".join(lines)
    page = re.sub(
        r"(<!-- measured -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{text}\n\n{found[2]}",
        page,
        flags=re.DOTALL,
    )
    PAGE.write_text(page, encoding="utf-8")


def _row(result: Result) -> str:
    """Of a refusal the headline, of a traceback the error. A bar would end the cell."""
    case, lines = result.case, result.detail.strip().splitlines()
    detail = f": {lines[-1 if result.outcome == 'failed' else 0]}".replace("|", "\\|") if lines else ""
    return f"| {case.package} | {_version(case.package)} | {case.model} | {case.subject} | {result.outcome}{detail} |"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
