"""What the probes of the training libraries, of the hub and of a recipe's parts come to."""

from gemma_tune.doctor.finding import Finding
from gemma_tune.doctor.packages import install_command, read_tested_set
from gemma_tune.doctor.run_probes import Probed
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.identity import installed_version

# Relative; the layer computes in float32, or in the card's TF32.
_MAX_LAYER_ERROR = 0.02


def check_bitsandbytes(probe: Probed) -> Finding:
    name, facts = "4-bit kernels", probe.facts
    if probe.outcome != "done":
        return Finding(name, "fail", probe.trouble, _install("bitsandbytes"))
    found = f"bitsandbytes {facts['version']} on {facts['device']}"
    wrong = []
    if facts["quantise_error"] > facts["allowed"] * 1.01:
        wrong.append(f"expanded weights are off by {facts['quantise_error']:.3f}, NF4 allows {facts['allowed']}")
    for way in ("forward", "backward"):
        if not facts[f"{way}_error"] <= _MAX_LAYER_ERROR:
            wrong.append(f"the {way} pass is off by {facts[f'{way}_error']:.1%}")
    if wrong:
        return Finding(name, "fail", f"{found} computes wrongly: {'; '.join(wrong)}", _install("bitsandbytes"))
    return Finding(name, "ok", f"{found}: quantised, expanded, forward and backward as PyTorch computes them")


def check_engine(probe: Probed) -> list[Finding]:
    """The fastest engine that is installed, and TRL, as a run imports them."""
    fastest = next(iter(ENGINES.values()))
    plain = next(each for each in ENGINES.values() if not each.packages)
    name = probe.facts.get("engine")
    if name is None:
        broken = next((each for each in ENGINES.values() if each.name in probe.step), plain)
        fix = _install(*(broken.packages or (broken.name,)))
        other = "" if broken is plain else f"; or model.engine={plain.name}"
        return [Finding(broken.name, "fail", probe.trouble, fix + other)]
    if name == fastest.name:
        others = " and ".join(f"{package} {installed_version(package)}" for package in fastest.packages[1:])
        finding = Finding(name, "ok", f"{installed_version(name)} with {others} imports")
    else:
        found = f"not installed: plain {name} trains, more slowly"
        finding = Finding(fastest.name, "warn", found, _install(fastest.packages[0]))
    if probe.outcome != "done":
        return [finding, Finding("trl", "fail", probe.trouble, _install("trl", "transformers", "datasets"))]
    return [finding, Finding("trl", "ok", f"{installed_version('trl')} imports next to it")]


def check_hub(probe: Probed) -> Finding:
    """The login, and whether the hub answers. Neither is needed for models and rows that are on this machine."""
    facts = probe.facts
    if "is_offline" not in facts:
        return Finding("hub", "fail", probe.trouble, _install("huggingface-hub"))
    if facts["is_offline"]:
        return Finding("hub", "warn", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE")
    login, status = facts.get("token_from"), facts.get("status")
    if status is None:
        why = probe.trouble if probe.outcome == "hung" else facts.get("reason", probe.error)
        found = f"cannot be reached ({why}): only models and rows on this machine can be used"
        return Finding("hub", "warn", found, "check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT)")
    if status not in (200, 401):
        return Finding("hub", "warn", f"answers with status {status}", "try again later; is HF_ENDPOINT set rightly?")
    if login is None:
        found = "reachable, not logged in: gated models (Gemma 1 to 3) are refused"
        return Finding("hub", "warn", found, "hf auth login")
    if status == 401:
        fix = "hf auth login" if login == "the login" else "correct HF_TOKEN, or unset it to use the login"
        return Finding("hub", "fail", f"reachable, but the token of {login} is not valid", fix)
    found = f"reachable, logged in with {login}"
    if facts.get("role") == "fineGrained":
        found += "; the token is fine-grained: for Gemma it must be allowed to read public gated repositories"
    return Finding("hub", "ok", found)


def check_model(probe: Probed, *, name: str) -> Finding:
    facts = probe.facts
    if "refused" in facts:
        return Finding("model", "fail", facts["refused"], facts["hint"])
    if "missing_bytes" not in facts:
        return Finding("model", "fail", f"{name}: {probe.trouble}", "check the network, or give a local directory")
    if facts["missing_bytes"]:
        size = f"{facts['missing_bytes'] / 1e9:.1f} GB"
        return Finding("model", "ok", f"{name}: the hub gives it to this machine, {size} to download")
    return Finding("model", "ok", f"{name} is on this machine")


def check_data(probe: Probed) -> Finding:
    facts = probe.facts
    if "refused" in facts:
        return Finding("data", "fail", facts["refused"], facts["hint"])
    if probe.outcome == "hung":
        fix = "gemma-tune data preview RECIPE goes on with it"
        return Finding("data", "warn", f"{probe.trouble}: a large download?", fix)
    if "sources" not in facts:
        return Finding("data", "fail", probe.trouble, "gemma-tune data preview RECIPE shows more")
    return Finding("data", "ok", ", ".join(facts["sources"]))


def _install(*packages: str) -> str:
    return install_command(read_tested_set(), list(packages))
