"""The recipe: every setting of a run, declared once.

A recipe is a YAML file with the sections below. Unknown keys are refused, values are bounded, and a loaded recipe never
changes. A setting that depends on the machine is `auto` here and is decided, with its reason, when the run starts.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.recipe.choices import OneOf
from gemma_tune.recipe.methods import METHODS, AnyMethod, MethodFacts, MethodSection
from gemma_tune.recipe.section import Fraction, Names, NonEmpty, PositiveFloat, PositiveInt, Section, Seed, TokenCount

EngineName = Annotated[str, OneOf(lambda: ("auto", *ENGINES))]
CheckpointingName = Annotated[
    str, OneOf(lambda: ("off", "on", *(each.own_checkpointing for each in ENGINES.values() if each.own_checkpointing)))
]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]

LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RUN_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"


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
    engine: EngineName = Field(
        "auto", description="What loads and patches the model; auto takes unsloth where it works and says why."
    )
    adapter: NonEmpty | None = Field(
        None,
        description="A run, or a directory with an adapter in PEFT's format, whose weights the training starts from; "
        "null starts a fresh adapter.",
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
        (), description="Whole modules trained and stored next to the adapter, e.g. ['embed_tokens']."
    )


class MixSection(Section):
    """One of several sources. What is null here is taken from the data section."""

    source: NonEmpty = Field(description="As data.source.")
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the mix, relative to the other weights; rows are left out, never repeated, to reach it.",
    )
    subset: NonEmpty | None = Field(None, description="As data.subset.")
    split: NonEmpty | None = Field(None, description="As data.split.")
    revision: NonEmpty | None = Field(None, description="As data.revision.")
    template: NonEmpty | None = Field(None, description="As data.template.")
    columns: dict[str, str] | None = Field(None, description="As data.columns.")


class CleanSection(Section):
    """What is done to the rows before they are templated; `gemma-tune data audit` says which of these would act."""

    drop_duplicates: Literal["off", "exact", "near"] = Field(
        "off",
        description="Leave out train rows that repeat an earlier one; near also takes rows that differ in few words.",
    )
    pii: Literal["keep", "mask", "drop"] = Field(
        "keep",
        description="E-mail addresses, phone, card and IBAN numbers, IP addresses and secrets: mask writes [EMAIL] and "
        "so on in their place, drop leaves the row out.",
    )
    strip_citations: bool = Field(False, description="Remove citation marks such as [1] and [citation needed].")
    fix_encoding: bool = Field(False, description="Repair text that was decoded with the wrong encoding (mojibake).")
    strip_heads: Names = Field(
        (), description="Strings that are removed where a text of the row begins with one, and white space behind it."
    )
    strip_tails: Names = Field(
        (),
        description="Strings that are removed where a text of the row ends in one, such as ['###eos_token###'], and "
        "white space before it.",
    )
    min_response_words: PositiveInt | None = Field(None, description="Leave out rows with a shorter response.")
    max_response_words: PositiveInt | None = Field(None, description="Leave out rows with a longer response.")


class DataSection(Section):
    """The rows, and how a row becomes a prompt and a response."""

    source: NonEmpty | None = Field(
        None,
        description="A .jsonl/.json/.csv/.tsv/.parquet file or a pattern such as rows/*.jsonl (also .gz, .bz2, .xz, "
        ".zst), a hub id owner/name, or `tiny-world`, the rows that ship with gemma-tune. `#N` behind it takes N train "
        "rows, repeating them where there are fewer.",
    )
    mix: Annotated[tuple[MixSection, ...], Field(strict=False)] = Field(
        (), description="Several sources instead of data.source, each with its own weight or `#N` rows."
    )
    subset: NonEmpty | None = Field(None, description="Configuration name of a hub dataset.")
    split: NonEmpty = Field("train", description="Split of a hub dataset that is trained on.")
    revision: NonEmpty | None = Field(None, description="Commit, tag or branch of a hub dataset.")
    template: NonEmpty = Field(
        "auto",
        description="A template of data_templates/ by name (dolly, dolly-chat, alpaca, chat, completion, text, …), or "
        "a path to a .yaml file; auto takes the shipped one that fits the columns, as chat turns for an -it model.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Template field → column of the rows, for rows that have other names."
    )
    roles: dict[str, Literal["system", "user", "assistant"]] = Field(
        default_factory=dict,
        description="Role that messages name → system, user or assistant, such as {customer: user, agent: assistant}, "
        "for roles that are not known already.",
    )
    drop_fields: Names = Field(
        (),
        description="Keys of rows and of messages, and types of content parts, that rows are trained without, such as "
        "[system, tool_calls]. Without it a row is left out that holds something which changes the conversation and "
        "cannot be rendered; other columns are only named.",
    )
    max_seq_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        description="Longest row in tokens, prompt and response and stop token together. There is no default: a "
        "hidden one eats answers."
    )
    too_long: Literal["drop", "truncate_prompt", "truncate", "refuse"] = Field(
        "drop",
        description="What happens to a longer row: truncate_prompt cuts row text of the prompt from its left, truncate "
        "also the end of the answer where that is not enough. A row that is kept ends in its stop token, and the "
        "counts are shown before training.",
    )
    train_on: Literal["response", "last_response", "all"] = Field(
        "response",
        description="Loss on every answer and its stop token, on the last one of a conversation, or on every token but "
        "the first.",
    )
    control_tokens: Literal["text", "control", "refuse"] = Field(
        "text",
        description="Control tokens spelled out in row text, such as <end_of_turn>: encoded as plain text, as the "
        "tokens they name (for rows that were templated elsewhere), or the row is left out.",
    )
    clean: CleanSection = Field(
        default_factory=CleanSection, description="What is done to the rows before they are templated."
    )
    max_bad_fraction: Fraction = Field(
        0.5, description="Stop when more than this share of a source's rows cannot be used; up to it they are left out."
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
    seed: Seed = Field(0, description="Seed of the split and of the order.")
    cache: bool = Field(
        True, description="Keep the encoded rows, so that the same data is ready at once the next time."
    )


class TrainingSection(Section):
    """The optimisation."""

    epochs: PositiveFloat = Field(1.0, description="Passes over the training rows; not used when max_steps is given.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; replaces epochs.")
    batch_size: BatchSize = Field(4, description="Rows per device and forward pass.")
    gradient_accumulation: BatchSize = Field(
        1, description="Forward passes per optimizer step; the loss is weighted by token."
    )
    data_parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="How the processes of --nproc share the work: with ddp each card holds the whole model; with fsdp "
        "each holds a share of every weight and fetches the others' layer by layer, which takes less memory and more "
        "time, and needs the transformers engine.",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        2e-4, description="Peak learning rate; the method's own where none is given."
    )
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
    max_grad_norm: Annotated[float, Field(ge=0, le=1_000_000)] = Field(
        1.0, description="Gradient norm clipping; 0 switches it off."
    )
    neftune_alpha: PositiveFloat | None = Field(
        None, description="Noise on the embeddings while training (arXiv:2310.05914)."
    )
    gradient_checkpointing: CheckpointingName = Field(
        "unsloth",
        description="Recompute activations to save memory; unsloth also offloads them (as `on` with the "
        "transformers engine).",
    )
    group_by_length: bool = Field(
        True, description="Batches of rows of similar length: less padding, so more real tokens a second."
    )
    packing: bool = Field(
        False,
        description="Join rows into sequences of pack_tokens, each row seeing only itself: no padding, so more real "
        "tokens a second; batch_size then counts packs.",
    )
    pack_tokens: TokenCount | None = Field(
        None, description="Length of a pack in tokens; null takes data.max_seq_tokens."
    )
    save_every_steps: PositiveInt | None = Field(
        None, description="Steps between checkpoints; null saves at every tenth of the run."
    )
    save_every_minutes: PositiveFloat | None = Field(
        None, description="Longest time without a checkpoint, whatever save_every_steps is; null saves on steps alone."
    )
    keep_checkpoints: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        2, description="Newest checkpoints kept; at least 2. The best one and the one resumed from stay besides."
    )
    max_minutes: PositiveFloat | None = Field(
        None,
        description="Stop after N minutes of training in this command, with a checkpoint to resume from; null sets no "
        "limit.",
    )
    early_stop_patience: PositiveInt | None = Field(
        None, description="Stop after N evaluations without a lower eval loss and keep the best adapter."
    )
    seed: Seed = Field(0, description="Seed of adapter initialisation, dropout and batch order.")


class EvaluationSection(Section):
    """What is measured on the held-out rows."""

    every_steps: PositiveInt | None = Field(
        None, description="Steps between eval losses while training; null evaluates at the end only."
    )
    batch_size: BatchSize | None = Field(None, description="Rows per forward pass; null takes training.batch_size.")
    exact_match: bool = Field(
        True, description="Answer the eval rows greedily before and after training and compare the strings."
    )
    max_exact_match_rows: PositiveInt = Field(100, description="Eval rows answered for the exact match.")
    max_new_tokens: TokenCount = Field(128, description="Longest answer in tokens.")
    num_questions: Annotated[int, Field(ge=0, le=20)] = Field(
        3, description="Eval rows whose answers are printed before and after."
    )


class ExportSection(Section):
    """What is written after training, next to the adapter."""

    formats: Names = Field(
        (),
        description="Formats to write into RUN/export after training, such as merged-16bit, gguf-q8_0, ollama; "
        "see `gemma-tune export --help`.",
    )
    verify: bool = Field(True, description="Run every export and compare it with base + adapter.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Precision of the merged weights; auto keeps the base's."
    )
    max_shard_gb: Annotated[float, Field(ge=0.001, le=1_000_000)] = Field(
        5.0, description="Largest safetensors file of a merged model, in 10^9 bytes."
    )


class LoggingSection(Section):
    """What is reported while training."""

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
    resume: Literal["never", "auto"] = Field(
        "never",
        description="auto resumes the interrupted run of this recipe where there is one, so that the same command "
        "starts and continues; never starts a new run unless --resume is given.",
    )


class Recipe(Section):
    """A whole run. Only `data` has fields without a default."""

    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    method: AnyMethod = Field(default_factory=MethodSection, description="What is learned from the rows.")
    training: TrainingSection = Field(default_factory=TrainingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    export: ExportSection = Field(default_factory=ExportSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    run: RunSection = Field(default_factory=RunSection)

    @property
    def method_facts(self) -> MethodFacts:
        return METHODS[self.method.name]

    @property
    def tokens_per_pack(self) -> int:
        """Tokens of a pack when rows are packed."""
        return self.training.pack_tokens or self.data.max_seq_tokens
