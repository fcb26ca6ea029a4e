"""The probes: each runs in a process of its own (probe.py) and tells its facts as lines of JSON.

`python -m gemma_tune.doctor.worker NAME SECONDS ARGUMENTS`, where ARGUMENTS is a JSON object.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

# The widest gap between two NF4 levels is from -1 to -0.6962 (arXiv:2305.14314, appendix E): a rounded weight is off by
# at most half of it, relative to the largest of its block.
_NF4_ERROR = 0.1519
_BLOCK = 64
_HUB_SECONDS = 5.0


class Teller:
    """Writes to the stdout that the process was started with, while libraries print to stderr."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def step(self, doing: str) -> None:
        """What comes next, in case that it does not come back."""
        self._line({"step": doing})

    def facts(self, **facts: Any) -> None:
        self._line({"facts": facts})

    def error(self, message: str) -> None:
        self._line({"error": message})

    def _line(self, value: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps(value) + "\n")
        self.stream.flush()


def probe_torch(tell: Teller, arguments: Mapping[str, Any]) -> None:
    """The PyTorch build, and the device that trains."""
    tell.step("importing torch")
    import torch

    tell.facts(version=torch.__version__, built_for=torch.version.cuda)
    tell.step("starting CUDA")
    from gemma_tune.machine.precision import detect_device

    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except Exception as error:
            tell.facts(cuda_error=_one_line(error))
        tell.facts(architectures=list(torch.cuda.get_arch_list()))
    device = detect_device()
    tell.facts(device=asdict(device))
    if device.kind == "cuda":
        tell.facts(claims_bf16=torch.cuda.is_bf16_supported())


def probe_bitsandbytes(tell: Teller, arguments: Mapping[str, Any]) -> None:
    """Quantise to NF4, expand again, and go forward and backward through a 4-bit layer, each compared with PyTorch."""
    tell.step("importing torch")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tell.step("importing bitsandbytes")
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from gemma_tune.engines.quantized import keep_trainable_layout

    tell.facts(version=bnb.__version__, device=device)
    tell.step("quantising to 4 bits")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator).to(device)
    packed, state = quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4")
    tell.step("expanding 4-bit weights")
    expanded = dequantize_4bit(packed, state)
    blocks = (expanded - weight).float().view(-1, _BLOCK).abs().amax(1)
    tell.facts(quantise_error=float((blocks / weight.view(-1, _BLOCK).abs().amax(1)).max()), allowed=_NF4_ERROR)
    tell.step("computing with a 4-bit layer")
    layer = bnb.nn.Linear4bit(128, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer = layer.to(device)
    keep_trainable_layout(layer)
    inputs = torch.randn(8, 128, generator=generator).to(device).requires_grad_()
    outputs = layer(inputs)
    tell.step("computing the gradient of a 4-bit layer")
    outputs.sum().backward()
    assert inputs.grad is not None
    forward = (outputs - inputs @ expanded.T).abs().max() / outputs.abs().max()
    backward = (inputs.grad - expanded.sum(0)).abs().max() / inputs.grad.abs().max()
    tell.facts(forward_error=float(forward), backward_error=float(backward))


def probe_engine(tell: Teller, arguments: Mapping[str, Any]) -> None:
    """Import what trains, in the order of a run: the engine, then the trainer."""
    from gemma_tune.engines.choose import is_installed, start_engine
    from gemma_tune.engines.facts import ENGINES

    engine = next(each.name for each in ENGINES.values() if is_installed(each))
    tell.step(f"importing {engine}")
    start_engine(engine)
    tell.facts(engine=engine)
    tell.step("importing trl")
    importlib.import_module("gemma_tune.training.loop")
    tell.facts(trainer="trl")


def probe_places(tell: Teller, arguments: Mapping[str, Any]) -> None:
    """The directories of downloads and of encoded rows, as the code that uses them names them."""
    tell.step("importing huggingface_hub")
    from huggingface_hub import constants

    from gemma_tune.data.encode.cache import cache_dir

    tell.facts(hub_cache=str(constants.HF_HUB_CACHE), token_cache=str(cache_dir()))


def probe_hub(tell: Teller, arguments: Mapping[str, Any]) -> None:
    """The login, and whether the hub answers. The token is never told."""
    tell.step("importing huggingface_hub")
    import httpx
    from huggingface_hub import constants, get_session, get_token

    from gemma_tune.models.hub.access import reason_of

    tell.facts(is_offline=constants.HF_HUB_OFFLINE)
    token = get_token()
    from_environment = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"))
    tell.facts(token_from=None if token is None else "HF_TOKEN" if from_environment else "the login")
    if not constants.HF_HUB_OFFLINE:
        tell.step("asking the hub")
        try:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=_HUB_SECONDS)
        except httpx.TimeoutException:
            tell.facts(status=None, reason="no answer")
        except httpx.HTTPError as error:
            tell.facts(status=None, reason=reason_of(error))
        else:
            role = answer.json().get("auth", {}).get("accessToken", {}).get("role") if answer.is_success else None
            tell.facts(status=answer.status_code, role=role)


def probe_model(tell: Teller, arguments: Mapping[str, Any]) -> None:
    """Whether the model of a recipe is here, or the hub would give it."""
    from gemma_tune.errors import ModelError
    from gemma_tune.models.catalogue import resolve_model
    from gemma_tune.models.hub.access import ask_hub, cached_directory
    from gemma_tune.models.hub.download import wanted_files

    tell.step("looking for the model")
    try:
        source = resolve_model(arguments["name"])
        is_here = source.kind == "directory" or Path(source.location).is_dir()
        here = Path(source.location) if is_here else cached_directory(source.location, revision=arguments["revision"])
        if here is not None:
            tell.facts(missing_bytes=0)
            return
        tell.step("asking the hub for the model")
        files = wanted_files(ask_hub(source.location, revision=arguments["revision"]))
        tell.facts(missing_bytes=sum(file.num_bytes for file in files))
    except ModelError as error:
        tell.facts(refused=error.message, hint=error.hint)


def probe_data(tell: Teller, arguments: Mapping[str, Any]) -> None:
    """Open every source of a recipe and read its first rows."""
    from gemma_tune.data.inputs import open_inputs
    from gemma_tune.errors import GemmaTuneError
    from gemma_tune.models.catalogue import resolve_model
    from gemma_tune.recipe.schema import DataSection

    tell.step("reading the rows")
    try:
        model = resolve_model(arguments["model"]).model
        inputs = open_inputs(
            DataSection.model_validate(arguments["data"]),
            prefers_chat=model is not None and model.is_instruction_tuned,
        )
        tell.facts(sources=[f"{item.source.label} as {item.template.name}" for item in inputs.all])
    except GemmaTuneError as error:
        tell.facts(refused=error.message, hint=error.hint)


PROBES: dict[str, Callable[[Teller, Mapping[str, Any]], None]] = {
    "torch": probe_torch,
    "bitsandbytes": probe_bitsandbytes,
    "engine": probe_engine,
    "places": probe_places,
    "hub": probe_hub,
    "model": probe_model,
    "data": probe_data,
}


def _one_line(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def main() -> None:
    name, seconds, arguments = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
    # Ends this process even where the one that started it is gone, and where native code hangs.
    signal.alarm(math.ceil(seconds) + 1)
    # Libraries, C++ ones too, write to file descriptor 1.
    tell = Teller(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    try:
        PROBES[name](tell, arguments)
    except Exception as error:
        tell.error(_one_line(error))
    tell.stream.flush()
    # No clean-up: a library's exit handler must not decide over a probe that has told everything.
    os._exit(0)


if __name__ == "__main__":
    main()
