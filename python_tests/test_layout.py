"""The rooms of the package and the order in which they may import each other (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import quicksilver_ext

PACKAGE = Path(quicksilver_ext.__file__).parent
# Each may import those before it. Modules of the package's own folder are rooms too.
ORDER = [
    *("_C", "config", "stats", "profiling"),
    *("kernels", "weights", "architectures", "mechanisms", "engine", "generation", "model", "calibration", "bench"),
    *("cli", "__main__"),
]
DOORS = {"__init__", "ops", "quantize", "testing"}  # they only hand on what stands elsewhere


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """What a module imports of the package, wherever in it, but for annotations."""
    path = SOURCES[name]
    parents = path.relative_to(PACKAGE).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in SOURCES or not base else ".".join(base)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(each.split(".")[0] == "quicksilver_ext" for each in names), (
                f"{name}: wants a relative import"
            )


def test_rooms_import_only_what_stands_before_them() -> None:
    wrong = []
    for name in SOURCES:
        room = name.split(".")[0]
        if room in DOORS:
            continue
        for imported in imports(name):
            other = imported.split(".")[0]
            if other not in ("__version__", room) and ORDER.index(other) > ORDER.index(room):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    """Not within a room either, nor hidden in functions."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done and name in SOURCES:
            for imported in imports(name):
                if imported != name:
                    visit(imported, (*path, name))
            done.add(name)

    for name in SOURCES:
        visit(name, ())


def test_every_room_is_in_the_order() -> None:
    assert {name.split(".")[0] for name in SOURCES} - DOORS == set(ORDER) - {"_C"}
