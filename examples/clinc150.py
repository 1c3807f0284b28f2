"""Turns CLINC150 (clinc/oos-eval: data_full.json, domains.json) into JSONL rows of text and domain.

python examples/clinc150.py FOLDER_OF_CLINC150 OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SPLITS = {"train": "train", "val": "validation", "test": "test"}


def convert(source: Path, out: Path) -> None:
    """Writes OUT/{train,validation,test}.jsonl; rows are spread so that any head of a file has every domain."""
    rows = json.loads((source / "data_full.json").read_text())
    domains = json.loads((source / "domains.json").read_text())
    domain_of = {intent: name.replace("_", " ") for name, intents in domains.items() for intent in intents}
    out.mkdir(parents=True, exist_ok=True)
    for theirs, ours in SPLITS.items():
        known = [{"text": text, "label": domain_of[intent]} for text, intent in rows[theirs]]
        stride = 1009  # a prime that divides no split's length, so this visits every row once
        spread = [known[i * stride % len(known)] for i in range(len(known))]
        (out / f"{ours}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spread))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
