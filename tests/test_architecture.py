"""The house rules that a reader relies on and that no single module can keep."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.exporting.formats.registry import FORMATS
from gemma_tune.models.families.known import FAMILIES
from gemma_tune.recipe.methods import METHODS
from scripts import tree

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gemma_tune"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package imports itself and what stands in an earlier row; the packages of one row do not know each other. A file of
# facts may stand below the rest of its package (`package.file`), for those who need the facts alone.
ROWS = (
    {"errors", "paths", "text", "templates"},
    {"members"},
    {"identity", "secrets", "yaml_io"},
    {"disk"},
    {"machine"},
    {"models", "engines.engine_facts"},
    {"recipe"},
    {"runs"},
    {"data", "engines"},
    {"planning"},
    {"training", "inference"},
    {"reporting"},
    {"exporting"},
    {"evaluation", "launching", "doctor"},
    {"flows"},
    {"terminal"},
    {"api"},
    {"cli"},
)
ROW_OF = {package: number for number, packages in enumerate(ROWS) for package in packages}
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "datasets", "accelerate", "bitsandbytes"}


@dataclass(frozen=True)
class Import:
    """One imported module. `at_top`: it runs when the importing file is imported."""

    module: str
    line: int
    at_top: bool


def _imports(tree: ast.Module) -> list[Import]:
    return list(_walk(tree, at_top=True))


def _walk(node: ast.AST, *, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative imports hide the direction; write the full name"
            yield Import(child.module or "", child.lineno, at_top)
            # `from gemma_tune.data import sources` imports the module gemma_tune.data.sources.
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, at_top) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, at_top=False)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in child.body:
                yield from _walk(ast.Module([statement], []), at_top=False)
            for statement in child.orelse:
                yield from _walk(ast.Module([statement], []), at_top=at_top)
        else:
            yield from _walk(child, at_top=at_top)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package(module: str) -> str | None:
    """The part of the house that a module belongs to; None outside of it and for the empty root."""
    parts = module.split(".")
    if (own_row := ".".join(parts[1:3])) in ROW_OF:
        return own_row
    return parts[1] if parts[0] == "gemma_tune" and len(parts) > 1 else None


IMPORTS = {_module(path): _imports(_parse(path)) for path in FILES}
LEAFS = {_module(path) for path in FILES if "LEAF" in (ast.get_docstring(_parse(path)) or "")}


def test_import_walk_tells_top_from_lazy() -> None:
    source = """
import a
from b.c import d
if TYPE_CHECKING:
    import e
else:
    import f
try:
    import g
except ImportError:
    pass
def function():
    import h
class Class:
    import i
