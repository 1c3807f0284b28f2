"""The words of training: Recipe in, Outcome out, and the signature that joins them.

Owns: `Recipe`, `DataConfig`, `EvaluationConfig`, `Resources`, `Job`, `Progress`, `Outcome`.
Must not know: studies, search, Ray, torch (this file imports in milliseconds).

All are frozen pydantic models with unknown fields forbidden and NaN and infinity refused, so the YAML, the JSON column
and the Python object are one class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    Tag,
    model_validator,
)  # fmt: skip
from pydantic_core import PydanticCustomError

from training import own


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got the boolean {value}")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]
Whole = Annotated[int, BeforeValidator(_no_boolean)]
Weight = Annotated[Number, Field(ge=0, le=1e6)]


def _methods() -> list[str]:
    from training.adapters import ADAPTERS

    return list(ADAPTERS)


def _tasks() -> list[str]:
    from training.tasks import NAMES

    return list(NAMES)


def one_of(names: Callable[[], list[str]]) -> Any:
    """Returns the type of a name out of a registry, which is read when a value is checked, or of something of the user's own."""

    def check(value: str) -> str:
        if value not in (known := names()) and not own.is_own(value):
            expected = f"{', '.join(map(repr, known))} or module:attribute"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    return Annotated[str, AfterValidator(check)]


