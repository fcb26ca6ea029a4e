"""The probes: each runs in a process of its own (run_probes.py) and sends its facts, and as `step` what comes next."""

import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gemma_tune.machine.child import Send, one_line

# The widest gap between two NF4 levels is from -1 to -0.6962 (arXiv:2305.14314, appendix E): a rounded weight is off by
# at most half of it, relative to the largest of its block.
_NF4_ERROR = 0.1519
_BLOCK = 64
_HUB_SECONDS = 5.0


def probe_torch(tell: Send) -> None:
    """The PyTorch build, and the device that trains."""
    tell(step="importing torch")
    import torch

    tell(version=torch.__version__, built_for=torch.version.cuda)
    tell(step="starting CUDA")
    from gemma_tune.machine.device import detect_device

    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except Exception as error:
            tell(cuda_error=one_line(error))
        tell(architectures=list(torch.cuda.get_arch_list()))
    device = detect_device()
    tell(device=asdict(device))
    if device.kind == "cuda":
        tell(claims_bf16=torch.cuda.is_bf16_supported())


def probe_bitsandbytes(tell: Send) -> None:
    """Quantise to NF4, expand again, and go forward and backward through a 4-bit layer, each compared with PyTorch."""
    tell(step="importing torch")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tell(step="importing bitsandbytes")
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from gemma_tune.engines.quantized import keep_trainable_layout

    tell(version=bnb.__version__, device=device)
    tell(step="quantising to 4 bits")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator).to(device)
    packed, state = quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4")
    tell(step="expanding 4-bit weights")
    expanded = dequantize_4bit(packed, state)
    blocks = (expanded - weight).float().view(-1, _BLOCK).abs().amax(1)
    tell(quantise_error=float((blocks / weight.view(-1, _BLOCK).abs().amax(1)).max()), allowed=_NF4_ERROR)
    tell(step="computing with a 4-bit layer")
    layer = bnb.nn.Linear4bit(128, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer = layer.to(device)
    keep_trainable_layout(layer)
    inputs = torch.randn(8, 128, generator=generator).to(device).requires_grad_()
    outputs = layer(inputs)
    tell(step="computing the gradient of a 4-bit layer")
    outputs.sum().backward()
    assert inputs.grad is not None
    forward = (outputs - inputs @ expanded.T).abs().max() / outputs.abs().max()
    backward = (inputs.grad - expanded.sum(0)).abs().max() / inputs.grad.abs().max()
    tell(forward_error=float(forward), backward_error=float(backward))


def probe_engine(tell: Send) -> None:
    """Import what trains, in the order of a run: the engine, then the trainer."""
    from gemma_tune.engines.choose import is_installed, start_engine
    from gemma_tune.engines.engine_facts import ENGINES

    engine = next(each.name for each in ENGINES.values() if is_installed(each))
    tell(step=f"importing {engine}")
    start_engine(engine)
    tell(engine=engine)
    tell(step="importing trl")
    importlib.import_module("gemma_tune.training.loop")
    tell(trainer="trl")


def probe_places(tell: Send) -> None:
    """The directories of downloads and of encoded rows, as the code that uses them names them."""
    tell(step="importing huggingface_hub")
    from huggingface_hub import constants

    from gemma_tune.paths import cache_dir

    tell(hub_cache=str(constants.HF_HUB_CACHE), token_cache=str(cache_dir()))


def probe_hub(tell: Send) -> None:
    """The login, and whether the hub answers. The token is never sent."""
    tell(step="importing huggingface_hub")
    import httpx
    from huggingface_hub import constants, get_session, get_token

    from gemma_tune.models.hub.access import reason_of

    tell(is_offline=constants.HF_HUB_OFFLINE)
    token = get_token()
    from_environment = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"))
    tell(token_from=None if token is None else "HF_TOKEN" if from_environment else "the login")
    if not constants.HF_HUB_OFFLINE:
        tell(step="asking the hub")
        try:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=_HUB_SECONDS)
        except httpx.TimeoutException:
            tell(status=None, reason="no answer")
        except httpx.HTTPError as error:
            tell(status=None, reason=reason_of(error))
        else:
            role = answer.json().get("auth", {}).get("accessToken", {}).get("role") if answer.is_success else None
            tell(status=answer.status_code, role=role)


def probe_model(tell: Send, *, name: str, revision: str | None) -> None:
    """Whether the model of a recipe is here, or the hub would give it."""
    from gemma_tune.errors import ModelError
    from gemma_tune.models.hub.access import ask_hub, cached_directory
    from gemma_tune.models.hub.download import wanted_files
    from gemma_tune.models.resolve import resolve_model

    tell(step="looking for the model")
    try:
        source = resolve_model(name)
        if source.kind == "kaggle":
            raise ModelError(
                f"{source.name} is on Kaggle, which is asked only for the files themselves",
                hint=f"gemma-tune models download {source.name}",
            )
        here = source.path if source.path.is_dir() else cached_directory(source.location, revision=revision)
        if here is not None:
            tell(missing_bytes=0)
            return
        tell(step="asking the hub for the model")
        files = wanted_files(ask_hub(source.location, revision=revision))
        tell(missing_bytes=sum(file.num_bytes for file in files))
    except ModelError as error:
        tell(refused=error.message, hint=error.hint)


def probe_data(tell: Send, *, model: str, data: Mapping[str, Any]) -> None:
    """Open every source of a recipe and read its first rows."""
    from gemma_tune.data.inputs import open_inputs
    from gemma_tune.errors import GemmaTuneError
    from gemma_tune.models.resolve import resolve_model
    from gemma_tune.recipe.schema import DataSection

    tell(step="reading the rows")
    try:
        known = resolve_model(model).model
        inputs = open_inputs(
            DataSection.model_validate(data), prefers_chat=known is not None and known.is_instruction_tuned
        )
        tell(sources=[f"{item.source.label} as {item.template.name}" for item in inputs.all])
    except GemmaTuneError as error:
        tell(refused=error.message, hint=error.hint)
