"""Write the rooms and files into docs/architecture.md, from the architecture test and the modules' docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
_MARK = r"<!-- {} -->\n.*?<!-- end of {} -->"


def file_tree(root: Path = ROOT) -> str:
    """Return a line for each module of the package: its name, and the first sentence of its docstring."""
    lines = []
    for path in sorted((root / "gemma_tune").rglob("*.py"), key=lambda each: (each.parent.parts, each.name)):
        name = path.relative_to(root).as_posix()
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(text.partition("\n\n")[0].split())
        first = re.split(r"(?<=[.:])\s", first)[0].rstrip(".:")
        if path.name != "__init__.py":
            lines.append(f"{name:<52}{first}{' (LEAF)' if 'LEAF' in text and 'LEAF' not in first else ''}")
    return "```\n" + "\n".join(lines) + "\n```"


def room_table(rows: tuple[frozenset[str], ...]) -> str:
    """Return the rows of the house, the lowest first."""
    return "```\n" + "\n".join("  ".join(sorted(row)) for row in rows) + "\n```"


def with_block(text: str, name: str, block: str) -> str:
    """Replace what stands between the marks of a block."""
    pattern = re.compile(_MARK.format(name, name), re.DOTALL)
    return pattern.sub(lambda _: f"<!-- {name} -->\n{block}\n<!-- end of {name} -->", text)


def house_rows(root: Path = ROOT) -> tuple[frozenset[str], ...]:
    """Read ROWS from the architecture test, which is where the order is declared."""
    tree = ast.parse((root / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    value = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "ROWS" for to in node.targets)
    )
    return tuple(frozenset(row) for row in ast.literal_eval(value))


def updated(text: str) -> str:
    """Return the document with both blocks as they should be."""
    return with_block(with_block(text, "rooms", room_table(house_rows())), "tree", file_tree())


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