class Frozen(BaseModel):
    """Base of every record: immutable, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Recipe(Frozen):
    """One complete set of hyperparameters for one fine-tuning run.

    Defaults: rank 16, alpha 32, dropout 0.05, learning rate 2e-4, cosine, no weight decay on all linear layers are what
    Axolotl publishes for Llama 3.2 1B (examples/llama-3/lora-1b.yml) with the batch of 8 and the warm-up of 10 % of its 8B
    example (examples/llama-3/lora-8b.yml); clipping at 1.0 is the Hugging Face Trainer's.
    """

    model: str = Field("embedded", min_length=1, description="`embedded`, a local folder, or a Hugging Face id")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    adapter: one_of(_methods) = Field(
        "lora",
        description="lora (Hu et al. 2021), rslora (Kalajdzievski 2023), dora (Liu et al. 2024), adalora (Zhang et al. 2023), "
        "full: no adapter, all weights are trained; or module:NAME of a `training.adapters.Method`",
    )
    rank: Whole = Field(16, ge=1, le=4096, description="inner dimension of each adapter; adalora: the mean that it comes to")
    alpha: Number = Field(32, gt=0, le=65536, description="adapter output is scaled by alpha / rank (rslora: / sqrt(rank))")
    dropout: Number = Field(0.05, ge=0, lt=1, description="on the adapter's input")
    targets: str | tuple[str, ...] = Field("all-linear", description="all-linear, attention, mlp, or module names")
    learning_rate: Number = Field(2e-4, gt=0, le=1e4, description="peak rate of AdamW")
    lora_plus_ratio: Number = Field(1.0, ge=1, le=1024, description="rate of B over that of A (LoRA+, Hayou et al. 2024)")
    schedule: Literal["cosine", "cosine_min", "linear", "constant"] = Field(
        "cosine", description="shape after the warm-up, down to 0; cosine_min: down to a tenth"
    )
    warmup: Number = Field(0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: Number = Field(0.0, ge=0, le=10, description="decoupled (Loshchilov & Hutter 2019)")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="8bit: moments in 8 bits (Dettmers et al. 2022); paged: on a GPU, moments may move to the host"
    )
    clip: Number = Field(1.0, gt=0, description="largest norm of the whole gradient")
    batch_size: Whole = Field(8, ge=1, le=65536, description="sequences per optimizer step over all workers")
    micro_batch: Whole | None = Field(None, ge=1, description="sequences per forward and worker; default batch_size / workers")
    epochs: Number | None = Field(None, gt=0, le=1000, description="passes over the training rows; default 1")
    steps: Whole | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    tokens: Whole | None = Field(None, ge=1, description="tokens to train on, instead of epochs")
    max_length: Whole = Field(512, ge=8, le=1_000_000, description="tokens; a longer row is cut from the left of its prompt")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the computation; adapters stay fp32; fp16 scales the loss (Micikevicius et al. 2018)"
    )
    bits: Literal[32, 16, 8, 4] = Field(32, description="of the base; 4 is NF4 with double quantization (QLoRA)")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="DeepSpeed ZeRO: workers share optimizer state (1), gradients (2), weights (3); 0 is plain data parallel"
    )
    offload: StrictBool = Field(False, description="ZeRO: optimizer state, and at stage 3 weights, in the host's memory")
    gradient_checkpointing: StrictBool = False
    mix: dict[str, Weight] | None = Field(None, description="weights of named sources of data.train; default: the data's own")
    packing: Literal["auto", "off"] = Field(
        "auto",
        description="auto lays the rows of a forward end to end, each seeing itself alone, where the model allows it; off pads",
    )
    seed: Whole = Field(0, ge=0, le=2**31 - 1, description="adapter initialisation, dropout and order of the rows")

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        given = [name for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of epochs, steps and tokens, got {' and '.join(given)}")
        if self.bits == 16 and self.precision != "bf16":
            raise ValueError(f"bits: 16 keeps the base in bf16 and needs precision: bf16, got precision: {self.precision}")
        return self


class Clean(Frozen):
    """What happens to rows with a problem; each is counted, whatever happens. Only `leak` changes rows by default."""

    unreadable: Literal["error", "drop"] = Field("error", description="a line that is no record")
    missing: Literal["error", "drop"] = Field("error", description="a field is absent or nothing")
    wrong_type: Literal["error", "drop"] = Field("error", description="a field is no text, or no conversation")
    empty: Literal["error", "drop"] = Field("error", description="a field, or the answer, has no text")
    broken_text: Literal["keep", "error", "drop"] = Field("keep", description="traces of a wrong encoding, such as U+FFFD")
    repeated: Literal["keep", "error", "drop"] = Field("keep", description="a training row that stands there before")
    near_repeated: Literal["keep", "error", "drop"] = Field("keep", description="a training row much like one before")
    leak: Literal["drop", "error"] = Field("drop", description="a row that stands in test or validation rows too")
    near_leak: Literal["keep", "error", "drop"] = Field("keep", description="a training row much like a held-out one")


class Split(Frozen):
    """How validation and test rows are cut from the training rows, where they have no files of their own."""

    by: Literal["seed", "stratified", "group"] = Field("seed", description="stratified: same shares; group: groups stay whole")
    column: str | None = Field(None, min_length=1, description="the file's column; stratified default: the label")
    together: Literal["exact", "near"] = Field("exact", description="near: rows much like each other stay on one side")
    validation: Number = Field(0.1, gt=0, lt=1, description="share of the rows that test leaves")
    test: Number = Field(0.1, gt=0, lt=1, description="share of the rows")

    @model_validator(mode="after")
    def _has_a_column(self) -> Split:
        if self.by == "group" and self.column is None:
            raise ValueError("by: group needs column, the name of the column that names the groups")
        if self.by == "seed" and self.column is not None:
            raise ValueError(f"by: seed looks at no column, got column: {self.column}")
        return self


class Origin(Frozen):
    """One of the named sources that training rows are mixed of. A row is drawn from it with weight / (sum of all weights)."""

    file: str = Field(min_length=1, description="file, folder, `hub:OWNER/NAME` or `embedded:train.jsonl`")
    weight: Weight = Field(1.0, description="share of the rows that are drawn, relative to the other sources")
    limit: Whole | None = Field(None, ge=1, description="use at most so many of its training rows")
    columns: dict[str, str] = Field(default_factory=dict, description="as data.columns, for this source")


def _form_of(given: Any) -> str:
    return "mixture" if isinstance(given, dict) else "text"


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
_Mixture = Annotated[dict[_Name, Origin], Field(min_length=1), Tag("mixture")]
_Files = Annotated[Annotated[str, Field(min_length=1), Tag("text")] | _Mixture, Discriminator(_form_of)]


class DataConfig(Frozen):
    """Where the rows are and how a row becomes a prompt and a response."""

    train: _Files = Field(
        description="file, folder, `hub:OWNER/NAME` or `embedded:train.jsonl`; or several by name, each with file and weight"
    )
    validation: str | None = Field(None, description="rows that the search scores on; default: a seeded tenth of train")
    test: str | None = Field(None, description="rows that no trial sees; default: another seeded tenth of train")
    format: Literal["jsonl", "csv", "json", "parquet", "arrow"] | None = Field(None, description="default: from the file name")
    task: one_of(_tasks) = Field(
        "instruction", description="instruction, classification, completion, chat; or module:NAME of a task of one's own"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name -> the file's (instruction, input, response, text, label, messages, system)"
    )
    template: str | None = Field(
        None,
        max_length=20_000,
        description="prompt with {columns} in braces, a name (chatml, ...) or a Jinja chat template; default: the model's",
    )
    separator: str | None = Field(None, min_length=1, description="completion: only what follows its last occurrence is learned")
    labels: tuple[str, ...] = Field((), description="classification: the labels; default: those of the training rows")
    limit: Whole | None = Field(None, ge=1, description="use at most so many training rows")
    clean: Clean = Field(default_factory=Clean, description="what happens to rows with a problem")
    split: Split = Field(default_factory=Split, description="how rows are held out")
    too_long: Literal["cut_prompt", "cut_end", "cut_both", "drop", "error"] = Field(
        "cut_prompt",
        description="training rows beyond max_length lose the beginning of the prompt, the end, of both in proportion, are left "
        "out, or refuse the study; held-out rows always lose the beginning of their prompt",
    )
    stream_above: Whole = Field(256_000_000, ge=0, description="bytes of all files from which on rows stay on disk")

    def identity(self) -> dict[str, Any]:
        """Returns what decides the rows besides the files; a field that came later counts once it is not its default."""
        fields = type(self).model_fields
        later = {
            n for n in ("clean", "split", "too_long") if getattr(self, n) == fields[n].get_default(call_default_factory=True)
        }
        said = self.model_dump(exclude={"train", "validation", "test", "stream_above"} | later)
        if isinstance(self.train, str):
            return said
        return said | {"mixture": {name: origin.model_dump(exclude={"file"}) for name, origin in self.train.items()}}

    @property
    def said(self) -> str:
        """Where training rows come from, for people."""
        if isinstance(self.train, str):
            return self.train
        return ", ".join(f"{name}: {origin.file} (weight {origin.weight:g})" for name, origin in self.train.items())

    def origins(self, split: str = "train") -> dict[str, Origin]:
        """Returns what a split is read from, by name; a file by itself has the name ""."""
        given = getattr(self, split)
        if given is None:
            return {}
        return {"": Origin(file=given, columns=self.columns)} if isinstance(given, str) else dict(given)


class OwnMetric(Frozen):
    """A user's metric where it needs more than its function: a name of its own, or a goal."""

    name: str = Field(pattern=r"[A-Za-z_]\w*", description="of the score")
    function: str = Field(pattern=own.NAME.pattern, description="module:function, (answer, expected, prompt) -> number")
    goal: Literal["maximize", "minimize"] = "maximize"


