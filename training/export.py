"""A packaged model on its way out: a plain folder, its adapter, one GGUF file, or the hub.

Owns: `export` (verified, written aside, compared with what it was made from, replaced as a whole), `push`.
Must not know: studies, endpoints; how a GGUF file is laid out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from training import artifact, gguf, gguf_tokens
from training.errors import InputError, wrong
from training.model import EMBEDDED

FORMATS = ("safetensors", "adapter", "gguf-f16", "gguf-q8_0")
# How far a file may be from the model: the largest difference of a logit as a share of the largest logit, and the change of
# the perplexity as a share of it. Measured on a trained model of 261 K parameters: 0.001 and 0.00001 at float16, 0.022 and
# 0.003 at Q8_0; a wrong order of rows, a lost tensor or another tokenizer gives more than 0.3 and 1.
BOUNDS = {"gguf-f16": (0.005, 0.001), "gguf-q8_0": (0.1, 0.02)}
ROWS = 32  # of the embedded task, compared where no text is given


def export(model: str, output: str, format: str, *, text: Sequence[str] | None = None, replace: bool = False) -> dict:
    """Writes a packaged model in another form and proves that it says the same.

    Args:
        model: folder of a packaged model; every file is compared with its manifest first.
        output: folder to write, or the `.gguf` file. It appears whole or not at all.
        format: one of FORMATS.
        text: what a GGUF file is compared on; rows of the embedded task where none is given.
        replace: an export that is already at `output` is replaced as a whole.

    Returns:
        `path`, `format`, `bytes`, `source` (digest of the model); for folders `digest`; for GGUF `architecture`, `tokenizer`,
        `left_at_f16` and `check`: what `compare` found, with the bounds.

    Raises:
        InputError: the model does not verify, cannot be written in that form, or reads back differently; nothing is written.
    """
    if format not in FORMATS:
        raise wrong("export.format", f"{format!r} is none of {', '.join(FORMATS)}.")
    found = artifact.verify(model)
    if found.manifest.get("kind") not in ("model", "merged"):
        raise wrong(str(model), f"this is no model, but: {found.manifest.get('kind')}.", "Name a folder that a promotion made.")
    place = _place(Path(model), Path(output).expanduser().absolute(), format, replace)
    if format in BOUNDS:
        said = _file(found, place, format, text)
    else:
        said = _folder(found, place, format)
    return {"path": str(place), "format": format, "source": found.digest} | said


def _place(model: Path, output: Path, format: str, replace: bool) -> Path:
    """Returns where to write, after asking whether something is in the way."""
    model, place = model.resolve(), output.resolve()
    if place.is_relative_to(model) or model.is_relative_to(place):
        raise wrong("export.output", f"{output} and the model's own folder lie in each other.", "Name another place.")
    if format in BOUNDS and output.suffix != ".gguf":
        raise wrong("export.output", f"readers know the file by its ending, and {output.name} does not end in .gguf.")
    if output.exists() or output.is_symlink():
        if not replace:
            raise wrong("export.output", f"{output} exists.", "Name another place, or replace it.")
        ours = output.is_file() if format in BOUNDS else (output / artifact.MANIFEST).is_file()
        if not ours or output.is_symlink():
            raise wrong("export.output", f"{output} is no earlier export, and is left as it is.", "Name another place.")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def _folder(found, place: Path, format: str) -> dict:
    source = found.folder / "adapter" if format == "adapter" else found.folder
    if not source.is_dir():
        raise wrong(str(found.folder), "the model was packaged without its adapter.")
    record = {key: value for key, value in found.manifest.items() if key != "files"}
    if format == "adapter":  # its own manifest says what it was trained on
        own = source / artifact.MANIFEST
        record = json.loads(own.read_text()) if own.is_file() else record | {"kind": "adapter"}
        record.pop("files", None)

    def fill(aside: Path) -> dict:
        left_out = shutil.ignore_patterns(artifact.MANIFEST, *(() if format == "adapter" else ("adapter",)))
        shutil.copytree(source, aside, ignore=left_out, dirs_exist_ok=True)
        return record | {"source": found.digest}

    written = artifact.write(place, fill)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return {"bytes": size, "digest": written.digest}


def _file(found, place: Path, format: str, text: Sequence[str] | None) -> dict:
    gguf.needed()
    aside = place.with_name(f".{place.name}.{socket.gethostname()}.{os.getpid()}")
    _sweep(place)
    aside.mkdir()
    try:
        path = aside / place.name
        name = str(found.manifest.get("name") or place.stem)
        about = {"paretune.source.sha256": found.digest}
        said = gguf.write(found.folder, path, eight_bits=format == "gguf-q8_0", name=name, about=about)
        check = compare(found.folder, path, list(text) if text is not None else rows(), BOUNDS[format])
        size = path.stat().st_size
        artifact.sync(path)
        path.rename(place)
        artifact.sync(place.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {"bytes": size} | said | {"check": check}


def _sweep(place: Path) -> None:
    """Removes what killed processes of this machine left beside the file."""
    for left in place.parent.glob(f".{place.name}.{socket.gethostname()}.*"):
        pid = left.name.rsplit(".", 1)[-1]
        if not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (PermissionError, OverflowError):
            pass  # another user's process, so it lives


def rows(count: int = ROWS) -> list[str]:
    """Returns texts of the embedded task, prompt and answer."""
    lines = (EMBEDDED.parent / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return ["{instruction}\nAnswer: {response}".format(**json.loads(line)) for line in lines]


def compare(folder: Path, path: Path, text: Sequence[str], bounds: tuple[float, float]) -> dict:
    """Compares a GGUF file, read by transformers' own loader, with the model it was made from; both in float32 on the CPU.

    Two things that llama.cpp reads and transformers does not are taken from the model: the divided frequencies of Llama 3 and
    the splitting rule of SmolLM.

    Returns:
        `rows` and `tokens` compared; `logit_difference`, the largest, beside `logit_scale`, the largest logit; `perplexity` of
        the file beside `perplexity_before`; `bounds` as shares of the scale and of the perplexity.

    Raises:
        InputError: a bound is exceeded, a text is cut into other tokens, or there is no text.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"local_files_only": True, "trust_remote_code": False}
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **given).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    after, reader = gguf.read(path, like=before.config)
    gguf_tokens.restore(reader, tokenizer)
    difference = scale = 0.0
    loss, tokens, used = [0.0, 0.0], 0, 0
    for number, row in enumerate(text):
        ids = tokenizer(row)["input_ids"]
        if reader(row)["input_ids"] != ids:
            raise wrong("export", f"row {number} is cut into other tokens by the GGUF file's tokenizer.", gguf.INSTEAD)
        ids = torch.tensor([ids[: before.config.max_position_embeddings]], dtype=torch.long)
        if ids.shape[1] < 2:
            continue
        with torch.inference_mode():
            pair = [model(input_ids=ids, use_cache=False).logits[0] for model in (before, after)]
        difference = max(difference, _largest(pair[0] - pair[1]))
        scale = max(scale, _largest(pair[0]))
        for side, logits in enumerate(pair):
            loss[side] += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        used += 1
    if not tokens:
        raise wrong("export.text", "there is no row of at least two tokens to compare on.", "Give some text.")
    nats = [side / tokens for side in loss]
    share, moved = difference / scale if scale else math.inf, abs(math.expm1(min(700.0, nats[1] - nats[0])))
    if not (share <= bounds[0] and moved <= bounds[1]):  # also where one is no number
        raise wrong("export", f"read back, the file differs from the model: logits by {share:.2g} of their scale "
                    f"(bound {bounds[0]}), perplexity by {moved:.2g} (bound {bounds[1]}).", gguf.INSTEAD)  # fmt: skip
    return {
        "rows": used, "tokens": tokens, "logit_difference": difference, "logit_scale": scale,
        "perplexity": math.exp(nats[1]), "perplexity_before": math.exp(nats[0]), "bounds": list(bounds),
    }  # fmt: skip


