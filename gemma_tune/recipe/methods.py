"""The training methods: what recipe, rows, planner and report know of each without torch; one row a member."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, SerializationInfo
from pydantic_core import PydanticCustomError, core_schema

from gemma_tune.members import Members
from gemma_tune.recipe.choices import OneOf
from gemma_tune.recipe.section import Section

DEFAULT_METHOD = "sft"
RowKind = Literal["response", "pair", "labelled", "prompt"]
# As messages call what a row of each kind holds.
ROW_KINDS: Mapping[RowKind, str] = {
    "response": "prompts with their responses",
    "pair": "preference pairs (chosen, rejected)",
    "labelled": "responses that are labelled good or bad",
    "prompt": "prompts without responses",
}


class MethodSection(Section):
    """The training method. A method with settings of its own has a subclass that adds them."""

    name: Annotated[str, OneOf(lambda: METHODS)] = Field(
        DEFAULT_METHOD, description="What is learned from the rows: sft, the responses. `method: sft` says the same."
    )


@dataclass(frozen=True)
class MethodMetric:
    """A figure that a method logs."""

    name: str  # in the logs; with `eval_` before it on the eval rows
    better: Literal["higher", "lower"]  # where it should move


@dataclass(frozen=True)
class MethodFacts:
    """A training method."""

    name: str
    about: str  # what it does, for model cards and lists: "… by supervised fine-tuning"
    # what a row holds: a prompt with its `response`, a `pair` of a chosen and a rejected one, a response that is
    # `labelled` good or bad, or the `prompt` alone
    rows: RowKind
    sequences_per_row: int  # sequences that a forward pass computes for a row
    needs_reference: bool  # whether the base without its adapter computes each row, too
    head: Literal["lm", "score"]  # `lm` predicts tokens, `score` gives a number
    generates: bool  # whether the model answers prompts while it is trained
    default_learning_rate: float  # where the recipe gives none
    # what is logged; `watch` is the one that early stopping and the best checkpoint go by
    metrics: tuple[MethodMetric, ...]
    watch: MethodMetric
    location: str  # `module:Class` of the `training.methods.method.Method`
    section: type[MethodSection] = MethodSection  # the keys of the recipe's `method`


_TOKEN_LOSS = MethodMetric("loss", "lower")

METHODS: Members[MethodFacts] = Members(
    "training method",
    [
        MethodFacts(
            name="sft",
            about="supervised fine-tuning",
            rows="response",
            sequences_per_row=1,
            needs_reference=False,
            head="lm",
            generates=False,
            default_learning_rate=2e-4,
            metrics=(_TOKEN_LOSS,),
            watch=_TOKEN_LOSS,
            location="gemma_tune.training.methods.sft:Sft",
        )
    ],
)


def _read_method(value: object) -> MethodSection:
    """Turn a word or a mapping into the section of the method that it names."""
    if isinstance(value, MethodSection):
        return value
    values = {"name": value} if isinstance(value, str) else value
    if not isinstance(values, Mapping):
        raise PydanticCustomError("method_type", "must be the name of a method, or a mapping with its name")
    name = str(values.get("name", DEFAULT_METHOD))
    section = METHODS[name].section if name in METHODS else MethodSection
    for key in values.keys() - section.model_fields:
        owners = [facts.name for facts in METHODS.values() if key in facts.section.model_fields]
        of = f"is a key of the method {', '.join(owners)}" if owners else "is unknown"
        keys = ", ".join(section.model_fields)
        told = f"{key} {of}, and the method {name} has: {keys}"
        raise PydanticCustomError("method_key", "{told}", {"told": told})
    return section.model_validate(values)


class _OneOfMethods:
    """Has pydantic look the method up when a recipe is loaded, so that a member that was added is known."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        def dump(method: MethodSection, info: SerializationInfo) -> dict[str, Any]:
            return method.model_dump(mode=info.mode)

        return core_schema.no_info_plain_validator_function(
            _read_method, serialization=core_schema.plain_serializer_function_ser_schema(dump, info_arg=True)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        sections = []
        for name, facts in METHODS.items():
            section = facts.section.model_json_schema()
            section["properties"]["name"]["const"] = name
            sections.append(section)
        return {"anyOf": [{"enum": list(METHODS)}, *sections]}


AnyMethod = Annotated[MethodSection, _OneOfMethods()]