class EvaluationConfig(Frozen):
    """How a trained model is scored."""

    rows: Whole = Field(400, ge=1, description="at most so many validation rows (seeded choice)")
    test_rows: Whole = Field(1000, ge=1, description="at most so many test rows")
    batch_size: Whole = Field(32, ge=1, description="rows per forward")
    reports: Whole = Field(4, ge=1, le=1000, description="scored points on a trial's curve, the last one included")
    metrics: tuple[str | OwnMetric, ...] = Field(
        (), description="scores of trials beside accuracy and loss: perplexity, rouge_l, ..., or module:function"
    )
    timing: Literal["measured", "counted"] = Field(
        "measured", description="seconds; counted: those that the operations take at a fixed rate, the same on every machine"
    )
    answers: Whole = Field(200, ge=1, description="held-out rows that are answered in words, where a metric looks at answers")
    max_new_tokens: Whole = Field(128, ge=1, le=100_000, description="longest answer")
    retention: str | None = Field(
        None, min_length=1, description="general text (rows with `text`) that the winner must not forget; embedded:general.jsonl"
    )


class Resources(Frozen):
    """What one trial needs: `workers` processes with `gpus` and `cpus` each."""

    workers: Whole = Field(1, ge=1, le=1024)
    gpus: Number = Field(0, ge=0, le=64, description="per worker")
    cpus: Number = Field(1, ge=0, le=1024, description="per worker")
    price: Number | None = Field(None, gt=0, description="currency units per hour of one device: a GPU, or a worker without")
    mode: Literal["auto", "packed", "warm", "fresh", "local"] = Field(
        "auto",
        description="fresh: a worker group per trial; warm: groups that stay up and take trial after trial; packed: several "
        "trials at once in each; auto: warm, and packed where budget.parallel is beyond the workers; local: this process",
    )
    seats: Whole | None = Field(
        None, ge=1, le=256, description="packed: trials that one worker trains at once; default: what budget.parallel asks for"
    )
    save: Number = Field(60, ge=0, description="seconds between two checkpoints of a running trial; a shorter one writes none")


class Limits(Frozen):
    """What a trial may use. Beyond it a recipe is infeasible: a result, not a failure."""

    peak_bytes: Whole | None = Field(None, ge=1, description="bytes on one worker")
    seconds: Number | None = Field(None, gt=0, description="of training steps")
    cost: Number | None = Field(None, gt=0, description="of training steps on all workers, at resources.price")


