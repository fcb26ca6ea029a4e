"""What every section of a recipe is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Every number has two bounds: those that are here leave room for whatever a run may need, and none for a typo that
# overflows an int32 or a clock.
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
PositiveFloat = Annotated[float, Field(gt=0, le=1_000_000)]
TokenCount = Annotated[int, Field(ge=1, le=1_048_576)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # numpy's
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
# YAML gives lists; pydantic's strict mode would refuse them for a tuple.
Names = Annotated[tuple[NonEmpty, ...], Field(strict=False)]


class Section(BaseModel):
    """Frozen, strict, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)
