"""Strings that tokenizers may cut differently, and GGUF files whose tokenizer is another."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PREFIX = "tokenizer.ggml."
# Gets the tokenizer's values by name, lists included, and a function from a token to its id.
Change = Callable[[dict[str, Any], Callable[[str], int]], object]

TRICKY = (
    "", " ", "  ", "   x", "x   ", "a  b", "\n", "\n\n", "\n\n\n\n x", " \n ", "\t", "\t\tx\t", "\r\n",
    "a\u00a0b", "\u2003x", "Once upon a time a duck lived in Applewick.", "UPPER lower MiXeD",
    "don't, it's; we'll!", "1234567890", "3.14159e-10", "€100 £5 ¥7", "naïve façade Ærøskøbing",
    "Grüße aus Köln", "Привет, мир", "你好，世界", "こんにちは", "안녕하세요", "مرحبا", "שלום", "नमस्ते", "🙂",
    "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "e\u0301 is é", "\u200b\u200d\ufeff", "\ufffd", "x\x01\x1f\x7f", "<eos>", "a<bos>b",
    "<start_of_turn>user\n", "<end_of_turn>\n<end_of_turn>", "<start_of_turn", "<unk> <pad> <mask>",
    "<unused7>x", "<0x41>", "<|im_end|>", "</s>", "[INST]", "def f(x):\n\treturn x ** 2  # square\n",
    "    if a:\n        b()\n", '{"a": [1, 2, {"b": null}]}', "<table><tr><td>1</td></tr>",
    "https://example.org/a?b=c&d=%20e", "C:\\dir\\file.txt", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "." * 50,
    " " * 70, "\n" * 70, "▁", "▁under", "a▁b", "ﬁ ﬀ ½ ²", "\U0010ffff", "-- — – ‑",
    "“quotes” ‘single’ «guillemets»",
)  # fmt: skip


def fuzz_strings(num: int) -> list[str]:
    """Strings of words, signs of many scripts, blanks and special tokens. A literal U+2581 is not among them: next to a
    space llama.cpp cuts it in another way."""
    generator = random.Random(20)
    words = ["Mara", "baker", "Ostel", "the", "a", "needs", "and", "The", "lighthouse", "whale", "12", "7", "x"]
    blanks = [" ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", " \n", "\r\n", " " * 9]
    special = ["<eos>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<unused3>", "<end_of", "<0x0A>"]
    signs = list("abcXYZ019.,;:!?-_()[]{}<>|/\\'\"@#$%^&*+=~`éßñøŁжשعह中あ한😀🏽\u200d\u0301€½")

    def part() -> str:
        kind = generator.random()
        if kind < 0.1:
            return chr(generator.choice([*range(0x20, 0x2580), *range(0x2590, 0xD800), *range(0xE000, 0x20000)]))
        return generator.choice(words if kind < 0.4 else blanks if kind < 0.6 else special if kind < 0.65 else signs)

    return ["".join(part() for _ in range(generator.randint(1, 30))) for _ in range(num)]


def with_other_tokenizer(path: Path, output: Path, change: Change) -> Path:
    """A copy of a GGUF, written by the `gguf` package, after `change` of the tokenizer's values."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = {key.removeprefix(_PREFIX): field.contents() for key, field in fields.items() if key.startswith(_PREFIX)}
    change(values, list(values["tokens"]).index)
    writer = gguf.GGUFWriter(output, fields.pop("general.architecture").contents())
    for key, field in fields.items():
        name = key.removeprefix(_PREFIX)
        if key.startswith(_PREFIX) and name not in values:
            continue
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, values[name] if name in values else field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output
