"""A model's tokenizer in the words of a GGUF file.

Owns: `vocabulary` (tokens, their types, merges or scores, the name of the splitting rule), `restore`; which tokenizers have none.
Must not know: weights, how a file is laid out.
"""

from __future__ import annotations

import json
from pathlib import Path

from training.errors import InputError, wrong

INSTEAD = "Export it as safetensors."
# How byte-level tokenizers split text before they merge, by the name that llama.cpp knows it by. Any other split has no name
# in the format, and a reader that is told a wrong one makes other tokens without a word.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of the format


def vocabulary(folder: Path, size: int):
    """Reads the tokenizer of a model with `size` tokens and returns what adds it to a `gguf.GGUFWriter`.

    The function that is returned returns the tokenizer's kind and splitting rule by their names in the format.

    Raises:
        InputError: no tokenizer, or one that the format has no name for, with the reason.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise wrong("export", f"the model has no tokenizer that can be written ({first}).", INSTEAD) from None
    model, pre = _named(rules)
    tokens, types = _tokens(tokenizer, rules, size)
    begins, ends = _added(tokenizer)

    def add(writer) -> str:
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        if model == "gpt2":
            writer.add_token_merges([" ".join(pair) for pair in _merges(rules)])
        else:
            writer.add_token_scores(_scores(tokens, _merges(rules)))
            writer.add_add_space_prefix(_prefixed(rules))
        for token, put in (
            (tokenizer.bos_token_id, writer.add_bos_token_id),
            (tokenizer.eos_token_id, writer.add_eos_token_id),
            (tokenizer.unk_token_id, writer.add_unk_token_id),
            (tokenizer.pad_token_id, writer.add_pad_token_id),
        ):
            if token is not None:
                put(token)
        writer.add_add_bos_token(begins)
        writer.add_add_eos_token(ends)
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)
        return f"{model}/{pre}"

    return add


def restore(reader, tokenizer) -> None:
    """Gives the splitting rule to a tokenizer that transformers read from a file, where it does not know the rule's name."""
    if _named(json.loads(tokenizer.backend_tokenizer.to_str())) == ("gpt2", "smollm"):
        reader.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer


def _named(rules: dict) -> tuple[str, str]:
    """Returns the tokenizer's kind and the name of its splitting rule in the format.

    Raises:
        InputError: the format has no name for it.
    """
    model, normalizer, splitter = rules["model"], rules["normalizer"], rules["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        raise _nameless(f"its kind, {model['type']},")
    if model.get("byte_fallback"):
        if _prefixed(rules) is None:
            raise _nameless("the way it marks spaces")
        return "llama", "default"
    steps = splitter.get("pretokenizers", [splitter])
    level = steps[-1]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        raise _nameless("its splitting rule")
    if len(steps) == 1 and level.get("use_regex", True) and normalizer is None and not model.get("ignore_merges"):
        return "gpt2", "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    if steps[:-1] == [digits] and level.get("use_regex", True) and normalizer is None and not model.get("ignore_merges"):
        return "gpt2", "smollm"
    if len(steps) == 2 and steps[0].get("type") == "Split" and not level.get("use_regex", True):
        pre = SPLITS.get(steps[0]["pattern"].get("Regex"), "")
        # llama.cpp does not compose characters as Qwen's tokenizer does: text that is already composed is the same in both.
        normal = normalizer is None or (pre == "qwen2" and normalizer["type"] == "NFC")
        if pre and normal and bool(model.get("ignore_merges")) == (pre == "llama-bpe"):
            return "gpt2", pre
    raise _nameless("its splitting rule")


def _nameless(what: str) -> InputError:
    known = ", ".join(["gpt-2", "smollm", *SPLITS.values(), "SentencePiece's"])
    return wrong("export", f"the tokenizer cannot be written: {what} has no name in GGUF (known here: {known}).", INSTEAD)


def _prefixed(rules: dict) -> bool | None:
    """Says whether a SentencePiece-like tokenizer puts a space before the text; None where spaces are marked otherwise."""
    normalizer, splitter = rules["normalizer"] or {}, rules["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not splitter and steps[-1] == replaced:
        return {0: False, 1: True}.get(len(steps) - 1) if steps[:-1] in ([], [{"type": "Prepend", "prepend": "▁"}]) else None
    if splitter.get("type") == "Metaspace" and not normalizer and not splitter.get("split", True):
        return {"never": False, "first": True, "always": True}.get(splitter.get("prepend_scheme"))
    return None


def _merges(rules: dict) -> list[tuple[str, str]]:
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in rules["model"]["merges"]]


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Returns what SentencePiece would call the scores: the earlier a merge makes a token, the higher."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank[token]) if token in rank else -1e6 for token in tokens]


def _tokens(tokenizer, rules: dict, size: int) -> tuple[list[str], list[int]]:
    """Returns the tokens in the order of their numbers and their types; numbers that no token has are filled up."""
    found = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(found) >= size:
        raise wrong("export", f"the tokenizer has {max(found) + 1} tokens, the model only {size}.", INSTEAD)
    added = {entry["id"]: entry["special"] for entry in rules["added_tokens"]}
    tokens, types = [], []
    for number in range(size):
        token = found.get(number)
        if token is None:
            kind = UNUSED
        elif number == tokenizer.unk_token_id and rules["model"].get("byte_fallback"):
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number] else USER_DEFINED
        elif rules["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = BYTE
        else:
            kind = NORMAL
        tokens.append(f"[PAD{number}]" if token is None else token)
        types.append(kind)
    return tokens, types


def _added(tokenizer) -> tuple[bool, bool]:
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id
    return begins, len(ids) > len(plain) + begins and ids[-1] == tokenizer.eos_token_id
