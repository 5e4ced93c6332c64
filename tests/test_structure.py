"""The rules of the house that a machine can hold: layers, names, sizes. Reads the source, imports none of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

from support.layers import INNER_LAYERS, LAYERS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "manyhands"
FILES = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

PURE = {"errors", "formatting", "options", "config", "shard_layout", "numerics"}
NOT_PURE = {"socket", "subprocess", "time", "threading", "multiprocessing"}
KNOW_TORCHS_LAUNCHER = {
    f"launching/{name}.py"
    for name in ("launcher", "remote_store", "rendezvous", "rendezvous_state", "supervision", "worker_files")
}
# What its rendezvous is made of, and how that fails.
STORES = tuple(
    f"torch.distributed.{name}"
    for name in ("PrefixStore", "Store", "TCPStore", "DistError", "DistNetworkError", "DistStoreError")
)

# Exceptions. A list may only shrink: an entry that is no longer needed fails, too.
MANY_PARAMETERS = {"training/loop.py:train"}  # over 8: each is one wish about a run
OVERRIDES = {f"launching/{name}.py:set_closed" for name in ("launcher", "rendezvous")}  # methods that torch asks for


def top(name: str) -> str:
    """The package, or the module at the top, that a file belongs to."""
    return name.split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file, for type checking only included, as `a.b.c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def calls(tree: ast.AST) -> Iterator[str]:
    """The last name of everything that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield last_name(node.func)


def last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def comparisons(tree: ast.AST) -> Iterator[tuple[list[ast.expr], list[ast.cmpop]]]:
    return (([node.left, *node.comparators], node.ops) for node in ast.walk(tree) if isinstance(node, ast.Compare))


def num_lines(name: str) -> int:
    return len(FILES[name].read_text(encoding="utf-8").splitlines())


def test_every_file_has_a_layer() -> None:
    assert {top(name) for name in FILES} - {"__init__"} == {package for layer in LAYERS.values() for package in layer}


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py"])
def test_imports_go_down_only(name: str) -> None:
    level = {package: index for index, layer in enumerate(LAYERS.values()) for package in layer}
    mine = top(name)
    for imported in imports(TREES[name]):
        if not is_module(imported, "manyhands") or imported == "manyhands.__version__":
            continue
        other = imported.split(".")[1]
        assert other in level, f"{name} imports {imported}: name the module that defines it"
        allowed = level[other] < level[mine] or other == mine
        assert allowed, f"{name} imports {imported}: {mine} may not know {other}"


@pytest.mark.parametrize("package", INNER_LAYERS)
def test_imports_inside_a_package_go_down_only(package: str) -> None:
    level = {part: index for index, layer in enumerate(INNER_LAYERS[package]) for part in layer}
    for name in FILES:
        if top(name) != package or name.endswith("__init__.py"):
            continue
        mine = name.split("/")[1].removesuffix(".py")
        for imported in imports(TREES[name]):
            if imported.startswith(f"manyhands.{package}."):
                other = imported.split(".")[2]
                assert level[other] < level[mine] or other == mine, f"{name} imports {imported}"


