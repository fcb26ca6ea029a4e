from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, replace

import pytest

from gemma_tune.cli.audit import parse_threshold, print_audit, threshold_passed
from gemma_tune.data.look.audit import AuditReport, audit_rows
from gemma_tune.data.look.findings import FINDING_KINDS, SEVERITIES, AuditFinding, AuditRow, Places
from gemma_tune.errors import DataError
from gemma_tune.terminal import Terminal
from gemma_tune.yaml_io import read_yaml

DRAW = random.Random(11)
SENTENCE = " ".join(
    DRAW.choice(["river", "baker", "tall", "walks", "bread", "seven", "under", "stone"]) for _ in range(50)
)


def _row(number: int, instruction: str, response: str, *, side: str = "train", **changes: object) -> AuditRow:
    row = AuditRow(
        where=f"rows.jsonl:{number}",
        side=side,  # type: ignore[arg-type]
        response=response,
        key=hashlib.blake2b(f"{instruction}\0{response}".encode(), digest_size=16).digest(),
        texts=(("instruction", instruction), ("response", response)),
        learned=(False, True),
        category="open_qa",
        num_tokens=40,
        num_supervised=10,
        control_strings=0,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def _audit(*rows: AuditRow, bad: list[tuple[str, str]] | None = None, max_seq_tokens: int = 128) -> AuditReport:
    return audit_rows(rows, bad=bad or [], max_seq_tokens=max_seq_tokens)


def _kinds(report: AuditReport) -> dict[str, AuditFinding]:
    return {found.kind: found for found in report.findings}


def test_sound_rows_have_no_findings() -> None:
    report = _audit(
        _row(1, "Who bakes the bread in town?", "The baker does."), _row(2, "What flows?", "The river Elm.")
    )
    assert report.findings == ()
    assert (report.rows, report.train_rows, report.eval_rows, report.bad_rows) == (2, 2, 0, 0)
    assert (report.tokens, report.supervised_tokens, report.supervised_share) == (80, 20, 0.25)
    assert report.categories == (("open_qa", 2),)


def test_no_rows_at_all() -> None:
    report = _audit()
    assert report.findings == () and report.length_bins == () and report.length_max == 0


def test_duplicates_and_leaks() -> None:
    words = SENTENCE.split()
    nearly = " ".join([*words[:20], "changed", *words[21:]])
    report = _audit(
        _row(1, "Say it.", SENTENCE),
        _row(2, "Say it.", SENTENCE),
        _row(3, "Say it.", nearly),
        _row(4, "Who is it?", "A duck it is."),
        _row(5, "Who is it?", "A duck it is.", side="eval"),
        _row(6, "Say it.", nearly.replace("changed", "other"), side="eval"),
        _row(7, "Where is it?", "In the far valley.", side="eval"),
    )
    found = _kinds(report)
    assert set(found) == {"duplicate_exact", "duplicate_near", "leak_exact", "leak_near"}
    assert found["duplicate_exact"].samples == (("rows.jsonl:2", "the same as rows.jsonl:1"),)
    assert found["duplicate_exact"].option == "data.clean.drop_duplicates=exact"
    assert found["duplicate_near"].samples == (("rows.jsonl:3", "nearly the same as rows.jsonl:1"),)
    assert found["leak_exact"].samples == (("rows.jsonl:5", "the same as rows.jsonl:4 of the training rows"),)
    assert found["leak_near"].places == "rows.jsonl: 6"
    assert [one.severity for one in report.findings] == ["error", "error", "warning", "warning"]


def test_personal_data_is_told_without_the_value() -> None:
    secret = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
    values = [
        "jane.doe@example.com",
        "4111111111111111",
        "DE89370400440532013000",
        "93.184.216.34",
        "+49 30 901820",
        secret,
    ]
    rows = [_row(number, f"Keep this: {value}", "I will keep it.") for number, value in enumerate(values, start=1)]
    report = audit_rows(rows, bad=[("rows.jsonl:9", f"no such thing {values[0]}")], max_seq_tokens=128)
    found = _kinds(report)
    assert {kind for kind in found if kind.startswith("pii_")} == {
        "pii_email", "pii_card", "pii_iban", "pii_ip", "pii_phone", "pii_secret",
    }  # fmt: skip
    assert found["pii_email"].samples == (("rows.jsonl:1", "instruction: e-mail address j… (20 characters)"),)
    assert found["pii_email"].option == "data.clean.pii=mask"
    assert found["pii_secret"].severity == "error"
    text = json.dumps(asdict(report))
    assert not any(value in text for value in values)


def test_answers_lengths_and_control_tokens() -> None:
    report = _audit(
        _row(1, "Is it?", "Yes"),
        _row(2, "Is it not?", "  \n"),
        _row(3, "Tell all.", "It is long.", num_tokens=300),
        _row(4, "Say <eos> twice.", "It is <eos> <eos>.", control_strings=3),
    )
    found = _kinds(report)
    assert found["one_word_answer"].severity == "info" and found["one_word_answer"].places == "rows.jsonl: 1"
    assert found["blank_answer"].places == "rows.jsonl: 2"
    assert found["too_long"].option == "data.max_seq_tokens=300"
    assert found["control_tokens"].samples == (("rows.jsonl:4", "3 control tokens"),)


def test_encoding_and_citations() -> None:
    report = _audit(
        _row(1, "Where is the CafÃ©?", "In the town."),
        _row(2, "It opened in 1901.[1][2] When did it open?", "In 1901."),
    )
    found = _kinds(report)
    assert found["encoding"].option == "data.clean.fix_encoding=true"
    assert found["citation_marks"].severity == "info"
    assert found["citation_marks"].samples == (("rows.jsonl:2", "instruction: [1] and 1 more"),)
    in_answer = _kinds(_audit(_row(1, "When did it open?", "It opened in 1901.[1]")))
    assert in_answer["citation_marks"].severity == "warning"


def test_rows_that_cannot_be_used() -> None:
    report = _audit(
        bad=[
            ("rows.jsonl:1", "the response is empty"),
            ("rows.jsonl:2", "message 2: the assistant's answer is empty"),
            ("rows.jsonl:3", "the model's chat template refuses it: Conversation roles must alternate"),
            ("rows.jsonl:4", "the last message is from 'user': there is no answer to learn"),
            ("rows.jsonl:5", "instruction is missing"),
        ]
    )
    assert {kind: found.places for kind, found in _kinds(report).items()} == {
        "empty_answer": "rows.jsonl: 1-2",
        "role_order": "rows.jsonl: 3-4",
        "unusable": "rows.jsonl: 5",
    }
    assert report.bad_rows == 5


def test_languages_at_a_glance() -> None:
    english = "The baker of the small town bakes fresh bread every morning before the others wake up."
    german = "Der Bäcker der kleinen Stadt backt jeden Morgen frisches Brot, bevor die anderen aufwachen."
    report = _audit(*(_row(n, f"{english} {n}", "Yes, he does.") for n in range(6)), _row(8, german, "Das stimmt so."),
                    _row(9, german + " Jawohl.", "Das stimmt so."))  # fmt: skip
    assert report.languages == (("en", 6), ("de", 2))
    assert _kinds(report)["languages"].summary.endswith("en 75%, de 25%")


def test_length_bins_hold_every_row_once() -> None:
    lengths = [1, 16, 17, 24, 25, 100, 128, 129, 1000]
    rows = [
        _row(n, f"Question number {n}?", f"Answer {n} it is.", num_tokens=length) for n, length in enumerate(lengths)
    ]
    report = _audit(*rows, max_seq_tokens=2048)
    assert sum(one.count for one in report.length_bins) == len(lengths)
    assert all(one.high + 1 == two.low for one, two in zip(report.length_bins, report.length_bins[1:], strict=False))
    assert report.length_bins[0].high == 16 and report.length_bins[-1].high == 1024
    assert (report.length_p50, report.length_p99, report.length_max) == (25, 1000, 1000)


def test_samples_are_few_and_places_are_all() -> None:
    report = _audit(*(_row(n, f"Question {n}?", "Yes") for n in range(1, 101)))
    found = _kinds(report)["one_word_answer"]
    assert (found.count, len(found.samples), found.places) == (100, 20, "rows.jsonl: 1-100")


def test_compact_places() -> None:
    places = ["a.jsonl:3", "a.jsonl:5", "a.jsonl:4", "owner/name[train]:9", "b.parquet[0]", "b.parquet[2]", "elsewhere"]
    collected = Places()
    for place in places:
        collected.add(place)
    assert collected.compact() == "a.jsonl: 3-5; owner/name[train]: 9; b.parquet: 0, 2; elsewhere"


def test_progress_and_determinism() -> None:
    rows = [_row(n, f"Question {n}?", "Yes it is.") for n in range(1200)]
    told: list[tuple[str, int, int]] = []
    first = audit_rows(rows, bad=[], max_seq_tokens=64, on_progress=lambda *step: told.append(step))
    steps = [(500, 1200), (1000, 1200), (1200, 1200)]
    assert told == [(what, *step) for what in ("rows compared", "rows searched") for step in steps]
    assert audit_rows(rows, bad=[], max_seq_tokens=64) == first


def test_kinds_and_severities_are_declared() -> None:
    report = _audit(_row(1, "Write to a.b@example.com", "Yes"), bad=[("x:1", "odd")])
    assert {found.kind for found in report.findings} <= set(FINDING_KINDS)
    assert {found.severity for found in report.findings} <= set(SEVERITIES)


@pytest.mark.parametrize(
    ("fail_on", "passed"),
    [
        ("error", False),
        ("warning", True),
        ("one_word_answer=3", False),
        ("one_word_answer=2", True),
        ("pii_email=1", True),
        ("leak_exact=1", False),
    ],
)
def test_threshold(fail_on: str, passed: bool) -> None:
    report = _audit(_row(1, "Write to a.b@example.com", "Yes"), _row(2, "Is it?", "No"))
    assert threshold_passed(report, parse_threshold(fail_on)) is passed


@pytest.mark.parametrize("fail_on", ["", "info", "pii_mail=3", "pii_email", "pii_email=", "pii_email=0", "pii_email=²"])
def test_threshold_that_is_not_known(fail_on: str) -> None:
    with pytest.raises(DataError) as error:
        parse_threshold(fail_on)
    assert "pii_email" in (error.value.hint or "")


def test_printed_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = _audit(
        _row(1, "Write to a.b@example.com", "Yes"),
        _row(2, "Is it?", "No"),
        _row(3, "Is it?", "No", side="eval"),
        _row(4, "Long [bold]one[/]?", "It is.", num_tokens=999),
        bad=[("rows.jsonl:5", "odd [red] \x1b[2J text")],
    )
    print_audit(Terminal(), report)
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    assert out.index("leak_exact") < out.index("pii_email") < out.index("one_word_answer")
    assert "data.clean.pii=mask" in out and "odd [red]" in out and "over data.max_seq_tokens" in out
    assert "a.b@example.com" not in out


def test_printed_report_without_findings(capsys: pytest.CaptureFixture[str]) -> None:
    print_audit(Terminal(), _audit())
    assert "nothing was found" in capsys.readouterr().out


def _distinct(number: int) -> str:
    return " ".join(random.Random(number).choices(SENTENCE.split(), k=12))


@pytest.mark.parametrize(
    ("prompt", "answer", "kind", "severity", "option"),
    [
        ("{}", "{}\n###eos_token###", "shared_answer_tail", "warning", 'data.clean.strip_tails=["###eos_token###"]'),
        ("{}", "Sure! Here is {}", "shared_answer_head", "info", 'data.clean.strip_heads=["Sure! Here is"]'),
        ("{}\n\n### Response:", "{}", "shared_prompt_tail", "warning", 'data.clean.strip_tails=["### Response:"]'),
        ("[INST] {}", "{}", "shared_prompt_head", "warning", 'data.clean.strip_heads=["[INST]"]'),
    ],
)
def test_what_rows_share_is_found_with_its_share(
    prompt: str, answer: str, kind: str, severity: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_row(at, prompt.format(_distinct(at)), answer.format(_distinct(-at - 1))) for at in range(40)]
    rows += [_row(at, _distinct(at), _distinct(-at - 1)) for at in range(40, 50)]
    report = _audit(*rows)
    assert [(one.kind, one.severity, one.count, one.option) for one in report.findings] == [
        (kind, severity, 40, option)
    ]
    assert "80% of all" in report.findings[0].summary
    assert not any(_distinct(number)[:30] in json.dumps(asdict(report)) for number in range(-50, 50))
    print_audit(Terminal(), report)
    pasted = capsys.readouterr().out.rpartition("not meant:\n")[2]
    key, _, value = option.partition("=")
    loaded, _ = read_yaml(pasted, label="pasted", error=DataError)
    assert loaded == {"data": {"clean": {key.rpartition(".")[2]: json.loads(value)}}}


def test_a_shared_signature_is_told_without_its_address() -> None:
    rows = [_row(at, _distinct(at), f"{_distinct(-at - 1)}\nKind regards, joe@example.com") for at in range(40)]
    (found,) = [one for one in _audit(*rows).findings if one.kind == "shared_answer_tail"]
    assert found.option == 'data.clean.strip_tails=["Kind regards, [EMAIL]"]' and found.count == 40
    assert "joe@example.com" not in repr(_audit(*rows))
