"""`gemma-tune models list|show|download`."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gemma_tune.cli.arguments import AsJson
from gemma_tune.terminal import Terminal, TerminalReporter
from gemma_tune.text import format_bytes, format_seconds

if TYPE_CHECKING:
    from gemma_tune.models.catalogue import GemmaModel

models_app = typer.Typer(help="The Gemma models that gemma-tune knows.", no_args_is_help=True)


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the known models."""
    from gemma_tune.models.catalogue import MODELS

    terminal = Terminal()
    if as_json:
        terminal.json(
            [
                {**asdict(model), "config": asdict(model.config), "num_params": model.num_params}
                for model in MODELS.values()
            ]
        )
        return
    columns = ("name", "parameters", "context", "kind", "licence", "hub id")
    terminal.table(columns, [_row(model) for model in MODELS.values()], right=(1, 2))


def _row(model: GemmaModel) -> tuple[str | None, ...]:
    kind = ("instruction" if model.is_instruction_tuned else "base") + (
        "" if model.modality == "text" else f", {model.modality}"
    )
    return (
        model.name,
        _millions(model.num_params),
        f"{model.config.context_tokens:,}",
        kind,
        model.licence,
        model.hub_id,
    )


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


@models_app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name, hub id, Keras preset, or a directory.")],
    modules: Annotated[
        bool, typer.Option("--modules", help="One row a module instead of one a decoder layer.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank for the count of trained parameters.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Show a model's facts and its layer table with parameter counts."""
    from gemma_tune.models.catalogue import LORA_PROJECTIONS, describe_config, describe_model
    from gemma_tune.models.describe import count_lora_params, count_weight_bytes, summarize
    from gemma_tune.models.fetch import fetch_config
    from gemma_tune.models.resolve import resolve_model

    terminal = Terminal()
    source = resolve_model(name)
    config = fetch_config(name)
    rows = summarize(config, by="module" if modules else "layer")
    lora = count_lora_params(config, rank=rank, targets=LORA_PROJECTIONS)
    sizes = {load: count_weight_bytes(config, load=load) for load in ("16bit", "4bit")}
    facts = (
        describe_model(source.model)
        if source.model
        else [("Directory" if source.path.is_dir() else "Id", source.location), *describe_config(config)]
    )
    if as_json:
        terminal.json(
            {"facts": dict(facts), "layers": [asdict(row) for row in rows], "lora_params": lora, "weight_bytes": sizes}
        )
        return
    terminal.table(("", ""), facts)
    table = [(row.name, row.kind, row.shape_text, f"{row.num_params:,}", row.connected_to) for row in rows]
    columns = ("layer", "kind", "output shape", "parameters", "connected to")
    terminal.table(columns, table, heading="", right=(3,))
    terminal.result(
        Text(
            f"\nLoRA rank {rank}: {lora:,} trained parameters · weights {sizes['16bit'] / 1e9:.2f} GB in 16 bits, "
            f"{sizes['4bit'] / 1e9:.2f} GB in 4 bits"
        )
    )


@models_app.command("download")
def download(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A name, a hub id owner/name, or a Kaggle handle owner/model/transformers/variation."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Hub commit, tag or branch; the newest by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a model before it is needed; an interrupted download goes on where it stopped."""
    from gemma_tune.disk import directory_bytes
    from gemma_tune.models.fetch import fetch_model

    terminal = Terminal()
    with TerminalReporter(terminal) as reporter:
        model = fetch_model(name, revision=revision, progress=_Progress(reporter).tell)
    num_bytes = directory_bytes(model.directory)
    settings = [f"model.name={model.name}"]
    settings += [f"model.revision={revision}"] if revision else []
    if as_json:
        terminal.json(
            {
                "name": model.name,
                "directory": str(model.directory),
                "revision": model.revision,
                "bytes": num_bytes,
                "settings": settings,
            }
        )
        return
    terminal.plain(f"{model.directory} · {format_bytes(num_bytes)} · gemma-tune train RECIPE {shlex.join(settings)}")


class _Progress:
    """Bytes, rate and time left of a download. The rate is that of the bytes that came since the start."""

    def __init__(self, reporter: TerminalReporter) -> None:
        self.reporter = reporter
        self.start: tuple[float, int] | None = None

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start = (now, done)
        seconds, num_bytes = now - self.start[0], done - self.start[1]
        what = "downloaded"
        if seconds > 1 and num_bytes > 0 and done < total:
            rate = num_bytes / seconds
            what = f"downloaded  {rate / 1e6:.1f} MB/s  ETA {format_seconds((total - done) / rate)}"
        self.reporter.progress_bytes(what, done, total)