def clashes(recipe: Recipe, resources: Resources) -> list[tuple[str, str, str]]:
    """Returns what does not go together in a recipe and on what it is trained, as (field, rule, remedy).

    These are no errors of a `Recipe` itself: in a space of choices some points may clash while the others are sound.
    """
    several = resources.workers > 1 or recipe.zero_stage > 0
    found = []
    if recipe.adapter == "full" and recipe.bits < 16:
        found.append(("adapter", f"full trains the weights themselves, which {recipe.bits} bits cannot hold.",
                      "Set bits: 32, or 16 with precision: bf16, or train an adapter."))  # fmt: skip
    if recipe.adapter == "full" and recipe.lora_plus_ratio != 1:
        found.append(("lora_plus_ratio", f"full has no A and B, whose rates could differ by {recipe.lora_plus_ratio:g}.",
                      "Leave lora_plus_ratio out, or train an adapter."))  # fmt: skip
    if recipe.adapter == "dora" and recipe.bits == 8 and not resources.gpus:
        found.append(("adapter", "dora cannot read a base of 8 bits on a CPU (PEFT loses its scales after the first forward).",
                      "Set bits: 4, 16 or 32, or train on a GPU."))  # fmt: skip
    if recipe.precision == "fp16" and recipe.zero_stage:
        found.append(("precision", f"fp16 needs a scaled loss, which DeepSpeed at stage {recipe.zero_stage} is not told of.",
                      "Set precision: bf16, or zero_stage: 0."))  # fmt: skip
    if recipe.optimizer.startswith("paged") and not resources.gpus:
        found.append(("optimizer", f"{recipe.optimizer} moves pages between a GPU and the host, and there is no GPU.",
                      f"Set optimizer: {recipe.optimizer.removeprefix('paged_')}, or resources.gpus."))  # fmt: skip
    if recipe.adapter == "adalora" and several:
        found.append(("adapter", "adalora decides on ranks by the gradients of one process, so it trains with workers: 1 and "
                      f"zero_stage: 0, got {resources.workers} and {recipe.zero_stage}.",
                      "Set both so, or use another adapter."))  # fmt: skip
    if recipe.zero_stage == 3 and recipe.bits < 16:
        found.append(("zero_stage", f"stage 3 cuts weights into parts, and the scales of {recipe.bits} bits are no weights.",
                      "Set zero_stage: 2, or bits: 16 or 32."))  # fmt: skip
    if recipe.offload and not recipe.zero_stage:
        found.append(("offload", "is DeepSpeed's, and zero_stage is 0.", "Set zero_stage: 1, 2 or 3, or leave offload out."))
    if recipe.offload and not resources.gpus:
        found.append(("offload", "moves state from a GPU to the host, and there is no GPU.",
                      "Leave offload out, or set resources.gpus."))  # fmt: skip
    if recipe.offload and recipe.optimizer != "adamw":
        found.append(("offload", f"keeps the state of AdamW on the host, and optimizer is {recipe.optimizer}.",
                      "Set optimizer: adamw, or leave offload out."))  # fmt: skip
    return found


class Job(Frozen):
    """All that a worker needs to train one recipe, as JSON."""

    recipe: Recipe
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: Resources = Resources()
    limits: Limits = Limits()
    rows: Literal["train", "all"] = Field("train", description="all trains on the validation rows too: for the final model")
    output: str | None = Field(None, description="folder for the trained adapter; None keeps nothing")
    cache: str | None = Field(None, description="folder for tokenized rows, shared by trials; None tokenizes anew")
    resume: str | None = Field(None, description="folder for this run's checkpoints, from the newest of which it goes on")
    interventions: StrictBool = Field(
        False, description="final model only: what goes wrong is skipped, slowed down or taken back, on the record"
    )


class Progress(Frozen):
    """One report from inside the loop. `share` is the part of the trial's own length that is done (0..1]; `peak_bytes` so far.

    `since` is the step of the checkpoint that this launch went on from: what was reported up to there still holds.
    """

    step: int
    steps: int
    tokens: int
    share: float
    seconds: float
    peak_bytes: int | None = None
    since: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)


Ended = Literal["complete", "stopped", "infeasible", "diverged", "paused"]


class Pause(str):
    """A reason to end for now: the run leaves a checkpoint, ends as `paused`, and goes on from there when launched again."""


class Outcome(Frozen):
    """What one training run came to.

    `loss` is in nats per supervised token on the validation rows; `seconds` counts optimizer steps alone (no start-up,
    load, probe or evaluation); `peak_bytes` is the maximum over workers. What was never measured is None.
    """

    ended: Ended = "complete"
    reason: str = ""
    share: float = 1.0
    scores: dict[str, float] = Field(default_factory=dict)
    loss: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    tokens: int = 0
    trainable: int | None = None
    checkpoint: str | None = None
    conditions: dict[str, Any] = Field(default_factory=dict)


Report = Callable[[Progress], str | None]
"""Takes a Progress; returns None to go on, or the reason to stop. Called by the main worker; never raises."""

Train = Callable[[Job, Report], Outcome]
"""The signature of `training.loop.train`, of `training.simulate`, and of a user's own train function."""
