"""The tests' own Go templates against what real Go printed (text/template of Go 1.19, filled as Ollama does it)."""

from __future__ import annotations

import pytest

from tests.exporting import go_template as go

TURNS = "{{ if .System }}S={{ .System }}|{{ else }}none|{{ end }}{{ .Prompt }}>{{ .Response }}<end>\n"
LAST = (
    '{{ $q := "none" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $q = .Content }}{{ else }}[{{ .Content }}]'
    "{{ end }}{{ end }}{{ $q }}\n"
)


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(contents)
    ]


@pytest.mark.parametrize(
    ("template", "messages", "printed_by_go"),
    [
        (TURNS, talk("One?"), "none|One?>"),
        (TURNS, talk("One?", system="Sys"), "S=Sys|One?>"),
        (TURNS, talk("One?", "1.", "{{ .Prompt }}"), "none|One?>1.<end>\nnone|{{ .Prompt }}>"),
        (TURNS, talk("One?", "1.", "Two?", system="Sys"), "S=Sys|One?>1.<end>\nnone|Two?>"),
        (LAST, talk("One?"), "One?\n"),
        (LAST, talk("One?", "1.", "Two?", system="Sys"), "[Sys][1.]Two?\n"),
        (
            '{{ .Prompt }} } }} {{ "{{" }} {{ "\\U00000022\\U0000005c" }}{{ .Response }}',
            talk("One?"),
            'One? } }} {{ "\\',
        ),
        ('a {{ "b }} c" }} d{{ .Response }}', talk("One?", "1.", "Two?"), "a b }} c d1.a b }} c d"),
        ("{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}", talk("One?", "1."), "<user>One?<assistant>1."),
        ("  {{ .System }}{{ .Prompt }}  {{ .Response }}  ", talk("One?", "1.", "Two?"), "  One?  1.    Two?  "),
    ],
)
def test_as_go_prints_it(template: str, messages: list[dict[str, str]], printed_by_go: str) -> None:
    assert go.render_for_ollama(template, messages) == printed_by_go


@pytest.mark.parametrize(
    "template",
    ["{{- .Prompt }}", "{{{ .Prompt }}", "{{ .Prompt | trim }}", "{{ if .System }}{{ .Prompt }}", '{{ "\n" }}'],
)
def test_what_is_not_in_the_subset_raises(template: str) -> None:
    with pytest.raises(AssertionError):
        go.render_for_ollama(template, talk("One?"))


def test_modelfile() -> None:
    """As Ollama's documentation says: comments, any case, one or three quotes, several lines."""
    text = '# about\n\nFROM ./a b.gguf\ntemplate """{{ .Prompt }}\n# text "x" \n"""\nPARAMETER stop "<e> "\n'
    assert go.parse_modelfile(text + "PARAMETER num_ctx 9\nSYSTEM Be brief.\n") == [
        ("FROM", "./a b.gguf"),
        ("TEMPLATE", '{{ .Prompt }}\n# text "x" \n'),
        ("PARAMETER stop", "<e> "),
        ("PARAMETER num_ctx", "9"),
        ("SYSTEM", "Be brief."),
    ]
    assert go.parse_modelfile('SYSTEM "a\u00a0b\u200bc"') == [("SYSTEM", "abc")]