def test_files_import_each_other_in_no_cycle() -> None:
    modules = {"manyhands." + name.removesuffix(".py").replace("/", "."): name for name in FILES}
    graph = {
        name: {
            modules[part] for found in imports(tree) for part in (found, found.rpartition(".")[0]) if part in modules
        }
        for name, tree in TREES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def test_only_comm_knows_torch_distributed() -> None:
    for name, tree in TREES.items():
        uses = any(is_module(imported, "torch.distributed") for imported in imports(tree)) or any(
            isinstance(node, ast.Attribute) and node.attr == "distributed" for node in ast.walk(tree)
        )
        assert top(name) == "comm" or not uses or name in KNOW_TORCHS_LAUNCHER, name


@pytest.mark.parametrize("name", sorted(KNOW_TORCHS_LAUNCHER))
def test_launching_imports_only_torchs_launcher_of_torch_distributed(name: str) -> None:
    allowed = ("torch.distributed.elastic", "torch.distributed.launcher", *STORES)
    known = [imported for imported in imports(TREES[name]) if is_module(imported, "torch.distributed")]
    assert known
    assert all(any(is_module(imported, module) for module in allowed) for imported in known), known


def test_the_bottom_layer_is_pure() -> None:
    for name, tree in TREES.items():
        if top(name) in PURE:
            found = {imported.split(".")[0] for imported in imports(tree)} & NOT_PURE
            assert not found, f"{name} imports {found}"


def test_hooks_are_registered_in_one_file() -> None:
    found = {
        name for name, tree in TREES.items() for called in calls(tree) if re.fullmatch(r"register_\w*hook", called)
    }
    assert found == {"engine/step/hooks.py"}


def test_one_worker_is_not_a_special_case() -> None:
    for name, tree in TREES.items():
        for (left, right, *_), operators in comparisons(tree):
            asks = isinstance(operators[0], (ast.Eq, ast.NotEq, ast.Gt, ast.LtE))
            one = isinstance(right, ast.Constant) and right.value == 1
            found = asks and one and last_name(left) in {"size", "world_size"}
            assert top(name) == "comm" or not found, f"{name}:{left.lineno}: LocalGroup makes it the identity"


def test_no_code_compares_the_name_of_a_sharding() -> None:
    for name, tree in TREES.items():
        if name == "engine/sharding.py" or top(name) == "cli":
            continue
        for sides, _ in comparisons(tree):
            asked = [side.value if isinstance(side, ast.Attribute) and side.attr == "name" else side for side in sides]
            assert "sharding" not in map(last_name, asked), f"{name}: ask sharding.grad is SHARDED, say"
        named = {last_name(node) for node in ast.walk(tree)} | {part.rpartition(".")[2] for part in imports(tree)}
        assert not named & {"DDP", "ZERO1", "ZERO2", "ZERO3"}, name


def test_no_setters_prints_or_asserts() -> None:
    for name, tree in TREES.items():
        setters = {f"{name}:{function.name}" for function in functions(tree) if function.name.startswith("set_")}
        assert setters <= OVERRIDES
        prints = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
        assert not prints, f"{name} prints"
        asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not asserts, f"{name} asserts in lines {asserts}: raise InvariantError"


def test_files_are_short() -> None:
    lines = {name: num_lines(name) for name in FILES}
    assert {name: count for name, count in lines.items() if count > 500} == {}


def num_body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function behind its docstring; all of them if it has none."""
    first = function.lineno - 1
    if ast.get_docstring(function):
        first = function.body[0].end_lineno or 0
    return (function.end_lineno or 0) - first


def test_functions_are_short() -> None:
    found = {
        f"{name}:{function.name}"
        for name, tree in TREES.items()
        for function in functions(tree)
        if num_body_lines(function) > 60
    }
    assert found == set()


def test_functions_have_few_parameters() -> None:
    found = set()
    for name, tree in TREES.items():
        for function in functions(tree):
            given = chain(function.args.posonlyargs, function.args.args, function.args.kwonlyargs)
            if len([arg for arg in given if arg.arg not in ("self", "cls")]) > 8:
                found.add(f"{name}:{function.name}")
    assert found == MANY_PARAMETERS


def test_package_files_only_reexport_names() -> None:
    for name, tree in TREES.items():
        if not name.endswith("__init__.py"):
            continue
        for node in tree.body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_list = isinstance(node, ast.Assign) and not any(isinstance(part, ast.Call) for part in ast.walk(node))
            for_types = isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING"
            lazy = isinstance(node, ast.FunctionDef) and node.name == "__getattr__" and name == "__init__.py"
            allowed = is_text or is_list or for_types or lazy or isinstance(node, (ast.Import, ast.ImportFrom))
            assert allowed, f"{name}:{node.lineno} does something when it is imported"


def test_every_file_states_its_purpose() -> None:
    for name, tree in TREES.items():
        assert not tree.body or ast.get_docstring(tree), name


def test_every_error_is_in_the_troubleshooting_page() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for node in TREES["errors.py"].body:
        if isinstance(node, ast.ClassDef) and "NamedTuple" not in map(last_name, node.bases):
            assert f"`{node.name}`" in page, f"docs/troubleshooting.md doesn't say what to do about {node.name}"
