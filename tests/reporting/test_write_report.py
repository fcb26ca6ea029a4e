"""The report of a run: what stands in it, what text of others does to it, and what a browser says."""

from __future__ import annotations

import base64
import hashlib
import http.server
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from gemma_tune.disk import write_json
from gemma_tune.errors import RunError
from gemma_tune.reporting.facts import differing_settings, gather_facts
from gemma_tune.reporting.write_report import write_report, write_reports
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import update_manifest
from gemma_tune.runs.metrics_log import append_metrics
from tests.reporting.conftest import MakeRun

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}</style></title>\n# h | [l](http://evil.example)"
)


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def written(run: RunDir) -> tuple[str, str]:
    write_report(run)
    return tuple((run.path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))  # type: ignore[return-value]


def test_a_run_is_told_whole(make_run: MakeRun) -> None:
    run = make_run()
    write_json(
        run.path / "plan.json",
        {
            "allocated_bytes": 2_000_000_000,
            "uncertainty_bytes": 100_000_000,
            "schedule": {"steps": 20, "seconds": 50.0},
        },
    )
    html, text = written(run)
    page = Page(html)
    for told in (
        "mine-001", "gemma-tiny · unsloth · NF4 · float32", "0.0 % → 75.0 %", "2.500 → 0.500", "Who bakes?", "No idea.",
        "rows.jsonl", "near duplicates", "a note", "a" * 64, "d" * 64, "2.0 GB ± 100 MB", "900 MB", "open_qa",
        "plain prose", "general text got less likely", "torch==2.13.0 peft==0.21.2", "training.epochs=2",
        f"gemma-tune train {run.path}/resolved.yaml run.name=mine-001-again", f"gemma-tune reproduce {run.path}",
    ):  # fmt: skip
        assert told in page.text
    for told in ("0.0 % → 75.0 %", "2.500 → 0.500", "near duplicates", "2.0 GB ± 100 MB", "general text got less"):
        assert told in text
    assert 'class="over"' in html and html.count("<polyline") == 5
    # The exact match of six of eight rows, with Wilson's interval.
    assert "75.0 %[40.9, 92.9]" in page.text.replace("\n", "")


def test_a_run_that_has_just_begun(make_run: MakeRun) -> None:
    run = make_run(evaluated=False)
    for path in (run.summary, run.data_report, run.lock, run.metrics):
        path.unlink()
    update_manifest(run, status="failed", step=3, error="ValueError: no")
    html, text = written(run)
    assert "the run is failed: ValueError: no" in Page(html).text
    assert "the run is failed: ValueError: no" in text
    assert "<svg" not in html


@pytest.mark.parametrize("several", [False, True])
def test_text_of_others_is_text(make_run: MakeRun, several: bool, tmp_path: Path) -> None:
    runs = [make_run("hostile", text=HOSTILE)] + ([make_run("other", text=HOSTILE + "2")] if several else [])
    write_reports(runs, html=tmp_path / "r.html", text=tmp_path / "r.md")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(html)
    names = [name for name, _ in page.tags]
    assert set(names).isdisjoint({"script", "img", "iframe", "link", "object", "a", "base", "form"})
    assert names.count("style") == 1
    assert not any(key.startswith("on") or key in ("style", "src", "href") for _, each in page.tags for key in each)
    assert page.text.count("<script>alert(1)</script>") >= 12 and "{{ 7*7 }}" in page.text
    tokens = MarkdownIt("commonmark").enable("table").parse((tmp_path / "r.md").read_text(encoding="utf-8"))
    kinds = {child.type for token in tokens for child in (token, *(token.children or ()))}
    assert not kinds & {"html_block", "html_inline", "link_open", "image"}


def test_the_page_takes_nothing_from_elsewhere(make_run: MakeRun) -> None:
    html, _ = written(make_run())
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=", html)
    policy = next(attributes for _, attributes in Page(html).tags if attributes.get("http-equiv"))["content"]
    style = html.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_runs_side_by_side(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("slow"), make_run("fast", evaluated=False, learning_rate=1e-3, packing=True, epochs=2.0)]
    write_reports(runs, html=tmp_path / "r.html", text=None)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(html)
    assert differing_settings([gather_facts(run) for run in runs]) == [
        ("training.epochs", ["1.0", "2.0"]),
        ("training.learning_rate", ["0.0002", "0.001"]),
        ("training.packing", ["false", "true"]),
    ]
    assert "2 runs side by side" in page.text and "training.packing" in page.text
    # Loss, eval loss, learning rate and gradient norm of each.
    assert {name for _, each in page.tags for name in (each.get("class") or "").split()} >= {"c0", "c1"}
    assert html.count("<polyline") == 8
    assert not (tmp_path / "r.md").exists()
    same = [gather_facts(run) for run in (runs[0], runs[0])]
    assert differing_settings(same) == []


def test_what_a_reader_has_to_know(make_run: MakeRun) -> None:
    run = make_run()
    found = gather_facts(run).warnings
    assert found[0].startswith("general text got less likely: loss +0.250")
    assert "2 rows could not be used" in found and "3 rows left out: near duplicates" in found and found[-1] == "a note"
    append_metrics(run, {"step": 20, "eval_loss": 1.4})
    append_metrics(run, {"step": 20, "loss": float("nan")})
    found = gather_facts(run).warnings
    assert "the eval loss rose again: 0.900 at step 10, 1.400 at the end" in found
    assert "1 logged steps have no finite loss" in found


def test_no_plan_no_comparison(make_run: MakeRun) -> None:
    html, text = written(make_run())
    assert "Planned and measured" not in html and "Planned and measured" not in text


def test_a_place_that_cannot_be_written(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    for html, text in ((tmp_path / "no" / "r.html", None), (None, tmp_path / "no" / "r.md")):
        with pytest.raises(RunError, match=r"cannot write .*no.r\.(html|md)"):
            write_reports([run], html=html, text=text)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_it_and_asks_nobody(make_run: MakeRun, tmp_path: Path) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        text = f"<script src={address}/s></script><img src={address}/i><style>@import '{address}/c'</style>"
        run = make_run(text=text)
        write_report(run)
        done = subprocess.run(
            [
                str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}",
                "--enable-logging=stderr", "--dump-dom", (run.path / "report.html").as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        server.shutdown()
    assert "CONSOLE" not in done.stderr
    assert asked == []
    assert Page(done.stdout).text.count(f"<script src={address}/s></script>") >= 12
    assert "<script" not in done.stdout and "</footer>" in done.stdout