"""
    found = {(item.module, item.at_top) for item in _imports(ast.parse(source))}
    assert found == {
        ("a", True), ("b.c", True), ("b.c.d", True), ("e", False), ("f", True), ("g", True), ("h", False), ("i", True),
    }  # fmt: skip


def test_every_package_has_a_row() -> None:
    unknown = {_package(module) for module in IMPORTS} - set(ROW_OF) - {None}
    assert not unknown, f"give these a row in ROWS and in the design: {unknown}"


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_imports_point_to_the_left(module: str) -> None:
    package = _package(module)
    wrong = [
        f"line {item.line}: {item.module}"
        for item in IMPORTS[module]
        if (other := _package(item.module)) in ROW_OF
        and other != package
        and (package is None or ROW_OF[other] >= ROW_OF[package])
    ]
    assert not wrong, f"{module} may not import {wrong}"


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_only_leafs_are_heavy_at_the_top(module: str) -> None:
    heavy = [
        f"line {item.line}: {item.module}"
        for item in IMPORTS[module]
        if item.at_top and (item.module.split(".")[0] in HEAVY or item.module in LEAFS)
    ]
    if module in LEAFS:
        assert heavy, f"{module} says LEAF in its docstring and imports nothing heavy"
    else:
        assert not heavy, f"{module} is not marked LEAF: import these inside the function that needs them: {heavy}"


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len(named) - (named[:1] != [] and named[0].arg in ("self", "cls"))


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_files_and_signatures_are_short(path: Path) -> None:
    """A command's options are its parameters: `cli` is left out of the second rule."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    if _package(_module(path)) != "cli":
        nodes = (node for node in ast.walk(_parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        assert not [node.name for node in nodes if _parameters(node) > 8]


def test_names_occur_once() -> None:
    files = Counter(path.name for path in FILES if path.name != "__init__.py" and _package(_module(path)) != "cli")
    classes = Counter(node.name for path in FILES for node in ast.walk(_parse(path)) if isinstance(node, ast.ClassDef))
    assert [name for name, count in (files + classes).items() if count > 1] == []


def _compared_words(tree: ast.Module) -> Iterator[str]:
    """Yield the texts that something is compared with, alone or in a tuple, list or set."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                for part in (side, *getattr(side, "elts", ())):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def test_only_a_member_knows_its_name() -> None:
    """Other rooms ask a member's facts. `adapter` and `gemma` are words for other things as well."""
    names = {*ENGINES, *METHODS, *FORMATS, *FAMILIES, "gguf"} - {"adapter", "gemma"}
    homes = ("engines.", "training.methods.", "exporting.formats.", "models.families.", "models.hub.kaggle")
    elsewhere = [path for path in FILES if not _module(path).removeprefix("gemma_tune.").startswith(homes)]
    found = {_module(path): known for path in elsewhere if (known := names.intersection(_compared_words(_parse(path))))}
    assert not found


@pytest.mark.parametrize(
    ("library", "owner"), [("unsloth", "gemma_tune.engines.unsloth"), ("trl", "gemma_tune.training.loop")]
)
def test_one_file_knows_the_library(library: str, owner: str) -> None:
    users = {module for module, items in IMPORTS.items() if any(item.module.split(".")[0] == library for item in items)}
    assert users == {owner}


def test_only_the_console_prints() -> None:
    printing = []
    for path in FILES:
        tree = _parse(path)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
        if calls and not _module(path).startswith(("gemma_tune.terminal", "tools.tiny.")):
            printing.append(f"{_module(path)} line {calls[0].lineno}")
    assert not printing


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=_module)
def test_init_files_are_empty(path: Path) -> None:
    if path.parent == PACKAGE:
        return  # its names are imported lazily: tests/test_api.py
    body = _parse(path).body
    docstring_only = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    assert not body or docstring_only


def test_every_folder_is_a_package() -> None:
    missing = {path.parent for path in FILES} - {path.parent for path in FILES if path.name == "__init__.py"}
    assert not missing


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["validate", "recipes/gemma-7b-dolly.yaml"],
        ["recipes", "list"],
        ["models", "show", "gemma-7b"],
        ["launch", "quickstart", "--on", "slurm"],
    ],
    ids=" ".join,
)
def test_start_up_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import json, sys\n"
        "from gemma_tune.cli.app import main\n"
        f"sys.argv = ['gemma-tune', *{arguments!r}]\n"
        "code = None\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "print('\\n' + json.dumps({'code': code, 'modules': sorted({name.split('.')[0] for name in sys.modules})}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] in (0, None), done.stdout + done.stderr
    assert "gemma_tune" in told["modules"]
    slow = HEAVY | {
        "matplotlib",
        "pandas",
        "pyarrow",
        "huggingface_hub",
        "numpy",
        "scipy",
        "ftfy",
        "phonenumbers",
        "stdnum",
        "py3langid",
    }
    if arguments == ["--help"]:
        slow |= {"pydantic", "ruamel"}
    assert not slow & set(told["modules"])


def test_document_lists_every_room_and_file() -> None:
    text = tree.DOCUMENT.read_text(encoding="utf-8")
    assert text == tree.updated(text), "run: make tree"
