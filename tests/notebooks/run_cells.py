"""Runs cells of a notebook in IPython, as a kernel would: python run_cells.py NOTEBOOK FORMS CELL...

FORMS is JSON: what a user types into `#@param` fields. What `%pip` would install is printed instead. Ends with 1
at the first cell that raises or whose command fails.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell


def fill(source: str, forms: dict[str, object]) -> str:
    """The cell with the form's values in the place of its defaults."""

    def value(line: re.Match[str]) -> str:
        name = line[1]
        return f"{name} = {forms[name]!r} {line[3]}" if name in forms else line[0]

    return re.sub(r"^(\w+) = (.*?) (#@param.*)$", value, source, flags=re.MULTILINE)


def main() -> int:
    notebook = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    forms, wanted = json.loads(sys.argv[2]), sys.argv[3:]
    shell = InteractiveShell.instance()
    shell.register_magic_function(lambda line: print(f"pip {line}"), magic_name="pip")
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or (wanted and cell["id"] not in wanted):
            continue
        print(f"--- {cell['id']}", flush=True)
        shell.user_ns["_exit_code"] = 0
        result = shell.run_cell(fill("".join(cell["source"]), forms))
        if not result.success or shell.user_ns["_exit_code"] != 0:
            print(f"--- {cell['id']} failed", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
