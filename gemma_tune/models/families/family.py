"""What sets one family of Gemmas apart: facts that the reader of config.json, planner, engines and exports look up.

The facts of each family are in a TOML file of this folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.paths import read_table

# How releases of transformers have named the text model of a multimodal checkpoint: (beginning, what it is here).
_MULTIMODAL_RENAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
)
_COMMON_DEFAULTS = read_table("models/families/common.toml")


@dataclass(frozen=True)
class GgufFacts:
    """What llama.cpp computes for a family (src/models/<architecture>.cpp at 0c1e57098), whatever the config says."""

    architecture: str  # llama.cpp's name
    full_attention_every: int  # every n-th layer attends to everything, the others within the sliding window
    ties_head: bool  # the head is the embedding; there is no other
    softcaps: bool | None = None  # both soft caps are applied (True) or neither (False); None where no config has them
    scales_queries: bool = False  # the file has no field for the scale of the scores, sqrt(head_dim) is taken
    num_layers_scaled_by_width: int | None = None  # the model of this many layers takes sqrt(width / heads) instead
    scales_positions: bool = False  # the positions of full attention can be scaled linearly


@dataclass(frozen=True)
class Family:
    """One family, which is one TOML file of this folder and one name in `known.FAMILIES`."""

    name: str
    title: str  # what people call it
    # of config.json. One with a `…_text` next to it is multimodal and holds that one as text_config.
    model_types: Sequence[str]
    # what a config leaves out, from transformers 5.17's models/<model_type>/configuration_<model_type>.py
    defaults: Mapping[str, Any]
    # what a model type has as another default than the family
    defaults_of_type: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    full_attention_every: int = 1  # every n-th layer attends to everything, the others within the sliding window
    reads_window_pattern: bool = False  # the config may give another n as `sliding_window_pattern`
    ends_with_full_attention: bool = False  # transformers makes the last layer a full one whatever the file says
    # full-attention layers have a head size and a number of key-value heads of their own
    full_layers_differ: bool = False
    mlp_widths_differ: bool = False  # `intermediate_size` may be a list, one width a layer (MatFormer)
    has_local_rope: bool = False  # sliding layers rotate with a base of their own
    # the scaling in full attention where the config has no `rope_parameters`
    default_rope: Mapping[str, Any] = field(default_factory=dict)
    norm_adds_one: bool = True  # a norm multiplies by 1 + weight
    has_post_norms: bool = True  # there are norms after attention and MLP, too
    has_head_norms: bool = True  # the queries and keys of each head are normed
    # modules for images and audio, which a text run never trains; they, too, have a q_proj
    towers: Sequence[str] = ()
    # beginnings of weight names within the towers that have changed, and what they are here
    tower_renames: Mapping[str, str] = field(default_factory=dict)
    turn_end: str = "<end_of_turn>"  # the token that ends a turn in the family's chat template
    gguf: GgufFacts | None = None  # what llama.cpp computes; None where no GGUF can be written

    def is_multimodal(self, model_type: str) -> bool:
        return f"{model_type}_text" in self.model_types

    @property
    def renames(self) -> tuple[tuple[str, str], ...]:
        """Beginnings of weight names and what they are here, to be applied in this order."""
        if not self.towers:
            return ()
        moved = ((f"model.{tower}.", f"{tower}.") for tower in self.towers)
        return (*_MULTIMODAL_RENAMES, *moved, *self.tower_renames.items())

    def defaults_for(self, model_type: str) -> dict[str, Any]:
        """Return what a config of this type that says nothing means."""
        return {**_COMMON_DEFAULTS, **self.defaults, **self.defaults_of_type.get(model_type, {})}


def read_family(name: str) -> Family:
    """Read `<name>.toml` of this folder."""
    facts = read_table(f"models/families/{name}.toml")
    gguf = facts.pop("gguf", None)
    return Family(**facts, gguf=GgufFacts(**gguf) if gguf else None)
