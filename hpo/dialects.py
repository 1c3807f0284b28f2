"""Training files of other programs: Axolotl, LLaMA-Factory, TRL. Read into our words, and written from them.

Owns: which program a file is for, what its keys are called here, and what to do about keys without a counterpart. Pure.
Must not know: stores, studies, how a study file is written.

`read` and `write` are each other's inverse for all that both sides can say; what one side cannot say is listed, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpo.errors import InputError, Problem
from training.recipe import DataConfig, Recipe

NAMES = ("axolotl", "llamafactory", "trl")
# Our field -> the key of each program, for what differs in nothing but the name.
SAME = {
    "model": ("base_model", "model_name_or_path", "model_name_or_path"),
    "revision": ("revision_of_model", "model_revision", "model_revision"),
    "rank": ("lora_r", "lora_rank", "lora_r"),
    "alpha": ("lora_alpha", "lora_alpha", "lora_alpha"),
    "dropout": ("lora_dropout", "lora_dropout", "lora_dropout"),
    "learning_rate": ("learning_rate", "learning_rate", "learning_rate"),
    "lora_plus_ratio": ("loraplus_lr_ratio", "loraplus_lr_ratio", None),
    "warmup": ("warmup_ratio", "warmup_ratio", "warmup_ratio"),
    "weight_decay": ("weight_decay", "weight_decay", "weight_decay"),
    "clip": ("max_grad_norm", "max_grad_norm", "max_grad_norm"),
    "epochs": ("num_epochs", "num_train_epochs", "num_train_epochs"),
    "steps": ("max_steps", "max_steps", "max_steps"),
    "max_length": ("sequence_len", "cutoff_len", "max_length"),
    "seed": ("seed", "seed", "seed"),
}
# What a program takes where its file says nothing (its own documentation), as far as that differs from our defaults.
SILENT: dict[str, dict[str, Any]] = {
    "axolotl": {"epochs": 1, "schedule": "cosine", "warmup": 0.03, "seed": 42, "max_length": 512},
    "llamafactory": {"rank": 8, "alpha": 16, "dropout": 0.0, "learning_rate": 5e-5, "schedule": "linear", "warmup": 0.0,
                     "epochs": 3, "max_length": 2048, "seed": 42, "gradient_checkpointing": True, "batch_size": 8},
    "trl": {"learning_rate": 2e-5, "schedule": "linear", "warmup": 0.0, "epochs": 3, "max_length": 1024, "seed": 42,
            "gradient_checkpointing": True, "batch_size": 8},
}  # fmt: skip
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "paged_adamw", "paged_adamw": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
OPTIMIZER_OF = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit",
                "paged_adamw_8bit": "paged_adamw_8bit"}  # fmt: skip
GROUPS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
# What has no counterpart here, by how its key begins, and what to do instead.
ADVICE = {
    ("wandb", "mlflow", "comet", "swanlab", "report_to", "logging", "plot_loss", "run_name", "use_tensorboard"):
        "Leave it: every trial's curve is in the study's record and report.",
    ("output_dir", "overwrite_output", "dataset_prepared", "save_", "saves_per", "hub_", "push_to_hub", "overwrite_cache"):
        "Leave it: trials and models are kept under `storage`; see `promote`.",
    ("eval", "val_", "do_eval", "per_device_eval", "do_train", "stage", "early_stopping", "metric_for", "load_best"):
        "See `evaluation` and `stopping`: held-out rows are scored by every trial.",
    ("flash_attention", "flash_attn", "attn_", "sample_packing", "pad_to", "packing", "group_by_length", "eval_sample_packing"):
        "Leave it: how rows are laid out in a forward is decided here, and changes no result.",
    ("fsdp", "ddp", "local_rank", "deepspeed", "device_map"): "See `recipe.zero_stage` and `resources`.",
    ("dataloader", "preprocessing", "dataset_num_proc", "dataset_processes"): "Leave it: rows are prepared once for all trials.",
    ("resume_from", "auto_resume"): "Leave it: an interrupted study is continued by the same command.",
    ("template", "chat_template"): "Set `data.template`: a name (chatml, ...), or the tokenizer's own by leaving it out.",
    ("special_tokens", "tokens", "model_type", "tokenizer", "is_llama", "trust_remote", "strict", "resize_"):
        "Leave it: model and tokenizer are read from the model's own folder, without remote code.",
    ("train_on_inputs", "mask_", "completion_only", "assistant_only"): "Leave it: only answers are learned.",
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """A file of another program in our words.

    Attributes:
        program: axolotl, llamafactory or trl.
        recipe: fields of a Recipe; data: of a DataConfig; resources: of Resources.
        left: (key, its value, what to do) for what has no counterpart.
        notes: what was concluded.
    """

    program: str
    recipe: dict[str, Any]
    data: dict[str, Any]
    resources: dict[str, Any] = field(default_factory=dict)
    left: tuple[tuple[str, Any, str], ...] = ()
    notes: tuple[str, ...] = ()


def program_of(raw: Mapping[str, Any]) -> str:
    """Returns which program a parsed file is for.

    Raises:
        InputError: none of the known ones.
    """
    if "base_model" in raw:
        return "axolotl"
    if "model_name_or_path" in raw:
        marks = {"finetuning_type", "stage", "cutoff_len", "lora_rank", "lora_target", "dataset_dir", "quantization_bit"}
        return "llamafactory" if marks & set(raw) else "trl"
    raise InputError(Problem("--from", "is no file of Axolotl, LLaMA-Factory or TRL: it has neither base_model nor "
                             "model_name_or_path.", "Name such a file, or a data file without --from."))  # fmt: skip


def read(raw: Mapping[str, Any], *, registry: Mapping[str, Any] | None = None) -> Foreign:
    """Returns a parsed file in our words.

    Args:
        raw: the file; keys without a value count as absent, as these programs take them.
        registry: LLaMA-Factory's dataset_info.json.
    """
    program = program_of(raw)
    column = NAMES.index(program)
    given = {key: value for key, value in raw.items() if value is not None}
    took: set[str] = set()

    def take(*keys: str, default: Any = None) -> Any:
        took.update(key for key in keys if key in given)
        return next((given[key] for key in keys if key in given), default)

    recipe: dict[str, Any] = dict(SILENT[program])
    notes = [f"where the file is silent, {program}'s own defaults hold: " + ", ".join(f"{n} {v}" for n, v in recipe.items())]
    for ours, keys in SAME.items():
        if keys[column] and (value := take(keys[column])) is not None:
            recipe[ours] = _number(value) if ours not in ("model", "revision") else value
    if program == "trl" and (length := take("max_seq_length")) is not None:
        recipe["max_length"] = _number(length)
    if recipe.get("steps", -1) > 0:
        recipe.pop("epochs", None)
    else:
        recipe.pop("steps", None)
    _method(program, recipe, take, notes)
    _precision(program, recipe, take, notes)
    _schedule(recipe, take, notes)
    if (name := take("optimizer", "optim")) is not None:
        if name in OPTIMIZERS:
            recipe["optimizer"] = OPTIMIZERS[name]
        else:
            took -= {"optimizer", "optim"}
    micro = take("micro_batch_size", "per_device_train_batch_size")
    folds = take("gradient_accumulation_steps", default=1)
    if micro is not None:
        recipe["batch_size"] = int(micro) * int(folds)
        recipe |= {"micro_batch": int(micro)} if int(folds) > 1 else {}
        notes.append(f"batch_size {recipe['batch_size']} is that of one device; for several, multiply it, and set resources")
    off = take("disable_gradient_checkpointing")
    recipe["gradient_checkpointing"] = bool(take("gradient_checkpointing", default=not off if off is not None else
                                                 recipe.get("gradient_checkpointing", False)))  # fmt: skip
    resources: dict[str, Any] = {}
    stage = next((n for n in (1, 2, 3) if f"zero{n}" in str(given.get("deepspeed")) or f"z{n}" in str(given.get("deepspeed"))), 0)
    if stage:
        took.add("deepspeed")
        recipe["zero_stage"] = stage
        notes.append(f"ZeRO stage {stage}, read from the name of the DeepSpeed file; what else stands in it is not read")
    data, about = {"axolotl": _axolotl_data, "llamafactory": _factory_data, "trl": _trl_data}[program](take, registry or {})
    left = tuple((key, value, _advice(key)) for key, value in given.items() if key not in took)
    return Foreign(program, recipe, data, resources, left, (*notes, *about))


def write(
    program: str, recipe: Recipe, data: DataConfig, *, workers: int = 1
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Returns the file of another program, what else it needs (LLaMA-Factory's dataset_info), and what it cannot say."""
    column, wrong = NAMES.index(program), []
    out: dict[str, Any] = {}
    values = recipe.model_dump()
    for ours, keys in SAME.items():
        if values[ours] is None or (recipe.adapter == "full" and ours in ("rank", "alpha", "dropout", "lora_plus_ratio")):
            continue
        if keys[column]:
            out[keys[column]] = values[ours]
        elif values[ours] != Recipe.model_fields[ours].default:
            wrong.append(f"{ours} {values[ours]:g}: {program} has no such setting")
    if recipe.epochs is None and recipe.steps is None:
        if recipe.tokens is None:
            out[SAME["epochs"][column]] = 1
        else:
            wrong.append(f"tokens {recipe.tokens:,}: {program} counts epochs or steps; set max_steps to what they come to")
    if out.get("loraplus_lr_ratio") == 1:
        del out["loraplus_lr_ratio"]
    _write_method(program, recipe, out, wrong)
    _write_precision(program, recipe, out, wrong)
    _write_schedule(program, recipe, out)
    out["optimizer" if program == "axolotl" else "optim"] = OPTIMIZER_OF[recipe.optimizer]
    micro = min(recipe.micro_batch or recipe.batch_size // workers, max(recipe.batch_size // workers, 1))
    out["micro_batch_size" if program == "axolotl" else "per_device_train_batch_size"] = micro
    out["gradient_accumulation_steps"] = max(recipe.batch_size // (micro * workers), 1)
    if program == "llamafactory":
        out["disable_gradient_checkpointing"] = not recipe.gradient_checkpointing
    else:
        out["gradient_checkpointing"] = recipe.gradient_checkpointing
    if recipe.zero_stage:
        if program == "trl":
            wrong.append(f"zero_stage {recipe.zero_stage}: launch it with accelerate and a DeepSpeed plugin of that stage")
        else:
            names = {"axolotl": f"deepspeed_configs/zero{recipe.zero_stage}.json",
                     "llamafactory": f"examples/deepspeed/ds_z{recipe.zero_stage}_config.json"}  # fmt: skip
            out["deepspeed"] = names[program]
    more = {"axolotl": _write_axolotl, "llamafactory": _write_factory, "trl": _write_trl}[program](data, out, wrong)
    return out, more, wrong


def _number(value: Any) -> Any:
    # YAML 1.1 files write 1e-4, which YAML 1.2 reads as a number and other parsers as text.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _advice(key: str) -> str:
    return next((what for begins, what in ADVICE.items() if key.startswith(begins)),
                "Has no counterpart here; `hpo schema recipe` lists what there is.")  # fmt: skip


# Methods


def _method(program: str, recipe: dict, take, notes: list[str]) -> None:
    kind = take("adapter") if program == "axolotl" else take("finetuning_type", default="lora")
    if program == "trl":
        kind = "lora" if take("use_peft", default=False) else "full"
    kind = kind or "full"
    bits = 4 if take("load_in_4bit") or kind == "qlora" else 8 if take("load_in_8bit") else None
    if program == "llamafactory":
        bits = int(take("quantization_bit", default=0)) or None
    if take("peft_use_dora", "use_dora"):
        kind = "dora"
    elif take("peft_use_rslora", "use_rslora"):
        kind = "rslora"
    recipe["adapter"] = "lora" if kind == "qlora" else kind
    if recipe["adapter"] not in ("lora", "dora", "rslora", "full"):
        notes.append(f"adapter {recipe['adapter']} is not known here; lora stands for it")
        recipe["adapter"] = "lora"
    if bits:
        recipe["bits"] = bits
    if recipe["adapter"] == "full":
        for name in ("rank", "alpha", "dropout"):
            recipe.pop(name, None)
    targets = take("lora_target_modules", "lora_target")
    linear = take("lora_target_linear")
    if isinstance(targets, str):
        targets = [part.strip() for part in targets.split(",")]
    if linear or targets in (None, ["all"], ["all-linear"]):
        return
    group = next((name for name, modules in GROUPS.items() if set(modules) == set(targets)), None)
    recipe["targets"] = group or list(targets)


def _write_method(program: str, recipe: Recipe, out: dict, wrong: list[str]) -> None:
    adapter = recipe.adapter
    if adapter not in ("lora", "dora", "rslora", "full"):
        wrong.append(f"adapter {adapter}: {program} does not know it; lora stands in its place")
        adapter = "lora"
    quantized = recipe.bits in (4, 8)
    if program == "axolotl":
        out |= {"adapter": "qlora" if recipe.bits == 4 else "lora"} if adapter != "full" else {}
        out |= {"load_in_4bit": recipe.bits == 4, "load_in_8bit": recipe.bits == 8}
        out |= {f"peft_use_{adapter}": True} if adapter in ("dora", "rslora") else {}
    elif program == "llamafactory":
        out |= {"stage": "sft", "do_train": True, "finetuning_type": "full" if adapter == "full" else "lora"}
        out |= {"quantization_bit": recipe.bits, "quantization_method": "bnb"} if quantized else {}
        out |= {f"use_{adapter}": True} if adapter in ("dora", "rslora") else {}
    else:
        out |= {"use_peft": adapter != "full"}
        out |= {f"load_in_{recipe.bits}bit": True} if quantized else {}
        out |= {f"use_{adapter}": True} if adapter in ("dora", "rslora") else {}
    if adapter == "full":
        return
    modules = list(GROUPS.get(recipe.targets, ())) if isinstance(recipe.targets, str) else list(recipe.targets)
    if program == "axolotl":
        out |= {"lora_target_modules": modules} if modules else {"lora_target_linear": True}
    elif program == "llamafactory":
        out["lora_target"] = ",".join(modules) or "all"
    else:
        out["lora_target_modules"] = modules or "all-linear"


def _precision(program: str, recipe: dict, take, notes: list[str]) -> None:
    half, fp16 = take("bf16", "bfloat16", "pure_bf16"), take("fp16", "float16")
    kept = take("dtype", "torch_dtype")
    recipe["precision"] = "bf16" if half and half != "false" else "fp16" if fp16 else "fp32"
    if "bits" not in recipe and recipe["precision"] == "bf16" and (program != "trl" or kept in ("bfloat16", "auto")):
        recipe["bits"] = 16  # these load the base itself in bf16


def _write_precision(program: str, recipe: Recipe, out: dict, wrong: list[str]) -> None:
    out |= {"bf16": recipe.precision == "bf16", "fp16": recipe.precision == "fp16"}
    if program == "trl":
        out["dtype"] = "bfloat16" if recipe.bits == 16 else "float32"
    elif recipe.bits == 32 and recipe.precision == "bf16":
        wrong.append(f"bits 32 with precision bf16: {program} keeps the base itself in bf16")


def _schedule(recipe: dict, take, notes: list[str]) -> None:
    name = take("lr_scheduler", "lr_scheduler_type")
    least = take("cosine_min_lr_ratio") or (take("lr_scheduler_kwargs") or {}).get("min_lr_rate")
    if name in ("cosine_with_min_lr", "cosine") and least:
        recipe["schedule"] = "cosine_min"
        if abs(least - 0.1) > 1e-9:
            notes.append(f"the cosine ends at {least:g} of its peak there, and at 0.1 here")
    elif name == "constant":
        recipe |= {"schedule": "constant", "warmup": 0.0}  # theirs has no warm-up
    elif name:
        known = {"cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant"}
        recipe["schedule"] = known.get(name, "cosine")
        if name not in known:
            notes.append(f"schedule {name} is not known here; cosine stands for it")
    if (steps := take("warmup_steps")) is not None and recipe.get("steps"):
        recipe["warmup"] = steps / recipe["steps"]
    elif steps:
        notes.append(f"warmup_steps {steps}: set recipe.warmup to what share of the steps that is; {recipe['warmup']:g} stands")


def _write_schedule(program: str, recipe: Recipe, out: dict) -> None:
    key = "lr_scheduler" if program == "axolotl" else "lr_scheduler_type"
    out[key] = {"constant": "constant_with_warmup", "cosine_min": "cosine" if program == "axolotl" else "cosine_with_min_lr"}.get(
        recipe.schedule, recipe.schedule)  # fmt: skip
    if recipe.schedule == "cosine_min":
        out |= {"cosine_min_lr_ratio": 0.1} if program == "axolotl" else {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}


# Rows


def _source(path: str, named: bool = False) -> str:
    # An id is OWNER/NAME without a suffix that a file would have.
    looks_like_file = path.startswith((".", "/", "~")) or path.rsplit(".", 1)[-1] in ("json", "jsonl", "csv", "parquet", "arrow")
    return path if looks_like_file or (not named and path.count("/") != 1) else f"hub:{path}"


def _file(source: str) -> str:
    return source.removeprefix("hub:")


def _rest(entries: list, notes: list[str]) -> None:
    if len(entries) > 1:
        notes.append(f"only the first of {len(entries)} data sets is used; name the others in data.train once they are joined: "
                     + ", ".join(str(e.get("path", e) if isinstance(e, dict) else e) for e in entries[1:]))  # fmt: skip


def _axolotl_data(take, registry: Mapping) -> tuple[dict[str, Any], list[str]]:
    entries, notes, data = take("datasets") or [], [], {}
    if not entries:
        return {}, ["the file names no data set: set data.train"]
    _rest(entries, notes)
    first = entries[0]
    files = first.get("data_files")
    path = first["path"] if not files else files if isinstance(files, str) else files[0]
    data["train"] = _source(path)
    kind = first.get("type")
    if isinstance(kind, dict):
        data["task"] = "instruction"
        pairs = {"instruction": "field_instruction", "input": "field_input", "response": "field_output"}
        data["columns"] = {name: kind[key] for name, key in pairs.items() if kind.get(key)}
    elif kind == "completion":
        data |= {"task": "completion"} | ({"columns": {"text": first["field"]}} if first.get("field") else {})
    elif kind in ("chat_template", "sharegpt"):
        data |= {"task": "chat"}
        if (column := first.get("field_messages")) is not None:
            data["columns"] = {"messages": column}
    elif kind and str(kind).split(":")[0].split(".")[0] in ("alpaca", "alpaca_chat", "gpteacher"):
        data |= {"task": "instruction", "columns": {"instruction": "instruction", "input": "input", "response": "output"}}
    else:
        notes.append(f"data set type {kind}: set data.task and data.columns")
    share = take("val_set_size")
    if isinstance(share, float) and 0 < share < 1:
        data["split"] = {"validation": share}
    if held := take("test_datasets"):
        data["validation"] = _source(held[0].get("data_files") or held[0]["path"])
    return data, notes


def _write_axolotl(data: DataConfig, out: dict, wrong: list[str]) -> dict[str, Any]:
    out["datasets"] = [_axolotl_set(data, data.train)]
    if data.validation:
        out["test_datasets"] = [_axolotl_set(data, data.validation)]
    else:
        out["val_set_size"] = data.split.validation
    _unsaid(data, wrong)
    return {}


def _axolotl_set(data: DataConfig, source: str) -> dict[str, Any]:
    columns, entry = data.columns, {"path": _file(source)}
    if data.task == "chat":
        return entry | {"type": "chat_template", "field_messages": columns.get("messages", "messages")}
    if data.task == "completion":
        return entry | {"type": "completion", "field": columns.get("text", "text")}
    if columns == {"instruction": "instruction", "input": "input", "response": "output"}:
        return entry | {"type": "alpaca"}
    names = {"field_instruction": columns.get("instruction") or columns.get("text", "instruction"),
             "field_output": columns.get("response") or columns.get("label", "output")}  # fmt: skip
    names |= {"field_input": columns["input"]} if "input" in columns else {}
    return entry | {"type": names}


def _factory_data(take, registry: Mapping) -> tuple[dict[str, Any], list[str]]:
    named, notes = take("dataset"), []
    folder, limit = take("dataset_dir", default="data"), take("max_samples")
    names = [part.strip() for part in named.split(",")] if isinstance(named, str) else list(named or [])
    if not names:
        return {}, ["the file names no data set: set data.train"]
    _rest(names, notes)
    known = registry.get(names[0])
    data: dict[str, Any] = {}
    if known is None:
        notes.append(f"data set {names[0]} is not in {folder}/dataset_info.json: set data.train and data.task")
    else:
        file = known.get("file_name")
        data["train"] = file if file and file.startswith("/") else f"{folder}/{file}" if file else f"hub:{known['hf_hub_url']}"
        columns = known.get("columns") or {}
        if known.get("formatting") == "sharegpt":
            data |= {"task": "chat", "columns": {"messages": columns.get("messages", "conversations")}}
        else:
            columns = columns or {"prompt": "instruction", "query": "input", "response": "output"}
            pairs = {"instruction": columns.get("prompt"), "input": columns.get("query"), "response": columns.get("response")}
            data |= {"task": "instruction", "columns": {n: c for n, c in pairs.items() if c}}
    data |= {"limit": int(limit)} if limit else {}
    if 0 < (share := take("val_size", default=0)) < 1:
        data["split"] = {"validation": share}
    return data, notes


def _write_factory(data: DataConfig, out: dict, wrong: list[str]) -> dict[str, Any]:
    columns, hub = data.columns, data.train.startswith("hub:")
    entry: dict[str, Any] = {"hf_hub_url": _file(data.train)} if hub else {"file_name": data.train}
    if data.task == "chat":
        entry |= {"formatting": "sharegpt", "columns": {"messages": columns.get("messages", "messages")},
                  "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                           "system_tag": "system"}}  # fmt: skip
    else:
        names = {"prompt": columns.get("instruction") or columns.get("text", "instruction"),
                 "response": columns.get("response") or columns.get("label", "output")}  # fmt: skip
        names |= {"query": columns.get("input")} if "input" in columns else {}
        entry["columns"] = names
    out |= {"dataset": "rows", "val_size": data.split.validation} | ({"max_samples": data.limit} if data.limit else {})
    if data.validation:
        wrong.append(f"data.validation {data.validation}: add it to dataset_info.json and name it in eval_dataset")
    wrong.append("template: name LLaMA-Factory's template for this model")
    _unsaid(data, wrong, limit=True)
    return {"rows": entry}


def _trl_data(take, registry: Mapping) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    entries = take("datasets") or []
    _rest(entries, notes)
    data: dict[str, Any] = {}
    if entries:
        files = entries[0].get("data_files")
        files = files.get("train") if isinstance(files, dict) else files[0] if isinstance(files, list) else files
        data["train"] = _source(files or entries[0]["path"], named=not files)
        take("dataset_name")
    elif name := take("dataset_name"):
        data["train"] = _source(name, named=True)
    else:
        return {}, ["the file names no data set: set data.train"]
    if (column := take("dataset_text_field")) is not None:
        data |= {"task": "completion", "columns": {"text": column}}
    else:
        notes.append("TRL tells the kind of rows from their columns: set data.task, for example chat (messages) or instruction")
    return data, notes


def _write_trl(data: DataConfig, out: dict, wrong: list[str]) -> dict[str, Any]:
    if data.train.startswith("hub:"):
        out["dataset_name"] = _file(data.train)
    else:
        kind = data.format or data.train.rsplit(".", 1)[-1]
        out["datasets"] = [{"path": "json" if kind in ("json", "jsonl") else kind, "data_files": {"train": data.train}}]
    if data.task == "completion":
        out["dataset_text_field"] = data.columns.get("text", "text")
    elif data.task != "chat":
        wrong.append("data.columns: TRL wants the columns prompt and completion (or messages); rename them in the file")
    if data.validation:
        wrong.append(f"data.validation {data.validation}: add it to data_files as test, and set dataset_test_split")
    _unsaid(data, wrong)
    return {}


def _unsaid(data: DataConfig, wrong: list[str], *, limit: bool = False) -> None:
    if data.template:
        wrong.append("data.template: the prompt is built by that program's own template")
    if data.limit and not limit:
        wrong.append(f"data.limit {data.limit}: all rows are used there")


__all__ = ["NAMES", "Foreign", "program_of", "read", "write"]
