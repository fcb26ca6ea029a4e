"""Cards by name, by memory, and as `nvidia-smi` prints them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gemma_tune.errors import EngineError
from gemma_tune.machine.cards import CARDS, TABLE_CARDS, detect_card, find_card, parse_smi


@pytest.mark.parametrize(
    ("text", "name"),
    [("t4", "t4"), ("RTX 4090", "rtx-4090"), ("A100-40", "a100-40"), ("NVIDIA A100 80GB", "a100-80"), ("H200", "h200")],
)
def test_names(text: str, name: str) -> None:
    assert find_card(text) is CARDS[name]


def test_a_memory_is_a_card_without_a_speed() -> None:
    card = find_card("GB=12")
    assert card.memory_bytes == 12 * 2**30
    assert card.tera_flops is None
    assert find_card("gb=7.5").memory_bytes == int(7.5 * 2**30)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rtx-4900", r"'rtx-4900'; did you mean 'rtx-4090'\?"),
        ("GB=0", r"GB=0 is not a memory"),
        ("GB=lots", r"GB=lots"),
        ("", r"no card is known"),
    ],
)
def test_unknown_cards_are_refused(text: str, told: str) -> None:
    with pytest.raises(EngineError, match=told):
        find_card(text)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("Tesla T4, 15360, 7.5", "t4"),
        ("NVIDIA A100-SXM4-40GB, 40960, 8.0", "a100-40"),
        ("NVIDIA A100 80GB PCIe, 81920, 8.0", "a100-80"),
        ("NVIDIA H100 80GB HBM3, 81559, 9.0", "h100"),
        ("NVIDIA GeForce RTX 3060, 12288, 8.6", "rtx-3060"),
        ("NVIDIA L4, 23034, 8.9", "l4"),
    ],
)
def test_lines_of_nvidia_smi(line: str, key: str) -> None:
    card = parse_smi(f"{line}\nNVIDIA L4, 1, 8.9\n")
    assert card is not None
    assert (card.memory_bytes, card.tera_flops) == (CARDS[key].memory_bytes, CARDS[key].tera_flops)
    assert card.compute_capability == CARDS[key].compute_capability


def test_a_card_that_is_not_listed_keeps_its_memory_and_has_no_speed() -> None:
    for line in ("NVIDIA GeForce RTX 4090 Laptop GPU, 16376, 8.9", "NVIDIA A10G, 23028, 8.6"):
        card = parse_smi(line)
        assert card is not None
        assert card.memory_bytes == int(line.split(", ")[1]) * 2**20
        assert card.tera_flops is None


@pytest.mark.parametrize("output", ["", "No devices were found\n", "NVIDIA-SMI has failed", "x, y, z"])
def test_what_is_no_card(output: str) -> None:
    assert parse_smi(output) is None


def test_the_card_of_this_machine_comes_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Tesla T4, 15360, 7.5'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    card = detect_card()
    assert card is not None and card.name == "Tesla T4"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert detect_card() is None
    program.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr("gemma_tune.machine.cards._SMI_SECONDS", 0.2)
    assert detect_card() is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert detect_card() is None


def test_a_t4_gives_what_pytorch_was_seen_to_get() -> None:
    """14.748 GiB: "Max memory" in Unsloth's notebooks on Colab."""
    assert CARDS["t4"].usable_bytes / 2**30 == pytest.approx(14.748, rel=0.01)
    assert set(TABLE_CARDS) <= set(CARDS)


def test_no_output_of_a_broken_program_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    assert detect_card() is None
