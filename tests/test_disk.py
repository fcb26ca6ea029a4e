"""An output bears its name only when it is complete, whatever happens before."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from gemma_tune.disk import (
    GENERATED,
    finished_files,
    keep_file,
    locked,
    output_directory,
    output_file,
    read_json,
    refuse_existing,
    replaced_directory,
    require_free_disk,
    write_generated,
    write_json,
)
from gemma_tune.errors import ExportError, RunError
from gemma_tune.runs.index import hold_run, is_held
from gemma_tune.runs.layout import RunDir

REPOSITORY = Path(__file__).resolve().parents[1]
Opener = Callable[[Path], AbstractContextManager[Path]]
BOTH = pytest.mark.parametrize("open_output", [output_directory, output_file])


def fill(partial: Path) -> None:
    """Something inside a partial directory, or the partial file itself."""
    (partial / "below" if partial.is_dir() else partial).write_text("whole", encoding="utf-8")


def content(output: Path) -> str:
    return (output / "below" if output.is_dir() else output).read_text(encoding="utf-8")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "made" / "for it" / "output"


@BOTH
def test_the_name_appears_with_the_end(open_output: Opener, output: Path) -> None:
    with open_output(output) as partial:
        fill(partial)
        assert not output.exists() and partial.is_relative_to(output.parent)
    assert content(output) == "whole" and names(output.parent) == ["output"]


def test_an_empty_directory_is_no_output(output: Path) -> None:
    output.mkdir(parents=True)
    with output_directory(output) as partial:
        fill(partial)
    assert names(output) == ["below"]


@BOTH
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("inside")])
def test_an_error_leaves_nothing(failure: BaseException, open_output: Opener, output: Path) -> None:
    with pytest.raises(type(failure)), open_output(output) as partial:
        fill(partial)
        raise failure
    assert names(output.parent) == []


@BOTH
def test_a_full_disk_is_told_in_a_sentence(open_output: Opener, output: Path) -> None:
    told = r"cannot write .*output: No space left on device \(.*below\)"
    with pytest.raises(ExportError, match=told), open_output(output) as partial:
        fill(partial)
        raise OSError(errno.ENOSPC, "No space left on device", str(partial / "below"))
    assert names(output.parent) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_file_that_the_system_refuses_to_lengthen(output: Path) -> None:
    """A real failed write, in a process whose files may have 4,096 bytes."""
    program = """
import resource, signal, sys
from pathlib import Path
from gemma_tune.errors import ExportError, RunError
from gemma_tune.runs.index import hold_run, is_held
from gemma_tune.runs.layout import RunDir
from gemma_tune.disk import output_directory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with output_directory(Path(sys.argv[1])) as partial:
        (partial / "small").write_bytes(bytes(4096))
        (partial / "large").write_bytes(bytes(10_000))
except ExportError as error:
    print(error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(output)], capture_output=True, text=True, encoding="utf-8", check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout.startswith(f"cannot write {output}: File too large")
    assert names(output.parent) == []


@BOTH
def test_a_read_only_directory(open_output: Opener, read_only_directory: Path) -> None:
    before = names(read_only_directory)
    with pytest.raises(ExportError, match=r"cannot write .*output"), open_output(read_only_directory / "output"):
        pytest.fail("the block ran")
    assert names(read_only_directory) == before


@BOTH
@pytest.mark.parametrize("kind", ["file", "full directory", "dangling link"])
def test_what_exists_is_kept(kind: str, open_output: Opener, output: Path) -> None:
    output.parent.mkdir(parents=True)
    if kind == "file":
        output.write_text("mine", encoding="utf-8")
    elif kind == "dangling link":
        output.symlink_to(output.parent / "nowhere")
    else:
        output.mkdir()
        (output / "below").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match=r"output exists"), open_output(output):
        pytest.fail("the block ran")
    with pytest.raises(ExportError, match=r"output exists"):
        refuse_existing(output)
    assert kind == "dangling link" or content(output) == "mine"
    assert names(output.parent) == ["output"]


