#!/usr/bin/env python3
"""Draw the rooms of the package and the imports between them into docs/architecture.md.

draw_rooms.py          write the picture anew
draw_rooms.py --check  exit with 1 where the picture is not what the imports say

A room is a folder of the package, or a module at its top. An arrow that follows from two others is left out: the
picture then shows the floors, and import-linter holds all of the arrows (pyproject.toml).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "layerkit"
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- rooms: made by scripts/draw_rooms.py -->", "<!-- rooms end -->"

Arrows = dict[str, set[str]]


def imported(module: ast.Module) -> Iterator[str]:
    """Yield the dotted names that a module imports when it runs, also inside of functions."""
    waiting: list[ast.AST] = [module]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def rooms() -> Arrows:
    """Return for each room the rooms that it imports."""
    arrows: Arrows = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        to = arrows.setdefault(room, set())
        for name in imported(ast.parse(path.read_text("utf-8"))):
            parts = name.split(".")
            if parts[0] == "layerkit" and len(parts) > 1 and parts[1] != room:
                to.add(parts[1])
    return {room: to & set(arrows) for room, to in arrows.items()}


def reduced(arrows: Arrows) -> Arrows:
    """Return the arrows that do not follow from others."""

    def reach(room: str) -> set[str]:
        return arrows[room].union(*(reach(other) for other in arrows[room]))

    return {room: to - set().union(*(reach(other) for other in to)) for room, to in arrows.items()}


def label(room: str) -> str:
    """Return the name of a room, and in a second line what it is: the first sentence of its docstring."""
    path = PACKAGE / room / "__init__.py"
    spine = not path.exists()
    text = ast.get_docstring(ast.parse((PACKAGE / f"{room}.py" if spine else path).read_text("utf-8"))) or ""
    first = text.split("\n\n")[0].replace("\n", " ").replace('"', "'").replace("`", "").rstrip(".")
    return f'{room}["<b>{room}{".py" if spine else "/"}</b><br/>{first}"]'


def picture() -> str:
    """Return the picture as mermaid text."""
    arrows = rooms()
    lines = ["```mermaid", "flowchart TD", *(f"  {label(room)}" for room in arrows)]
    lines += [f"  {room} --> {to}" for room, below in reduced(arrows).items() for to in sorted(below)]
    return "\n".join([*lines, "```"])


def main() -> int:
    """Write or check the page; return the exit code."""
    page = PAGE.read_text("utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    fresh = f"{head}{BEGIN}\n{picture()}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if page != fresh:
            print(f"{PAGE.relative_to(ROOT)}: the rooms have changed; run scripts/draw_rooms.py", file=sys.stderr)
        return int(page != fresh)
    PAGE.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
