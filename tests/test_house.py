"""The house holds: one direction of imports, no circle, no private name across modules, small
rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dcr"
ORDER = (
    "errors",
    "config",
    "data",
    "lm",
    "analysis",
    "train",
    "steering",
    "evaluate",
    "run",
    "study",
    "tables",
    "plots",
    "book",
    "cli",
)
MODULES = {
    ".".join(("dcr", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path, name: str) -> list[tuple[str, str]]:
    """(module, name) of every import of the package in a file, at any depth of its code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if a.name.split(".")[0] == "dcr"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dcr":
            found += [(node.module, a.name) for a in node.names]
    resolved = []
    for module, item in found:
        whole = f"{module}.{item}"
        resolved.append((whole, "") if whole in MODULES else (module, item))
    return resolved


def floor(module: str) -> int:
    parts = module.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 else -1


def test_nothing_stands_loose_in_the_package():
    loose = {p.stem for p in PACKAGE.glob("*.py")}
    assert loose <= {"__init__", "config", "errors", "cli"}


@pytest.mark.parametrize("name", [m for m in MODULES if m != "dcr"])
def test_imports_run_in_one_direction_and_take_no_private_name(name):
    for module, item in imports(MODULES[name], name):
        assert floor(module) <= floor(name), f"{name} imports {module}, which stands above it"
        assert not item.startswith("_") or item.endswith("__"), (
            f"{name} takes the private name {item} from {module}"
        )


def test_no_circle():
    edges = {
        n: {m for m, _ in imports(p, n) if m in MODULES and m != n} for n, p in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