@BOTH
def test_what_appears_in_the_meantime_is_kept(open_output: Opener, output: Path) -> None:
    with pytest.raises(ExportError, match=r"output exists"), open_output(output) as partial:
        fill(partial)
        output.write_text("mine", encoding="utf-8")
    assert content(output) == "mine" and names(output.parent) == ["output"]


@BOTH
def test_two_writers(open_output: Opener, output: Path) -> None:
    with open_output(output) as partial:
        with pytest.raises(ExportError, match="another process is writing"), open_output(output):
            pytest.fail("the second block ran")
        fill(partial)
    assert content(output) == "whole" and names(output.parent) == ["output"]


# --- killed in the middle ------------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_tune.disk import keep_file, output_directory, output_file
output, kind, fingerprint = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
if kind == "file":
    with output_file(output) as partial:
        partial.write_text("half", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)
with output_directory(output, fingerprint=fingerprint) as partial:
    (partial / "first").write_text("first", encoding="utf-8")
    if fingerprint:
        keep_file(partial, "first")
    (partial / "second").write_text("half", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_in_the_middle(output: Path, kind: str, fingerprint: str = "") -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(output), kind, fingerprint],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert not output.exists() and names(output.parent) == [".output.partial"]


@BOTH
def test_leftovers_of_a_killed_process_are_tidied(open_output: Opener, output: Path) -> None:
    kill_in_the_middle(output, "file" if open_output is output_file else "directory", "any")
    with open_output(output) as partial:
        assert names(partial) == [".made-by-gemma-tune"] if partial.is_dir() else not partial.read_bytes()
        fill(partial)
    assert content(output) == "whole" and names(output.parent) == ["output"]


def test_finished_files_are_kept_for_the_same_fingerprint(output: Path) -> None:
    kill_in_the_middle(output, "directory", "a")
    with output_directory(output, fingerprint="a") as partial:
        assert finished_files(partial) == {"first"}
        assert (partial / "first").read_text(encoding="utf-8") == "first" and not (partial / "second").exists()
        (partial / "second").write_text("second", encoding="utf-8")
        keep_file(partial, "second")
        assert finished_files(partial) == {"first", "second"}
    assert names(output) == ["first", "second"]


@pytest.mark.parametrize("change", ["fingerprint", "touched", "longer", "removed", "record"])
def test_changed_leftovers_are_not_used(change: str, output: Path) -> None:
    kill_in_the_middle(output, "directory", "a")
    left = output.parent / ".output.partial" / "first"
    if change == "touched":
        left.write_text("FIRST", encoding="utf-8")
    elif change == "longer":
        stamp = left.stat().st_mtime_ns
        left.write_text("first and more", encoding="utf-8")
        os.utime(left, ns=(stamp, stamp))
    elif change == "removed":
        left.unlink()
    elif change == "record":
        left.with_name(".finished.json").write_text('{"fingerp', encoding="utf-8")
    with output_directory(output, fingerprint="b" if change == "fingerprint" else "a") as partial:
        assert finished_files(partial) == set() and not (partial / "first").exists()
    assert names(output) == []


# --- free disk -----------------------------------------------------------------------------------------------------


def test_free_disk(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 500_000_000))  # type: ignore[attr-defined]
    require_free_disk(output, 400_000_000, what="it")
    with pytest.raises(ExportError, match=r"output: it needs 499\.0 MB, 500\.0 MB are free"):
        require_free_disk(output, 499_000_000, what="it")  # 64 MiB are kept free
    assert not output.parent.exists()


