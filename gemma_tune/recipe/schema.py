"""The recipe: every setting of a run, declared once.

A recipe is a YAML file with the sections below. Unknown keys are refused, values are bounded, and a loaded recipe never
changes. A setting that depends on the machine is `auto` here and is decided, with its reason, when the run starts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
# YAML gives lists; pydantic's strict mode would refuse them for a tuple.
Names = Annotated[tuple[NonEmpty, ...], Field(strict=False)]

LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RUN_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"


class Section(BaseModel):
    """Frozen, strict, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSection(Section):
    """Which Gemma, and how it is loaded."""

    name: NonEmpty = Field(
        "gemma-tiny",
        description="A registry name (`gemma-tune models list`), a directory with a Hugging Face Gemma, or a hub "
        "id owner/name.",
    )
    revision: NonEmpty | None = Field(
        None, description="Hub commit, tag or branch; null takes the newest and records its commit."
    )
    engine: Literal["auto", "unsloth", "transformers"] = Field(
        "auto", description="What loads and patches the model; auto takes unsloth where it works and says why."
    )
    load_in_4bit: bool = Field(
        True, description="NF4 weights with double quantisation (QLoRA); about 0.56 bytes a parameter."
    )
    load_in_8bit: bool = Field(
        False, description="LLM.int8() weights, 1 byte a parameter; CUDA only, excludes load_in_4bit."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Compute precision; auto decides by compute capability (T4: float16 weights with float32 islands).",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention implementation; auto leaves the choice to the engine (eager for Gemma 2's "
        "soft-capping).",
    )


