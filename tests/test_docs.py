"""The documents are true where a machine can tell: links, files, tests and messages that they name are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

import manyhands as mh
from manyhands.cli.main import app
from manyhands.options import declared
from support.annotated_tree import BLOCK, annotated_tree
from support.layers import DIAGRAM, layer_diagram
from zoo.case import CASES
from zoo.catalogue import load_cases

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "manyhands"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
USERS_MEET = {"ConfigError", "DataError", "NumericsError", "CheckpointError", "WorkerError", "Interrupted"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The places in a page that a link can name, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}"


def test_the_annotated_tree_is_the_source() -> None:
    tree = BLOCK.search(text_of("docs/design.md"))
    assert tree, "docs/design.md has no annotated tree"
    assert tree[0] == annotated_tree(), "run `make docs`"


def test_the_diagram_shows_the_layers() -> None:
    diagram = DIAGRAM.search(text_of("docs/design.md"))
    assert diagram, "docs/design.md has no diagram of the layers"
    assert diagram[0] == layer_diagram(), "run `make docs`"


def test_the_command_line_page_has_every_option() -> None:
    page = " ".join(text_of("docs/cli.md").split())
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## `manyhands {name}`" in page
        for param in command.params:
            help_text = " ".join(getattr(param, "help", "").split())
            assert help_text in page, f"{name} {param.name}: run `make docs`"
            assert all(option in page for option in param.opts if option.startswith("-")), f"{name} {param.name}"


def test_the_site_has_every_page_and_plain_lists() -> None:
    listed = re.findall(r"(\w[\w-]*\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    for page in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        run_on = re.findall(r"^(?![-*|#] |  )[^\n]+\n[-*] .*$", text, re.MULTILINE)
        assert not run_on, f"{page.name}: the site needs an empty line before the list"


def test_tests_that_documents_name_exist() -> None:
    for page in PAGES:
        for file, function in re.findall(r"\b(tests/\w+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8")):
            assert (ROOT / file).exists(), f"{page.name} names {file}"
            if function:
                assert re.search(rf"^def {function}\b", text_of(file), re.MULTILINE), f"{page.name}: {file}::{function}"


def test_the_zoo_page_has_every_case_and_none_differs() -> None:
    load_cases()
    rows = re.findall(
        r"^\| (\S+) \| \S+ \| (.+?) \| .* \| (equal|refused|different|failed)\b.*$", text_of("docs/zoo.md"), re.M
    )
    assert {f"{package}/{model}" for package, model, _ in rows} == set(CASES), "run `make zoo`"
    outcomes = [outcome for _, _, outcome in rows]
    assert set(outcomes) <= {"equal", "refused"}
    assert outcomes.count("refused") <= 0.15 * len(outcomes)


def template(node: ast.expr) -> str | None:
    """A message in the source, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def messages() -> tuple[set[str], set[str]]:
    """All texts in the source, and those that errors which users can meet begin with."""
    texts, raised = set(), set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.expr) and (text := template(node)) is not None:
                texts.add(text)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in USERS_MEET:
                said = template(node.args[0]) if node.args else None
                if said is not None and re.search(r"\w", said.replace("…", "")):
                    raised.add(said)
    return texts, raised


def test_troubleshooting_has_the_messages_that_users_meet() -> None:
    headings = re.findall(r"^### (.+)$", text_of("docs/troubleshooting.md"), re.MULTILINE)
    assert all(re.fullmatch(r"`[^`]+`", heading) for heading in headings)
    listed = {heading.strip("`") for heading in headings}
    texts, raised = messages()
    assert not listed - texts, "headings of messages that the source doesn't have (any more)"
    assert not raised - listed, "messages without a heading"


def test_contenders_of_benchmarks_have_shardings_transports_and_offloads_that_exist() -> None:
    known = {name for option in ("sharding", "transport", "offload") for name in declared(mh.Strategy)[option].choices}
    found = set()
    for path in (ROOT / "benchmarks").glob("*.py"):
        found |= set(re.findall(r'"manyhands-((?:ddp|zero)[a-z0-9-]*)"', path.read_text()))
    assert "zero2-distributed" in found
    assert {part for kind in found for part in kind.split("-")} - known == set()
