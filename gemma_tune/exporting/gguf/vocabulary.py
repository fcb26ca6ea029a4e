"""Gemma's tokenizer.json as llama.cpp's lists of tokens, scores and types, without transformers.

llama.cpp's "llama" tokenizer joins, again and again, the adjacent pair whose joined text is the piece of the highest
score. A BPE tokenizer joins the pair of the lowest rank. The two are one when a piece's score is minus the rank of the
first merge that makes it, and when every split of a piece into two pieces is a merge, as in every tokenizer that was
converted from SentencePiece. That, and each other thing the lists cannot say, is checked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json_object
from gemma_tune.errors import ExportError, ModelError
from gemma_tune.models.safetensors import GENERATION_CONFIG_FILE, read_chat_template
from gemma_tune.models.token_ids import ids_beyond

_SPACE = "▁"
_TURN_MARKERS = ("<start_of_turn>", "<end_of_turn>")
_NEVER_MERGED = -1e9
_UNSET_IN_MODEL = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


class TokenType(IntEnum):
    """As in ggml's `llama_token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GgufVocabulary:
    """One entry for each row of the embedding; rows without a token are UNUSED. The chat template is Jinja."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[TokenType, ...]
    special_ids: Mapping[str, int]  # of bos, eos, unk; where it has them pad, mask, eot (the end of a turn)
    chat_template: str | None
    notes: tuple[str, ...]


def read_vocabulary(directory: Path, *, num_rows: int) -> GgufVocabulary:
    """Read the tokenizer of a model whose embedding has `num_rows` rows.

    Needs 0.25 GB for Gemma's 262,144 pieces while it reads. Raises ExportError when llama.cpp would cut a text
    into other tokens, or would abort on one.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ExportError(f"{directory}: no tokenizer.json", hint="copy the tokenizer of the model there")
    tokenizer = read_json_object(path, error=ModelError)
    config = read_json_object(directory / "tokenizer_config.json", error=ModelError)
    added: list[dict[str, Any]] = [
        token
        for token in tokenizer.get("added_tokens") or []
        if token["id"] < num_rows or ids_beyond([(token["content"], token["id"])], num_rows=num_rows)
    ]
    _refuse_other_forms(tokenizer, added, path)
    pieces: dict[str, int] = tokenizer["model"]["vocab"]
    id_of = _ids(pieces, added, num_rows, path)
    _refuse_missing_bytes(id_of, path)
    plain = pieces.keys() - {token["content"] for token in added if token["content"].strip(_SPACE)}
    ranks = _ranks(tokenizer["model"]["merges"], plain, pieces, path)

    tokens = [f"[PAD{index}]" for index in range(num_rows)]
    scores = [_NEVER_MERGED] * num_rows
    types = [TokenType.UNUSED] * num_rows
    for piece, index in pieces.items():
        tokens[index] = piece
        types[index] = TokenType.BYTE if _is_byte(piece) else TokenType.NORMAL
        scores[index] = -float(ranks[piece]) if piece in ranks else _NEVER_MERGED
    for token in added:
        piece, index = token["content"], token["id"]
        # Runs of spaces are cut by merging like other text: as USER_DEFINED pieces more strings came out different.
        if piece in pieces and not piece.strip(_SPACE):
            continue
        tokens[index] = piece
        types[index] = TokenType.CONTROL if _is_control(token) else TokenType.USER_DEFINED
    unknown_id = id_of[_named(tokenizer["model"].get("unk_token"), "unk_token", id_of, path)]
    types[unknown_id] = TokenType.UNKNOWN
    if len(set(tokens)) != num_rows:
        raise _cannot_say(path, "a token is named [PADn], which is the name of an unused row")

    special = {**_special_ids(config, id_of, directory), "unk": unknown_id}
    if "<end_of_turn>" in id_of:
        special["eot"] = id_of["<end_of_turn>"]
    _refuse_other_ends(tokenizer.get("post_processor"), config, path)
    return GgufVocabulary(
        tokens=tuple(tokens),
        scores=tuple(scores),
        types=tuple(types),
        special_ids=special,
        chat_template=read_chat_template(directory),
        notes=tuple(_stop_notes(directory, {special["eos"], special.get("eot")})),
    )


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    """Add the lists and the special tokens to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    for name in ("bos", "eos", "unk", "pad", "mask", "eot"):
        if name in vocabulary.special_ids:
            getattr(writer, f"add_{name}_token_id")(vocabulary.special_ids[name])
    # What the tokenizer itself adds does not count: training puts one <bos> before every row, and asks with no <eos>.
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # llama.cpp's default for this kind of tokenizer is true, which Gemma never is.
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _cannot_say(path: Path, what: str) -> ExportError:
    return ExportError(f"{path}: {what}", hint="export `merged-16bit` instead; it keeps tokenizer.json as it is")


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _is_control(token: Mapping[str, Any]) -> bool:
    """Whether a token stands for no text: older Gemma files do not mark turn markers and unused tokens as special."""
    piece = token["content"]
    return token["special"] or piece in _TURN_MARKERS or (piece.startswith("<unused") and piece.endswith(">"))


def _refuse_other_forms(tokenizer: Mapping[str, Any], added: list[dict[str, Any]], path: Path) -> None:
    """Refuse what is not Gemma's form: BPE with byte pieces over text whose spaces became `▁`, and nothing else."""
    model, split = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer")
    wrong = [f"model.{key}" for key, value in {"type": "BPE", "byte_fallback": True}.items() if model.get(key) != value]
    wrong += [f"model.{key}" for key in _UNSET_IN_MODEL if model.get(key)]
    if tokenizer.get("normalizer") != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
        wrong.append("normalizer")
    # A split at spaces does nothing any more: the normalizer has replaced them.
    if split is not None and (split.get("type"), split.get("pattern")) != ("Split", {"String": " "}):
        wrong.append("pre_tokenizer")
    if wrong:
        what = f"{', '.join(wrong)} is not as in Gemma's tokenizer; llama.cpp would cut texts into other tokens"
        raise _cannot_say(path, what)
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags:
            what = f"the added token {token['content']!r} has {', '.join(flags)}, which a GGUF cannot say"
            raise _cannot_say(path, what)


