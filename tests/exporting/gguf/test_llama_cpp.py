"""What llama.cpp makes of an exported file, against transformers: logits, tokens, greedy text, chat prompts."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
from gemma_tune.exporting.gguf.header import read_gguf_header
from gemma_tune.exporting.gguf.quantize import quantize_gguf
from gemma_tune.exporting.gguf.token_lists import read_gguf_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR
from tests.exporting.gguf.tokenizing import TRICKY, Change, fuzz_strings, with_other_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

Logits = np.ndarray[Any, np.dtype[np.float32]]

SOURCES = ("gemma-tiny", "gemma", "gemma2", "gemma3")
TRAINED = ("gemma-trained", "gemma2-trained", "gemma3-trained")
DTYPES = ("f32", "bf16", "q8_0")
NUM_POSITIONS, NUM_NEW, NUM_STEPS = 200, 24, 25
# Where prompts begin in the text: no two have a token in common with the answer of another.
PROMPTS = range(1, 400, 40)
MESSAGES = [
    {"role": "user", "content": "  Where does Mara live?\n"},
    {"role": "assistant", "content": "In Ostel."},
    {"role": "user", "content": "And\n\nwho bakes  bread?"},
]
# In a process of its own: llama.cpp aborts instead of raising. The cache is float32, or its rounding would be measured.
_PROGRAM = """
import json, sys
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

path, request, answer = sys.argv[1], json.load(open(sys.argv[2], encoding="utf-8")), sys.argv[3]
llama = Llama(
    path, n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
    type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, swa_full=True,
)
tokenize = lambda text, **options: llama.tokenize(text.encode(), special=True, **options)
told = {"tokens": [tokenize(text, add_bos=False) for text in request["texts"]], "greedy": []}
told["with_bos"] = tokenize("some text", add_bos=bool(llama._model.add_bos_token()))
llama.eval(request["ids"])
np.save(answer + ".npy", llama.scores[: len(request["ids"])])
for ids in request["prompts"]:
    llama.reset()
    new = []
    while len(new) < request["num_new"]:
        llama.eval(ids)
        ids = [int(np.argmax(llama.scores[llama.n_tokens - 1]))]
        new += ids
    told["greedy"].append(new)
