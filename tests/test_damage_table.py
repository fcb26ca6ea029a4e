"""Every command × every damage of what it reads: one verdict each, whichever command meets the damage first.

A damaged file ends a command with exit code 2 and a sentence that names it, without a traceback; a command that needs
nothing of the damaged file works. A copy of one finished run is damaged once, and every command is tried on it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.cli.app import main
from gemma_tune.paths import TINY_MODEL_DIR

RECIPE = """
model: {name: base, engine: transformers, load_in_4bit: false, dtype: float32}
data: {source: rows.jsonl, template: turns.yaml, max_seq_tokens: 128, eval_fraction: 0.2}
lora: {rank: 4, alpha: 8}
training:
  {max_steps: 2, batch_size: 4, learning_rate: 0.01, warmup_fraction: 0, gradient_checkpointing: "off",
   save_every_steps: 1}
evaluation: {exact_match: false, num_questions: 0}
run: {name: r}
"""
TEMPLATE = """
name: turns
kind: chat
question: prompt
messages: [{role: user, content: "{{ prompt }}"}, {role: assistant, content: "{{ completion }}"}]
"""
ASK = ("--max-new-tokens", "2")
# What is run, by the name under which the tables below list it. {n} is a name that no command before it has used.
COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "runs/r", "-p", "Question 3?", *ASK),
    "generate adapter": ("generate", "bare", "-p", "Question 3?", *ASK),
    "generate checkpoint": ("generate", "runs/r/checkpoints/checkpoint-2", "--template", "chat", "-p", "Q?", *ASK),
    "chat": ("chat", "runs/r", *ASK),
    "chat adapter": ("chat", "bare", *ASK),
    "score": ("score", "runs/r", "-p", "Question 3?", "-r", " Answer"),
    "score adapter": ("score", "bare", "-p", "Question 3?", "-r", " Answer"),
    "evaluate": ("evaluate", "runs/r", "--rows", "1", "--again", "--what", "tuned", *ASK),
    "compare": ("compare", "runs/r", "bare", "-f", "prompts.jsonl", "-o", "out/{n}", *ASK),
    "merge": ("merge", "runs/r", "--skip-verify", "-o", "out/{n}"),
    "merge adapter": ("merge", "bare", "--skip-verify", "-o", "out/{n}"),
    "merge --base": ("merge", "bare", "--base", "base", "--skip-verify", "-o", "out/{n}"),
    "export adapter": ("export", "runs/r", "-f", "adapter", "--skip-verify", "-o", "out/{n}"),
    "export gguf": ("export", "bare", "-f", "gguf-f16", "--skip-verify", "-o", "out/{n}"),
    "export nf4": ("export", "runs/r", "-f", "merged-4bit", "--skip-verify", "-o", "out/{n}"),
    "resume": ("train", "r.yaml", "--resume", "training.max_steps=3"),
    "warm start": ("train", "r.yaml", "run.name={n}", "model.adapter=runs/r", "training.max_steps=1"),
    "warm start adapter": ("train", "r.yaml", "run.name={n}", "model.adapter=bare", "training.max_steps=1"),
    "validate warm start": ("validate", "r.yaml", "model.adapter=bare"),
    "plan": ("plan", "r.yaml", "model.adapter=bare", "--gpu", "t4"),
    "reproduce": ("reproduce", "runs/r", "--check"),
    "report": ("report", "runs/r"),
    "export again": ("export", "runs/r", "-f", "merged-16bit,gguf-f16", "--skip-verify"),
    "verify": ("verify", "runs/r/export/merged-16bit", "--positions", "8"),
    "generate merged": ("generate", "runs/r/export/merged-16bit", "-p", "Question 3?", *ASK),
    "score merged": ("score", "runs/r/export/merged-16bit", "-p", "Question 3?", "-r", " Answer"),
    "train on merged": ("validate", "r.yaml", "model.name=runs/r/export/merged-16bit"),
    "generate gguf": ("generate", "runs/r/export/gguf-f16", "-p", "Question 3?", *ASK),
    "push merged": ("push", "runs/r/export/merged-16bit", "owner/name"),
    "push gguf": ("push", "runs/r/export/gguf-f16", "owner/name"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, a recipe, its finished run, two exports of it, and a copy of the adapter."""
    folder = tmp_path_factory.mktemp("trained") / "here"
    shutil.copytree(TINY_MODEL_DIR, folder / "base")
    for path in (folder / "base").iterdir():  # long ago, so that their hashes are kept
        path.chmod(0o644)
    rows = [{"prompt": f"Question {i}?", "completion": f" Answer {i * 7} and no more."} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "Question 3?", "rules": {"contains": ["a"]}}\n', encoding="utf-8")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "turns.yaml").write_text(TEMPLATE, encoding="utf-8")
    before, threads = Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        for command in (("train", "r.yaml"), COMMANDS["export again"]):
            code, told = call(*command)
            assert code == 0, told
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    shutil.copytree(folder / "runs/r/adapter", folder / "bare")
    return folder.rename(folder.parent / "moved")  # so that no equal base lies where the training was


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own, whose files share their bytes until they are replaced."""
    place = tmp_path / "copy"
    shutil.copytree(whole, place, copy_function=os.link)
    monkeypatch.chdir(place)
    return place


def call(*arguments: str) -> tuple[int, str]:
    """Run a command in this process as the command line does; returns its exit code and what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["gemma-tune", *arguments])
        patch.setattr(sys, "stdin", io.StringIO("Question 3?\n"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), err.getvalue() + out.getvalue()


# --- what is damaged --------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
ADAPTERS = ("runs/r/adapter", "bare")
MERGED, GGUF = "runs/r/export/merged-16bit", "runs/r/export/gguf-f16"
LAYER = "base_model.model.model.layers.0."
GATE_B, QUERY_A = f"{LAYER}mlp.gate_proj.lora_B.weight", f"{LAYER}self_attn.q_proj.lora_A.weight"


def put(path: Path, content: bytes) -> None:
    """Replace a file, not the bytes that it shares with the undamaged copy."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def weights(change: Callable[[Tensors], Tensors | None]) -> Callable[[], None]:
    """Change the tensors of both adapters; of one of them nothing is recorded."""

    def damage() -> None:
        for adapter in map(Path, ADAPTERS):
            tensors = load_file(adapter / "adapter_model.safetensors")
            tensors = change(tensors) or tensors
            (adapter / "adapter_model.safetensors").unlink()
            save_file(tensors, adapter / "adapter_model.safetensors")
        Path("bare/base.json").unlink()

    return damage


def value(name: str, number: float) -> Callable[[], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[1] = number

    return weights(change)


def config(**changes: Any) -> Callable[[], None]:
    """Change the config of both adapters; `...` removes a key."""

    def damage() -> None:
        for adapter in map(Path, ADAPTERS):
            values = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")) | changes
            text = json.dumps({name: each for name, each in values.items() if each is not ...})
            put(adapter / "adapter_config.json", text.encode())

    return damage


def base(change: Callable[[Tensors], Tensors | None]) -> Callable[[], None]:
    def damage() -> None:
        tensors = load_file("base/model.safetensors")
        tensors = change(tensors) or tensors
        Path("base/model.safetensors").unlink()
        save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})

    return damage


def files(*names: str, change: Callable[[bytes], bytes | None]) -> Callable[[], None]:
    def damage() -> None:
        for path in map(Path, names):
            content = change(path.read_bytes())
            path.unlink() if content is None else put(path, content)

    return damage


def in_adapters(name: str) -> tuple[str, ...]:
    return tuple(f"{adapter}/{name}" for adapter in ADAPTERS)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:-401] + bytes([content[-401] ^ 1]) + content[-400:]


def swap_tokens(content: bytes) -> bytes:
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[1000:1002]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return json.dumps(tokenizer).encode()


def as_pickle() -> None:
    for adapter in map(Path, ADAPTERS):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def without_a_shard() -> None:
    tensors = load_file("base/model.safetensors")
    index = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    put(Path("base/model.safetensors.index.json"), json.dumps({"weight_map": index}).encode())
    Path("base/model.safetensors").unlink()
    first = {name: each for name, each in tensors.items() if "00001" in index[name]}
    save_file(first, "base/model-00001-of-00002.safetensors")


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): each for name, each in tensors.items()}


def reshaped(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


def other_weights(tensors: Tensors) -> None:
    for each in tensors.values():
        if each.ndim == 2:
            each.copy_(each.flip(0))


def lock(**changes: Any) -> Callable[[], None]:
    return files("runs/r/lock.json", change=lambda content: json.dumps(json.loads(content) | changes).encode())


# --- who has to say so ------------------------------------------------------------------------------------------------

OF_RUN = (
    "generate", "chat", "score", "evaluate", "compare", "merge", "export adapter", "export nf4", "export again",
    "warm start", "verify", "reproduce",
)  # fmt: skip
OF_ADAPTER = (
    "generate adapter", "chat adapter", "score adapter", "merge adapter", "merge --base", "export gguf",
    "warm start adapter", "validate warm start",
)  # fmt: skip
READS_ADAPTER = (*OF_RUN, *OF_ADAPTER)
# `reproduce` compares the weights of two adapters, whatever their base, config and record say.
READS_PAIR = tuple(name for name in READS_ADAPTER if name != "reproduce")
READS_BASE = (*READS_PAIR, "generate checkpoint", "resume")
READS_MERGED = ("generate merged", "score merged", "train on merged", "export again", "push merged")


@dataclass(frozen=True)
class Damage:
    """What is done to the files, what is said of it, by which commands, and which work all the same."""

    do: Callable[[], None]
    told: str  # a regular expression
    refused: tuple[str, ...]
    works: tuple[str, ...] = ("report",)


ADAPTER_WEIGHTS = in_adapters("adapter_model.safetensors")
NO_PLACE, UNKNOWN = r"adapter tensors have no weight in the base", r"cannot tell what these adapter tensors are"
DIFFERS = r"these files differ: {0}|was begun with something else:\n  base\.files\.{0}"
of_adapter, of_base = partial(Damage, refused=READS_ADAPTER), partial(Damage, refused=READS_BASE)
of_pair = partial(Damage, refused=READS_PAIR)
of_run, of_merged = partial(Damage, refused=(*OF_RUN, "resume")), partial(Damage, refused=READS_MERGED)
of_report = partial(Damage, refused=("report",), works=("generate",))
DAMAGES: dict[str, Damage] = {
    # the adapter's weights
    "NaN": of_adapter(value(GATE_B, float("nan")), rf"model\.safetensors: NaN or infinity .*{GATE_B}"),
    "infinity": of_adapter(value(QUERY_A, float("inf")), rf"NaN or infinity in 1 .*{QUERY_A}"),
    "module missing": of_pair(
        weights(without("layers.0.self_attn.q_proj")), r"lacks modules .* model\.layers\.0\.self_attn\.q_proj"
    ),
    "half a module": of_adapter(weights(without(QUERY_A)), r"self_attn\.q_proj needs lora_A, lora_B"),
    "half a file": of_adapter(files(*ADAPTER_WEIGHTS, change=half), r"model\.safetensors: cut off"),
    "cut in the header": of_adapter(files(*ADAPTER_WEIGHTS, change=lambda c: c[:300]), r"model\.safetensors: cut off"),
    "zero bytes": of_adapter(files(*ADAPTER_WEIGHTS, change=lambda c: b""), r"model\.safetensors: cut off"),
    "no file": of_adapter(files(*ADAPTER_WEIGHTS, change=lambda c: None), r"has no adapter_model\.safetensors"),
    "a pickle": of_adapter(as_pickle, r"adapter_model\.bin is a pickle"),
    "another prefix": of_pair(weights(renamed(".model.layers.", ".text_model.layers.")), NO_PLACE),
    "no prefix": of_adapter(weights(renamed("base_model.model.", "")), UNKNOWN),
    "wrong shape": of_pair(
        weights(reshaped(QUERY_A, (4, 7))), r"self_attn\.q_proj: the adapter fits a weight of shape"
    ),
    "wrong rank": of_adapter(weights(reshaped(QUERY_A, (5, 192))), r"do not fit the rank 4"),
    "extra layer": of_pair(
        weights(lambda t: t | {n.replace("layers.0", "layers.9"): v.clone() for n, v in t.items()}), NO_PLACE
    ),
    "extra tensor": of_adapter(weights(lambda t: t | {f"{LAYER}extra": torch.ones(2)}), UNKNOWN),
    "integers": of_adapter(weights(lambda t: t | {GATE_B: t[GATE_B].int()}), UNKNOWN),
    "zeros": of_adapter(weights(lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()}), "changes nothing"),
    "flipped bit": of_pair(files(*ADAPTER_WEIGHTS, change=flip), r"adapter_model\.safetensors changed"),
    # what lies next to them
    "config a list": of_adapter(
        files(*in_adapters("adapter_config.json"), change=lambda c: b"[1]"), r"config\.json is damaged: not a mapping"
    ),
    "half a config": of_adapter(
        files(*in_adapters("adapter_config.json"), change=half), r"config\.json is damaged: not JSON"
    ),
    "no rank": of_adapter(config(r=...), r"rank"),
    "rank as text": of_adapter(config(r="4"), r"config\.json is damaged: r is '4'"),
    "infinite alpha": of_adapter(config(lora_alpha=float("inf")), r"config\.json is damaged: lora_alpha is inf"),
    "unknown kind": of_pair(config(peft_type="NOPE"), r"peft_type .*'NOPE'|not the export of this adapter"),
    "no kind": of_adapter(config(peft_type=...), r"has no peft_type"),
    "other targets": of_pair(config(target_modules=["query_key_value"]), r"target_modules is \['query_key_value'\]"),
    "no targets": of_pair(config(target_modules=None), r"target_modules is None"),
    "more targets": of_pair(config(target_modules=["q_proj", "lm_head"]), r"target_modules|lacks modules"),
    "tokens swapped": of_pair(files(*in_adapters("tokenizer.json"), change=swap_tokens), r"tokenizer\.json changed"),
    "half a chat template": of_pair(
        files(*in_adapters("chat_template.jinja"), change=half), r"chat_template\.jinja changed"
    ),
    "half a template": of_pair(files(*in_adapters("template.yaml"), change=half), r"template\.yaml changed"),
    "half a base.json": of_pair(files(*in_adapters("base.json"), change=half), r"base\.json is damaged"),
    "base.json of another kind": of_pair(
        files(*in_adapters("base.json"), change=lambda c: b'{"base": {"files": [1]}}'), r"base\.json is damaged"
    ),
    # the base
    "other weights": of_base(base(other_weights), DIFFERS.format(r"model\.safetensors")),
    "NaN in the base": of_base(
        base(lambda t: t | {"model.norm.weight": t["model.norm.weight"] * float("nan")}),
        DIFFERS.format(r"model\.safetensors"),
    ),
    "other shapes": of_base(
        base(lambda t: t | {"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}),
        r"a weight of shape|has shape \[8, 8\], and config\.json means \[256, 256\]|base\.files\.model\.safetensors",
    ),
    "half a base": of_base(files("base/model.safetensors", change=half), r"base/model\.safetensors: cut off"),
    "a shard missing": of_base(without_a_shard, r"model-00002-of-00002\.safetensors"),
    "tokens of the base swapped": of_base(
        files("base/tokenizer.json", change=swap_tokens), DIFFERS.format(r"tokenizer\.json")
    ),
    "half a config of the base": of_base(files("base/config.json", change=half), r"config\.json is damaged: not JSON"),
    # the run
    "no lock": of_run(
        files("runs/r/lock.json", change=lambda c: None), r"has no lock\.json", works=("report", "merge adapter")
    ),
    "half a lock": of_run(files("runs/r/lock.json", change=half), r"lock\.json is damaged", works=("merge adapter",)),
    "lock without a base": of_run(lock(base={}), r"lock\.json does not say base\.name", works=("merge adapter",)),
    "half a manifest": Damage(
        files("runs/r/manifest.json", change=half),
        r"manifest\.json is damaged",
        ("report", "resume", "reproduce"),
        ("generate",),
    ),
    "manifest of a later version": Damage(
        files("runs/r/manifest.json", change=lambda c: c.replace(b'"finished"', b'"archived"')),
        r"manifest\.json is damaged: status is 'archived'",
        ("report", "resume", "reproduce"),
        ("generate",),
    ),
    "half a summary": of_report(files("runs/r/summary.json", change=half), r"summary\.json is damaged"),
    "summary a list": of_report(files("runs/r/summary.json", change=lambda c: b"[]"), r"summary\.json is damaged"),
    "summary without losses": of_report(
        files("runs/r/summary.json", change=lambda c: b'{"model": "x"}'), r"summary\.json is damaged"
    ),
    "half a checkpoint": Damage(
        files("runs/r/checkpoints/checkpoint-2/adapter_model.safetensors", change=half),
        r"checkpoint-2/adapter_model\.safetensors: cut off",
        ("generate checkpoint",),
        ("generate",),
    ),
    # the exports
    "flipped bit in a merged model": of_merged(
        files(f"{MERGED}/model.safetensors", change=flip),
        r"merged-16bit is not as it was .*model\.safetensors",
        works=("generate",),
    ),
    "half a merged model": of_merged(
        files(f"{MERGED}/model.safetensors", change=half), r"model\.safetensors", works=("merge",)
    ),
    "tokens of a merged model swapped": of_merged(
        files(f"{MERGED}/tokenizer.json", change=swap_tokens), r"tokenizer\.json", works=("merge adapter",)
    ),
    "half a chat template of a merged model": of_merged(
        files(f"{MERGED}/chat_template.jinja", change=half), r"chat_template\.jinja", works=("chat",)
    ),
    "half a record": of_merged(
        files(f"{MERGED}/export.json", change=half), r"export\.json is damaged", works=("merge",)
    ),
    "record a list": of_merged(
        files(f"{MERGED}/export.json", change=lambda c: b"[]"), r"export\.json is damaged", works=("merge",)
    ),
    "flipped bit in a GGUF": Damage(
        files(f"{GGUF}/r-f16.gguf", change=flip),
        r"gguf-f16 is not as it was .*r-f16\.gguf",
        ("generate gguf", "push gguf", "export again"),
        ("generate merged",),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_command_says_the_same_of_a_damage(folder: Path, name: str) -> None:
    damage = DAMAGES[name]
    damage.do()
    wrong = []
    for command in (*damage.refused, *damage.works):
        code, said = call(*(part.format(n=command.replace(" ", "-")) for part in COMMANDS[command]))
        is_refused = command in damage.refused
        is_right = bool(re.search(damage.told, said)) and code == 2 if is_refused else code == 0
        if not is_right or "Traceback" in said:
            wrong.append(f"{command}: exit {code}, said: …{said[-300:]}")
    assert not wrong, "\n".join(wrong)
    assert [path.name for path in Path("runs").iterdir()] == ["r"]


def test_undamaged_every_command_works(folder: Path) -> None:
    # What trains has tests of its own; the others need a process of their own, llama.cpp or the hub.
    skipped = {"resume", "warm start", "warm start adapter", "evaluate", "verify", "generate gguf", "push merged"}
    failed = {
        name: said[-300:]
        for name, command in COMMANDS.items()
        if name not in {*skipped, "push gguf"}
        for code, said in [call(*(part.format(n=name.replace(" ", "-")) for part in command))]
        if code
    }
    assert not failed