def _ids(pieces: Mapping[str, int], added: list[dict[str, Any]], num_rows: int, path: Path) -> dict[str, int]:
    """Text of every token -> its id, one for each and below `num_rows`; llama.cpp aborts when two ids have one text."""
    id_of = dict(pieces)
    for token in added:
        piece, index = token["content"], token["id"]
        if id_of.setdefault(piece, index) != index:
            raise _cannot_say(path, f"token {piece!r} has two ids, {id_of[piece]} and {index}")
    beyond = [piece for piece, index in id_of.items() if index >= num_rows]
    if beyond:
        raise ExportError(
            f"{path}: token {beyond[0]!r} has id {id_of[beyond[0]]}, the embedding has {num_rows} rows",
            hint="the tokenizer was extended: resize the embedding to it and train it, or remove the added tokens",
        )
    owner: dict[int, str] = {}
    for piece, index in id_of.items():
        if (first := owner.setdefault(index, piece)) != piece:
            raise _cannot_say(path, f"tokens {first!r} and {piece!r} have one id, {index}")
    return id_of


def _refuse_missing_bytes(id_of: Mapping[str, int], path: Path) -> None:
    """llama.cpp aborts the process on a character that no piece spells. Older Gemmas have `\\t` for `<0x09>`."""
    missing = [
        f"<0x{byte:02X}>"
        for byte in range(256)
        if f"<0x{byte:02X}>" not in id_of and not (byte < 128 and chr(byte) in id_of)
    ]
    if missing:
        what = f"{len(missing)} of the 256 byte pieces are missing: {', '.join(missing[:3])}"
        raise _cannot_say(path, f"{what}; llama.cpp aborts on a character that no piece spells")


def _ranks(merges: list[Any], plain: set[str], pieces: Mapping[str, int], path: Path) -> dict[str, int]:
    """Piece -> rank of the first merge that makes it; refuses a tokenizer in which a split of a piece is no merge."""
    ranks: dict[str, int] = {}
    num_merges_of: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        # Files up to tokenizers 0.19 join the two by a space.
        piece = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        ranks.setdefault(piece, rank)
        num_merges_of[piece] = num_merges_of.get(piece, 0) + 1
    # Merges are distinct and each is a split of its piece, so comparing the numbers compares the sets.
    for piece in plain:
        if _is_byte(piece):
            continue
        num_splits = sum(piece[:cut] in pieces and piece[cut:] in pieces for cut in range(1, len(piece)))
        if num_splits != num_merges_of.get(piece, 0):
            found = f"in {num_splits} ways, but there are {num_merges_of.get(piece, 0)} merges for it"
            what = f"{piece!r} can be made of two pieces {found}; llama.cpp would cut some texts into other tokens"
            raise _cannot_say(path, what)
    return ranks


def _named(token: Any, key: str, id_of: Mapping[str, int], where: Path) -> str:
    """The text of a token that a config names, plain or as an object with `content`; it must be in the vocabulary."""
    text = _text(token)
    if not isinstance(text, str) or text not in id_of:
        raise ExportError(
            f"{where}: {key} is {text!r}, which is not in the vocabulary",
            hint="use the tokenizer.json and tokenizer_config.json that were saved together",
        )
    return text


def _special_ids(config: Mapping[str, Any], id_of: Mapping[str, int], directory: Path) -> dict[str, int]:
    """Ids by short name, such as bos. Every token that tokenizer_config.json adds must be in tokenizer.json, too."""
    where = directory / "tokenizer_config.json"
    ids = {}
    for key in ("bos_token", "eos_token", "pad_token", "mask_token"):
        if config.get(key) is not None or key in ("bos_token", "eos_token"):
            ids[key.removesuffix("_token")] = id_of[_named(config.get(key), key, id_of, where)]
    for key in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"):
        given = config.get(key) or []
        for token in given.values() if isinstance(given, Mapping) else given:
            _named(token, key, id_of, where)
    return ids


def _refuse_other_ends(post_processor: Any, config: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer that puts more around a text than <bos> and <eos>."""
    if post_processor is None:
        return
    names = {_text(config.get("bos_token")): "bos", _text(config.get("eos_token")): "eos"}
    parts = [
        names.get(part["SpecialToken"]["id"], "other") if "SpecialToken" in part else "text"
        for part in post_processor.get("single", [{"SpecialToken": {"id": None}}])
    ]
    if parts not in (["text"], ["bos", "text"], ["text", "eos"], ["bos", "text", "eos"]):
        what = f"the post-processor does not put <bos> before or <eos> after a text, but {', '.join(parts)}"
        raise _cannot_say(path, what)


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _stop_notes(directory: Path, stop_ids: set[int | None]) -> Iterator[str]:
    """Stop tokens of generation_config.json that a GGUF has no field for."""
    path = directory / GENERATION_CONFIG_FILE
    if not path.is_file():
        return
    given = read_json_object(path, error=ModelError).get("eos_token_id")
    wanted = given if isinstance(given, list) else [given]
    left_out = [index for index in wanted if index is not None and index not in stop_ids]
    if left_out:
        told = ", ".join(map(str, left_out))
        yield f"generation_config.json also stops at {told}; a GGUF stops at <eos> and <end_of_turn> only"
