"""A file of answers, a JSON object a line in the order of the questions, which resumes after a kill.

Until it is complete it lies next to its name as `NAME.partial`, with the settings that made it in `NAME.partial.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from gemma_tune.disk import cannot_write, locked, read_json_object, sync_directory, to_json_lines, write_json
from gemma_tune.errors import DataError


class AnswerFile:
    """Takes answers window by window; a window counts once all of its lines are on the disk.

    Windows, not lines, are the unit: an answer depends to the last bit on the prompts of its batch, and on the draws
    before it, so a window is made again as a whole and the file is the one that an undisturbed process writes.
    """

    def __init__(self, path: Path, *, settings: Mapping[str, Any], window: int) -> None:
        """Open, or find what a killed process left.

        Raises:
            DataError: the file exists, or the left answers were made with other settings.
        """
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._settings_file = path.with_name(path.name + ".partial.json")
        if path.exists():
            raise DataError(f"{path} exists already, and is never overwritten", hint="remove it, or give another name")
        if not path.parent.is_dir():
            raise DataError(f"there is no directory {path.parent}", hint="make it, or give another name")
        was_there = self._partial.exists()
        try:
            with ExitStack() as stack:
                self._file = stack.enter_context(self._partial.open("a", encoding="utf-8", newline="\n"))
                if not stack.enter_context(locked(self._partial)):
                    raise DataError(f"another process is writing {path}", hint="wait for it, or give another name")
                self._require_same(json.loads(json.dumps(settings)))
                self.num_found = self._keep_whole_windows(window)
                self._held = stack.pop_all()
        except OSError as error:
            raise cannot_write(path, error, error=DataError) from None
        except DataError:
            if not was_there:
                self._partial.unlink()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._held:
            self._file.flush()
            if error is None:
                if self.path.exists():
                    raise DataError(f"{self.path} was made by another in the meantime", hint=f"see {self._partial}")
                self._partial.rename(self.path)
                sync_directory(self.path.parent)
            elif self._partial.stat().st_size:
                return
            self._partial.unlink(missing_ok=True)
            self._settings_file.unlink()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a window of answers; it is on the disk when this returns."""
        self._file.write(to_json_lines(rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _require_same(self, settings: dict[str, Any]) -> None:
        """Record the settings; or compare them, where answers or settings are there."""
        has_answers, has_settings = self._partial.stat().st_size > 0, self._settings_file.exists()
        before = read_json_object(self._settings_file, error=DataError) if has_settings else {}
        if not has_answers and before.keys() != settings.keys() and has_settings:
            raise DataError(f"{self._settings_file} is in the way", hint="move it away, or give another name")
        changed = [name for name in settings if before.get(name) != settings[name]]
        if has_answers and changed:
            changes = "; ".join(f"{name}: {before.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise DataError(
                f"{self._partial} holds answers that were made with other settings ({changes})",
                hint="resume with the same settings, or remove that file to begin again",
            )
        if not has_answers:
            write_json(self._settings_file, settings)

    def _keep_whole_windows(self, window: int) -> int:
        """Cut what is left to whole windows; the number of answers that stay."""
        lines = self._partial.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = len(whole) - len(whole) % window
        with self._partial.open("rb+") as file:
            file.truncate(sum(map(len, whole[:kept])))
        return kept