def test_leftovers_count_as_free(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gone on with or removed. Lengths do not count: a file may be longer than what was written of it."""
    partial = output.parent / ".output.partial"
    partial.mkdir(parents=True)
    (partial / "written").write_bytes(b"x" * 40_000_000)
    with (partial / "holes").open("wb") as file:
        file.truncate(10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 100_000_000))  # type: ignore[attr-defined]
    require_free_disk(output, 70_000_000, what="it")
    with pytest.raises(ExportError, match=r"14\d\.\d MB are free"):
        require_free_disk(output, 90_000_000, what="it")


def test_the_record_is_json_that_says_what_is_finished(output: Path) -> None:
    with output_directory(output, fingerprint="a") as partial:
        (partial / "first").write_bytes(b"12345")
        keep_file(partial, "first")
        record = json.loads((partial / ".finished.json").read_text(encoding="utf-8"))
    assert record["fingerprint"] == "a" and record["files"]["first"][0] == 5


# --- directories that replace another -------------------------------------------------------------------------------


def test_a_replaced_directory_is_on_the_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: the files, the directory that holds them, and, once it has its name, the one above."""
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(f"{path.relative_to(tmp_path)} {(tmp_path / 'made').exists()}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with replaced_directory(tmp_path / "made", explain=lambda cause: cause) as partial:
        (partial / "below").write_text("whole", encoding="utf-8")
    assert synced == [".made.partial/below False", ".made.partial False", ". True"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("inside"), OSError(errno.ENOSPC, "full")])
def test_what_was_there_stays_until_the_new_one_is_whole(failure: BaseException, tmp_path: Path) -> None:
    def explain(cause: Exception) -> Exception:
        return RunError("no space") if isinstance(cause, OSError) else cause

    def write(text: str, then: BaseException | None = None) -> None:
        with replaced_directory(tmp_path / "made", explain=explain) as partial:
            assert not any(partial.iterdir())
            (partial / "below").write_text(text, encoding="utf-8")
            if then:
                raise then

    write("old")
    with pytest.raises(RunError if isinstance(failure, OSError) else type(failure)):
        write("half", failure)
    assert content(tmp_path / "made") == "old" and names(tmp_path) == ["made"]
    write("new")
    assert content(tmp_path / "made") == "new" and names(tmp_path) == ["made"]


# --- text and JSON --------------------------------------------------------------------------------------------------


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no lock\.json"):
        read_json(tmp_path / "lock.json")
    (tmp_path / "lock.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"lock\.json is damaged"):
        read_json(tmp_path / "lock.json")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path) == {"x": 1}
    with pytest.raises(RunError, match="cannot write"):
        write_json(tmp_path / "missing" / "a.json", {})


@pytest.mark.parametrize("kind", ["text", "link", "folder", "device"])
def test_a_page_replaces_only_a_page_of_ours(kind: str, tmp_path: Path) -> None:
    page, users = tmp_path / "page.html", tmp_path / "users"
    users.write_text("mine", encoding="utf-8")
    {"text": lambda: page.write_text("mine", encoding="utf-8"), "link": lambda: page.symlink_to(users),
     "folder": page.mkdir, "device": lambda: page.symlink_to("/dev/null")}[kind]()  # fmt: skip
    before = page.lstat()
    with pytest.raises(RunError, match="is not a page that gemma-tune wrote"):
        write_generated(page, GENERATED)
    assert page.lstat() == before and users.read_text(encoding="utf-8") == "mine"
    assert names(tmp_path) == ["page.html", "users"]


def test_a_page_of_ours_is_written_again_through_a_link(tmp_path: Path) -> None:
    link, page = tmp_path / "latest.html", tmp_path / "page.html"
    link.symlink_to(page)
    for number in (1, 2):
        write_generated(link, f"{GENERATED} {number} \ud83d")
    assert link.is_symlink() and page.read_text(encoding="utf-8") == f"{GENERATED} 2 \\ud83d"


def test_two_look_at_a_lock_and_a_third_takes_it(tmp_path: Path) -> None:
    """Who looks holds a shared lock for a moment, which must neither be taken for a holder nor refuse one."""
    with locked(tmp_path, shared=True) as first, locked(tmp_path, shared=True) as second:
        assert first and second
        with locked(tmp_path) as third:
            assert not third
    looking = threading.Thread(target=lambda: [None for _ in range(20) if is_held(RunDir(tmp_path))])
    looking.start()
    for _ in range(20):
        with hold_run(RunDir(tmp_path)):
            assert is_held(RunDir(tmp_path))
    looking.join()
