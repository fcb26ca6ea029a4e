"""A Gemma of random weights, to look at an architecture and to try code out (LEAF)."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gemma_tune.disk import read_json_object
from gemma_tune.engines.attention import choose_attention
from gemma_tune.errors import ModelError
from gemma_tune.machine.device import detect_device
from gemma_tune.machine.precision import decide_precision
from gemma_tune.models.catalogue import ARCHITECTURES, TINY, find_model
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.models.describe import count_params
from gemma_tune.paths import TINY_MODEL_DIR


def make_random_model(name: str, *, dtype: str = "auto", seed: int = 0) -> tuple[Any, TextConfig, Path | None]:
    """The text model of a registry name, or of a directory that holds a config.json, with the weights of a fresh model.

    Returns:
        The model, the facts of its architecture, and its directory; None for a name whose files are not here.

    Raises:
        ModelError: the name is unknown, or the weights would not fit into the memory of this machine.
    """
    directory = _directory(name)
    if directory is not None:
        facts, values = read_config(directory), read_json_object(directory / "config.json", error=ModelError)
    else:
        row = find_model(name)
        facts, values = row.config, dict(ARCHITECTURES[row.architecture])
    precision = decide_precision(dtype, device=detect_device())
    weight_dtype = getattr(torch, precision.storage)
    _require_memory(name, count_params(facts) * weight_dtype.itemsize, dtype=precision.storage)
    config = AutoConfig.for_model(**values).get_text_config()
    attention = choose_attention(directory, asked="auto") if directory is not None else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=weight_dtype, attn_implementation=attention)
    model.requires_grad_(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), facts, directory


def _directory(name: str) -> Path | None:
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ModelError(f"{path}: has no config.json", hint="random weights are made for a model directory or a name")
    return TINY_MODEL_DIR if find_model(name).name == TINY else None


def _require_memory(name: str, num_bytes: int, *, dtype: str) -> None:
    if torch.cuda.is_available():
        memory, where = torch.cuda.mem_get_info()[0], "are free on the card"
    else:
        memory, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "are this machine's memory"
    if num_bytes > memory:
        raise ModelError(
            f"the weights of {name} take {num_bytes:,} bytes in {dtype}, and {memory:,} {where}",
            hint=f"for the layer table alone: gemma-tune models show {name}; small models: gemma-tiny, gemma-3-270m",
        )