template = llama.metadata["tokenizer.chat_template"]
bos, eos = (llama._model.token_get_text(token) for token in (llama.token_bos(), llama.token_eos()))
prompt = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)(messages=request["messages"]).prompt
told["chat"] = tokenize(prompt, add_bos=False)
json.dump(told, open(answer, "w"))
"""


def ask_llama(path: Path, work: Path, request: dict[str, Any]) -> tuple[dict[str, Any], Logits]:
    asked, answered = work / f"{path.stem}-request.json", work / f"{path.stem}-answer.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-c", _PROGRAM, str(path), str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answered.read_text(encoding="utf-8")), np.load(f"{answered}.npy")


@torch.no_grad()
def ask_transformers(directory: Path, request: dict[str, Any]) -> tuple[dict[str, Any], Logits]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    settings = {"do_sample": False, "max_new_tokens": request["num_new"], "pad_token_id": 0}
    prompts = torch.tensor(request["prompts"])
    output = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), output_logits=True, return_dict_in_generate=True, **settings
    )
    best_two = torch.stack(output.logits, dim=1).topk(2, dim=-1).values
    chat = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=False)
    told = {
        "tokens": [tokenizer(text, add_special_tokens=False).input_ids for text in request["texts"]],
        "with_bos": tokenizer("some text").input_ids,
        "greedy": output.sequences[:, prompts.shape[1] :].tolist(),
        "leads": (best_two[..., 0] - best_two[..., 1]).tolist(),
        "chat": chat,
    }
    return told, model(input_ids=torch.tensor([request["ids"]])).logits[0].numpy()


@functools.cache
def some_ids() -> list[int]:
    """Of plain text, the BOS first."""
    rows = (TINY_MODEL_DIR.parent / "rows" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    texts = "\n".join(row["context"] or row["response"] for row in map(json.loads, rows[:40]))
    ids: list[int] = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)(texts).input_ids
    return ids


def learn(directory: Path, output: Path) -> Path:
    """Train a model on what follows each prompt, until every token of it is likely by far."""
    ids = some_ids()
    rows = torch.tensor([ids[:1] + ids[begin : begin + 7 + NUM_NEW] for begin in PROMPTS])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(NUM_STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shutil.copytree(directory, output)
    model.save_pretrained(output)
    return output


class Comparison:
    """The files of one model and what each program says about them."""

    def __init__(self, source: Path, work: Path) -> None:
        self.work = work
        ids = some_ids()
        self.request = {
            "ids": ids[:NUM_POSITIONS],
            "texts": [],
            "prompts": [ids[:1] + ids[begin : begin + 7] for begin in PROMPTS],
            "num_new": NUM_NEW,
            "messages": MESSAGES,
        }
        self.expected, self.logits = ask_transformers(source, self.request)
        for dtype in DTYPES:
            provenance = GgufProvenance(name=source.name)
            convert_to_gguf(source, self.file(dtype), dtype=dtype, provenance=provenance)  # type: ignore[arg-type]
        self.found = {dtype: ask_llama(self.file(dtype), work, self.request) for dtype in DTYPES}

    def file(self, dtype: str) -> Path:
        return self.work / f"{dtype}.gguf"

    def max_difference(self, logits: Logits) -> float:
        return float(np.abs(logits - self.logits).max())

    def top_1(self, logits: Logits) -> float:
        return float((logits.argmax(-1) == self.logits.argmax(-1)).mean())

    def mean_kl(self, logits: Logits) -> float:
        log_p, log_q = (torch.log_softmax(torch.from_numpy(rows).double(), -1) for rows in (self.logits, logits))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in llama.cpp's process: on a busy machine the threads of so small a model mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def compare(
    make_gguf_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Comparison]:
    @functools.cache
    def make(name: str) -> Comparison:
        work = tmp_path_factory.mktemp(name)
        if name == "gemma-tiny":
            return Comparison(TINY_MODEL_DIR, work)
        source = make_gguf_source(name.removesuffix("-trained"))
        return Comparison(learn(source, work / "source") if name.endswith("-trained") else source, work)

    return make


@pytest.mark.parametrize("name", SOURCES)
def test_f32_logits_are_those_of_transformers(name: str, compare: Callable[..., Comparison]) -> None:
    compared = compare(name)
    _, logits = compared.found["f32"]
    print(name, "f32", compared.max_difference(logits), compared.top_1(logits), compared.mean_kl(logits))
    assert compared.max_difference(logits) < 5e-3
    assert compared.top_1(logits) == 1.0


@pytest.mark.parametrize("name", SOURCES)
def test_narrower_types_stay_near(name: str, compare: Callable[..., Comparison]) -> None:
    compared = compare(name)
    for dtype in ("bf16", "q8_0"):
        _, logits = compared.found[dtype]
        print(name, dtype, compared.max_difference(logits), compared.top_1(logits), compared.mean_kl(logits))
        assert compared.mean_kl(logits) < 1e-3
        assert compared.top_1(logits) >= 0.95


@pytest.mark.parametrize("name", SOURCES)
def test_norms_without_their_one_do_not_pass(name: str, compare: Callable[..., Comparison]) -> None:
    compared = compare(name)
    wrong = compared.work / "wrong.gguf"
    shutil.copyfile(compared.file("f32"), wrong)
    for tensor in read_gguf_header(wrong).tensors:
        if tensor.name.endswith("norm.weight"):
            weights = np.memmap(wrong, np.float32, "r+", tensor.offset_bytes, tensor.shape)
            weights -= 1
            weights.flush()
    _, logits = ask_llama(wrong, compared.work, compared.request | {"prompts": []})
    assert compared.max_difference(logits) > 1
    assert compared.top_1(logits) < 0.97


@pytest.mark.parametrize("name", TRAINED)
def test_greedy_text_of_a_trained_model_is_that_of_transformers(name: str, compare: Callable[..., Comparison]) -> None:
    compared = compare(name)
    greedy, leads = compared.expected["greedy"], compared.expected["leads"]
    for dtype in DTYPES:
        told, logits = compared.found[dtype]
        print(name, dtype, "difference", compared.max_difference(logits), "least lead", min(map(min, leads)))
        assert told["greedy"] == greedy, dtype
    ids = some_ids()
    assert greedy == [ids[begin + 7 : begin + 7 + NUM_NEW] for begin in PROMPTS], "it has learned the text"


@pytest.mark.parametrize("name", SOURCES)
def test_greedy_text_parts_from_that_of_transformers_at_a_tie_only(
    name: str, compare: Callable[..., Comparison]
) -> None:
    """Random weights leave ties. The first other token may come only where the lead of the best is less than twice the
    largest error of a logit: one more for the best, one less for the second."""
    compared = compare(name)
    greedy, leads = compared.expected["greedy"], compared.expected["leads"]
    for dtype in DTYPES:
        told, logits = compared.found[dtype]
        num_equal = 0
        for expected, found, lead in zip(greedy, told["greedy"], leads, strict=True):
            parted = next((step for step in range(NUM_NEW) if expected[step] != found[step]), None)
            assert parted is None or lead[parted] < 2 * compared.max_difference(logits), dtype
            num_equal += parted is None
        print(name, dtype, num_equal, "of", len(greedy))
        assert num_equal > 0


@pytest.mark.parametrize("name", SOURCES)
def test_the_embedded_chat_template_gives_the_prompt(name: str, compare: Callable[..., Comparison]) -> None:
    compared = compare(name)
    told, _ = compared.found["q8_0"]
    assert told["chat"] == compared.expected["chat"]
    assert told["chat"].count(2) == 1
    assert told["with_bos"] == compared.expected["with_bos"]


def test_texts_are_cut_into_the_tokens_of_transformers(compare: Callable[..., Comparison]) -> None:
    compared = compare("gemma-tiny")
    texts = [*TRICKY, *fuzz_strings(2000)]
    expected = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)(texts, add_special_tokens=False).input_ids
    told, _ = ask_llama(compared.file("q8_0"), compared.work, compared.request | {"texts": texts, "prompts": []})
    differences = [(text, *ids) for text, *ids in zip(texts, expected, told["tokens"], strict=True) if ids[0] != ids[1]]
    assert not differences, differences[:3]


def _whole(values: dict[str, Any], id_of: Callable[[str], int]) -> None:
    for token in ("\n\n", "\n\n\n", "▁▁", "▁the", "he", "er"):
        values["token_type"][id_of(token)] = 4


@pytest.mark.parametrize(
    "change",
    [
        lambda values, id_of: None,
        lambda values, id_of: values.update(add_space_prefix=True),
        lambda values, id_of: values.update(scores=[0.0] * len(values["scores"])),
        lambda values, id_of: values.update(scores=[float(index % 7) for index in range(len(values["scores"]))]),
        _whole,
    ],
    ids=["as it is", "space in front", "scores equal", "scores with ties", "whole tokens"],
)
def test_our_reader_cuts_any_lists_as_llama_cpp_does(
    change: Change, compare: Callable[..., Comparison], tmp_path: Path
) -> None:
    compared = compare("gemma-tiny")
    path = with_other_tokenizer(compared.file("q8_0"), tmp_path / "other.gguf", change)
    texts = [*TRICKY, *fuzz_strings(500)]
    told, _ = ask_llama(path, tmp_path, compared.request | {"texts": texts, "prompts": []})
    reader = replace(read_gguf_tokenizer(path), before=())
    differences = [
        (text, ours, theirs)
        for text, ours, theirs in zip(texts, map(reader.tokenize, texts), told["tokens"], strict=True)
        if ours != theirs
    ]
    assert not differences, (len(differences), differences[:3])


@pytest.mark.parametrize("name", SOURCES)
def test_q4_k_m_is_within_its_error(name: str, compare: Callable[..., Comparison]) -> None:
    compared = compare(name)
    facts = quantize_gguf(compared.file("bf16"), compared.work / "q4_k_m.gguf", quantization="q4_k_m")
    _, logits = ask_llama(compared.work / "q4_k_m.gguf", compared.work, compared.request | {"prompts": []})
    print(name, "q4_k_m", facts["bits_per_weight"], compared.top_1(logits), compared.mean_kl(logits))
    assert compared.mean_kl(compared.found["q8_0"][1]) < compared.mean_kl(logits) < 0.1