def _largest(values) -> float:
    """Returns the largest absolute value; infinity where one is no number, which `max` would lose."""
    largest = values.abs().max().item()
    return math.inf if math.isnan(largest) else largest


def push(model: str, repo: str, *, private: bool = True, token_from: str = "HF_TOKEN", api=None) -> str:
    """Uploads a packaged model to the Hugging Face hub; files there that it does not have are deleted.

    Args:
        model: folder of a packaged model; every file is compared with its manifest first.
        repo: `owner/name`; made where it does not exist.
        private: of a new repository; a public one is refused where this is true.
        token_from: the environment variable that holds the token, which needs the right to write. It is in no message.
        api: a `huggingface_hub.HfApi` to use instead of one with the token.

    Returns:
        The address of the repository.

    Raises:
        InputError: the model does not verify, no token, a name that cannot be, or what the hub said.
    """
    from huggingface_hub import HfApi

    found = artifact.verify(model)
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise wrong("push.repo", f"{repo!r} is no repository's id.", "Write owner/name.")
    token = os.environ.get(token_from, "").strip()
    if not token:
        raise wrong("push", f"the environment has no {token_from}.", "Set it to a token of the hub that may write.")
    said = ""
    try:
        api = api or HfApi(token=token)
        url = str(api.create_repo(repo, repo_type="model", private=private, exist_ok=True))
        if private and not api.repo_info(repo, repo_type="model").private:
            raise wrong("push.repo", f"{repo} is public.", "Name another one, or say that it may be public.")
        api.upload_folder(repo_id=repo, repo_type="model", folder_path=found.folder, delete_patterns="*",
                          commit_message=f"Model {found.digest[:12]}")  # fmt: skip
        return url
    except InputError:
        raise
    except Exception as error:  # the hub's client raises its own, its HTTP library's and OS errors: all mean "not uploaded"
        said = f"{type(error).__name__}: {' '.join(str(error).split())}".replace(token, "<token>")[:300]
    # Outside the handler, so that the error does not carry along the other, which may name the token.
    raise wrong("push", f"{repo} was not uploaded ({said}).", "Check the name, the token's rights and the network.")