class LoraSection(Section):
    """The adapter that is trained."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank r of the update B·A.")
    alpha: PositiveFloat = Field(
        16, description="The update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."
    )
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input; 0 keeps Unsloth's fused kernels.")
    targets: Names = Field(
        LORA_PROJECTIONS,
        min_length=1,
        description="Names of the linear modules that get an adapter; ['all-linear'] takes every linear layer but "
        "the head.",
    )
    use_rslora: bool = Field(False, description="Rank-stabilised scaling (arXiv:2312.03732).")
    use_dora: bool = Field(
        False, description="Weight-decomposed adaptation (arXiv:2402.09353); slower, a little more memory."
    )
    init: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default",
        description="How A and B start: default is Kaiming A and zero B, as in the LoRA paper's reference code.",
    )
    modules_to_save: Names = Field(
        (), description="Whole modules trained and stored beside the adapter, e.g. ['embed_tokens']."
    )


class DataSection(Section):
    """The rows, and how a row becomes a prompt and a response."""

    source: NonEmpty = Field(
        description="A .jsonl/.json/.csv/.parquet file, a hub id owner/name, or `tiny-world`, the rows that ship "
        "with gemma-tune."
    )
    subset: NonEmpty | None = Field(None, description="Configuration name of a hub dataset.")
    split: NonEmpty = Field("train", description="Split of a hub dataset that is trained on.")
    revision: NonEmpty | None = Field(None, description="Commit, tag or branch of a hub dataset.")
    template: NonEmpty = Field(
        "dolly",
        description="A template of data_templates/ by name (dolly, dolly-chat, alpaca, chat, completion), or a "
        "path to a .yaml file.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Template field → column of the rows, for rows that have other names."
    )
    max_seq_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        description="Longest row in tokens, prompt and response and stop token together. There is no default: a "
        "hidden one eats answers."
    )
    too_long: Literal["drop", "truncate_prompt", "refuse"] = Field(
        "drop",
        description="What happens to a longer row; the answer is never cut, and the counts are shown before training.",
    )
    train_on: Literal["response", "all"] = Field(
        "response", description="Loss on the response and its stop token, or on every token but the first."
    )
    eval_source: NonEmpty | None = Field(
        None, description="Rows for evaluation from another source; excludes eval_split."
    )
    eval_split: NonEmpty | None = Field(
        None, description="Split of the same source for evaluation (tiny-world brings its own)."
    )
    eval_fraction: Fraction = Field(
        0.05,
        description="Share of distinct rows held out when there is neither eval_source nor eval_split; 0 evaluates "
        "nothing.",
    )
    max_train_rows: PositiveInt | None = Field(None, description="Train on the first N rows after shuffling.")
    max_eval_rows: PositiveInt | None = Field(200, description="Evaluate on at most N rows.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the split and of the order.")


class TrainingSection(Section):
    """The optimisation."""

    epochs: PositiveFloat = Field(1.0, description="Passes over the training rows; not used when max_steps is given.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; replaces epochs.")
    batch_size: PositiveInt = Field(4, description="Rows per device and forward pass.")
    gradient_accumulation: PositiveInt = Field(
        1, description="Forward passes per optimizer step; the loss is weighted by token."
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(2e-4, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Decoupled weight decay on the adapter's weights."
    )
    warmup_fraction: Fraction = Field(0.03, description="Share of the steps with a linearly rising learning rate.")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = Field(
        "linear", description="How the learning rate falls after the warm-up."
    )
    optimizer: Literal[
        "adamw", "adamw_fused", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"
    ] = Field("adamw", description="8-bit and paged optimizers are bitsandbytes' and save memory on a GPU.")
    adam_beta1: Fraction = Field(0.9, description="AdamW's first-moment decay.")
    adam_beta2: Fraction = Field(0.999, description="AdamW's second-moment decay.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Gradient norm clipping; 0 switches it off.")
    neftune_alpha: PositiveFloat | None = Field(
        None, description="Noise on the embeddings while training (arXiv:2310.05914)."
    )
    gradient_checkpointing: Literal["off", "on", "unsloth"] = Field(
        "unsloth",
        description="Recompute activations to save memory; unsloth also offloads them (as `on` with the "
        "transformers engine).",
    )
    group_by_length: bool = Field(
        True, description="Batches of rows of similar length: less padding, so more real tokens a second."
    )
    save_every_steps: PositiveInt | None = Field(
        None, description="Steps between checkpoints; null saves at every tenth of the run."
    )
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="Newest checkpoints kept; at least 2.")
    early_stop_patience: PositiveInt | None = Field(
        None, description="Stop after N evaluations without a lower eval loss and keep the best adapter."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of adapter initialisation, dropout and batch order.")


class EvaluationSection(Section):
    """What is measured on the held-out rows."""

    every_steps: PositiveInt | None = Field(
        None, description="Steps between eval losses while training; null evaluates at the end only."
    )
    batch_size: PositiveInt | None = Field(None, description="Rows per forward pass; null takes training.batch_size.")
    exact_match: bool = Field(
        True, description="Answer the eval rows greedily before and after training and compare the strings."
    )
    max_exact_match_rows: PositiveInt = Field(100, description="Eval rows answered for the exact match.")
    max_new_tokens: PositiveInt = Field(128, description="Longest answer in tokens.")
    num_questions: Annotated[int, Field(ge=0, le=20)] = Field(
        3, description="Eval rows whose answers are printed before and after."
    )


class ExportSection(Section):
    """What is written after training, beside the adapter."""

    merge: bool = Field(False, description="Write the merged 16-bit model into RUN/merged after training.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Precision of the merged weights; auto keeps the base's."
    )
    max_shard_gb: PositiveFloat = Field(5.0, description="Largest safetensors file of a merged model, in 10^9 bytes.")


class LoggingSection(Section):
    """What is told while training."""

    every_steps: PositiveInt = Field(1, description="Steps between two lines of metrics.jsonl.")
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Field(strict=False)] = Field(
        (), description="Experiment trackers; none unless named, and none ever asks a question."
    )


class RunSection(Section):
    """Where the run lives."""

    name: Annotated[str, StringConstraints(pattern=RUN_NAME_PATTERN)] | None = Field(
        None, description="Name of the run directory; null takes the recipe's name and the next free number."
    )
    output_dir: NonEmpty = Field(
        "runs", description="Directory that holds the runs, relative to where the command is run."
    )


class Recipe(Section):
    """A whole run. Only `data` has fields without a default."""

    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    training: TrainingSection = Field(default_factory=TrainingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    export: ExportSection = Field(default_factory=ExportSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    run: RunSection = Field(default_factory=RunSection)
