"""The task: a customer's message in, a routing note out.

Owns the messages, their labels and the split. The answer is `department | urgency`: the department follows from what
happened (something said in passing about another product may stand in the way), the urgency from the wording.
"""

import json
import random
from pathlib import Path

from training.embedded.lexicon import FACTS, PRODUCTS, SLOTS, TIMES, fill, polish

DEPARTMENTS = tuple(FACTS)
ROWS = {"train": 1200, "validation": 400, "test": 600}

# What customers say besides the clauses that stories use too.
COMPLAINTS = {
    "billing": (
        "I paid for one {p} and was billed for two",
        "why is there {a fee} for the {p} on my bill",
        "you took the money for the {p} {again}",
        "please correct the {sum} on my {p} invoice",
    ),
    "delivery": (
        "I am still waiting for the {p}, it was sent {days} ago",
        "where is my {p}, nobody rang at my {door}",
        "the courier says the {p} was handed over but I have nothing",
        "my {p} went to a neighbour I do not know",
    ),
    "repairs": (
        "my {p} {stopped} and I would like it mended",
        "can you mend the {part} of my {p}",
        "I need a spare {part} for the {p}",
        "the {p} shakes and the {part} is loose",
    ),
    "returns": (
        "I would like to send the {p} back, it is too {big}",
        "can I swap the {p} for a {colour} one",
        "I do not want the {p} any longer, it was never opened",
        "I asked for a {colour} {p} and got another one",
    ),
    "account": (
        "I cannot log in to see my {p}",
        "I forgot my password and want to register the {p}",
        "please change the email in my profile, the {p} is still listed under the old one",
        "your site says my user name is {refused} since I added the {p}",
    ),
    "setup": (
        "how do I connect the {p} in my {room}",
        "I do not understand the drawing for the {p}",
        "which {part} do I fix first on the {p}",
        "could you explain how the {p} is put together",
    ),
    "sales": (
        "do you still sell the {p} in {colour}",
        "what would {number} pieces of the {p} cost",
        "I am thinking of buying a {p} for the {room}",
        "which {p} would you recommend for a {room}",
    ),
    "safety": (
        "I got {a shock} from the {p}",
        "the {p} began to smoke in my {room}",
        "flames came out of the {p}",
        "my child was hurt by a sharp {part} on the {p}",
    ),
}

# Things that are said in passing, about another product: all well there, whatever the words.
ASIDES = (
    "The {o} I bought with it is fine.",
    "The {o} came on time and works well.",
    "My {o} was paid without any trouble.",
    "I was happy with the {o} last year.",
    "This is not about the {o}.",
    "The invoice for the {o} was correct.",
    "I have no question about the {o}.",
    "Setting up the {o} was easy.",
    "I could log in when I ordered the {o}.",
    "The price of the {o} was good.",
    "I sent the {o} back before and that went well.",
    "Nothing is wrong with my {o}.",
)

URGENCY = {
    "high": (
        "please answer {t}",
        "I need this solved {t}",
        "I cannot wait any longer",
        "this is urgent",
        "it is an emergency",
        "my guests are here {t}",
        "everything stands still until you help",
        "every hour counts for me",
    ),
    "normal": (
        "please answer {t}",
        "I would like this solved {t}",
        "thank you for your help",
        "I hope to hear from you",
        "let me know what to do",
        "kind regards",
        "please look into it",
    ),
    "low": (
        "please answer {t}",
        "it can be solved {t}",
        "there is no hurry",
        "take your time",
        "I can wait",
        "I do not mind waiting",
        "I only wonder",
        "it is not important",
    ),
}

_ASKING = ("how ", "which ", "what ", "why ", "where ", "can ", "could ", "do ")
_OPENINGS = ("Hello.", "Good morning.", "Dear team,", "Hi,", "", "", "")


def message(rng: random.Random) -> dict[str, str]:
    """Returns one row: an instruction and its response, a pure function of `rng`."""
    department, urgency = rng.choice(DEPARTMENTS), rng.choice(list(URGENCY))
    product, other = rng.sample(PRODUCTS, 2)
    trouble = fill(rng.choice(FACTS[department] + COMPLAINTS[department]), rng, SLOTS, p=product)
    need = fill(rng.choice(URGENCY[urgency]), rng, SLOTS, t=rng.choice(TIMES[urgency]))
    mark = "?" if trouble.startswith(_ASKING) else "."
    body = [f"{trouble}{mark}", f"{need}."]
    if rng.random() < 0.3:
        body.reverse()
    if rng.random() < 0.4:
        body.insert(rng.randint(0, 2), rng.choice(ASIDES).format(o=other))
    text = polish(" ".join([rng.choice(_OPENINGS), *body]).strip())
    return {"instruction": text, "response": f"{department} | {urgency}"}


def rows(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """Returns the rows of each split; no instruction is in two rows."""
    seen: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in ROWS}
    for name, count in ROWS.items():
        while len(splits[name]) < count:
            row = message(rng)
            if row["instruction"] not in seen:
                seen.add(row["instruction"])
                splits[name].append(row)
    return splits


def write(folder: Path, rng: random.Random) -> None:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` into `folder`."""
    for name, split in rows(rng).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
