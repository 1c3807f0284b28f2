"""The pretraining text: short English-like documents, generated from the templates below.

Owns what the embedded model can learn before any fine-tuning: spelling, grammar, which words keep company, what
is sold with what, and the habit of writing a short note after a passage. It must not contain the task: no document
gives a message a department, and no note is about a trouble with an order.
"""

import random
from collections.abc import Iterator

from training.embedded.lexicon import FACTS, PEOPLE, PRODUCTS, RANGE_OF, RANGES, SLOTS, TIMES, fill, polish

# What each desk of a shop is for. Stories put the desk's name near its own words.
DESKS = {
    "billing": ("invoices", "payments", "receipts", "charges", "bank cards", "wrong amounts"),
    "delivery": ("parcels", "couriers", "late vans", "addresses", "tracking", "shipments"),
    "repairs": ("broken things", "spare parts", "strange noises", "cracks", "motors", "loose screws"),
    "returns": ("exchanges", "wrong colours", "wrong sizes", "gifts that go back", "boxes sent back"),
    "account": ("passwords", "logins", "profiles", "user names", "email addresses", "codes to sign in"),
    "setup": ("manuals", "guides", "first steps", "drawings", "how to install things", "how to connect things"),
    "sales": ("prices", "discounts", "stock", "new models", "quotes", "advice before one buys"),
    "safety": ("smoke", "sparks", "shocks", "burns", "fire", "sharp edges"),
}

# Scenes from other walks of life: they carry the notes.
SCENES = {
    "garden": (
        "{who} dug a bed for the {crop} behind the {place}",
        "the {crop} of {who} grew well near the {place}",
        "{who} watered the {crop} and swept the {place}",
    ),
    "songs": (
        "{who} played an old song in the {place} on the {crop} day",
        "the choir of {who} sang in the {place}",
        "{who} learned a slow tune about a {crop} field by the {place}",
    ),
    "weather": (
        "{who} saw dark clouds over the {place} and the {crop}",
        "rain fell on the {crop} and {who} ran to the {place}",
        "a cold wind blew from the {place} and {who} covered the {crop}",
    ),
    "meals": (
        "{who} made a soup of {crop} for the people of the {place}",
        "{who} baked a pie with {crop} near the {place}",
        "at the {place} {who} fried {crop} with salt",
    ),
    "travel": (
        "{who} took the train to the {place} with a bag of {crop}",
        "{who} walked from the {place} past the {crop}",
        "the bus brought {who} and the {crop} to the {place}",
    ),
    "school": (
        "{who} taught the children to draw a {crop} at the {place}",
        "{who} wrote a test about {crop} in the {place}",
        "the class of {who} counted {crop} in the {place}",
    ),
    "sport": (
        "{who} won the race around the {place} and got a basket of {crop}",
        "{who} threw a ball from the {place}",
        "the team of {who} trained at the {place} and ate {crop}",
    ),
    "market": (
        "{who} sold {crop} at a stall by the {place}",
        "{who} bought {crop} from the old man at the {place}",
        "there was a crowd at the {place} when {who} brought {crop}",
    ),
}

OTHER = {
    "crop": (
        "apple",
        "bean",
        "cabbage",
        "cherry",
        "corn",
        "lemon",
        "melon",
        "onion",
        "pear",
        "pepper",
        "plum",
        "potato",
        "rice",
        "rose",
        "tulip",
        "wheat",
        "carrot",
        "berry",
    ),
    "place": (
        "harbour",
        "bridge",
        "church",
        "mill",
        "tower",
        "station",
        "library",
        "farm",
        "square",
        "lake",
        "hill",
        "museum",
        "theatre",
        "castle",
        "school",
        "inn",
        "valley",
        "forest",
    ),
    "mood": ("calm", "happy", "tired", "proud", "angry", "sad", "curious", "worried"),
    "feel": ("felt", "was", "seemed", "looked"),
    "went": ("went to", "wrote to", "phoned", "asked", "waited at", "sent a letter to", "was sent to"),
    "said": ("said", "told the clerk", "wrote", "explained", "thought"),
    "hurry": (
        "it was urgent",
        "there was a great hurry",
        "the need was high",
        "nobody could wait",
        "it was an emergency",
        "it was of high importance",
        "every minute counted",
        "the rush was high",
    ),
    "usual": (
        "it was a normal day",
        "nothing was unusual",
        "it was normal work",
        "there was some time but not much",
        "it was an ordinary case",
        "the need was normal",
    ),
    "calm": (
        "there was no hurry",
        "it could wait",
        "there was no rush at all",
        "the need was low",
        "nobody minded waiting",
        "it was of low importance",
        "there was plenty of time",
    ),
    "use": (
        "useful at home",
        "found in many houses",
        "made of wood and steel",
        "kept in the {room}",
        "older than one thinks",
        "easy to clean",
        "sold in {colour} and {colour}",
        "too heavy for a child",
        "seen in the {room} of {person}",
    ),
    "greeting": ("Hello.", "Good morning.", "Dear {person},", "Dear team,", "Hi,", "My dear {person},"),
    "carry": ("carried", "bought", "found", "lost", "painted", "cleaned", "sold", "borrowed", "hid", "packed"),
}

# Sentences and wishes of private letters.
NEWS = (
    "I paid for my {p} with the money that you left here",
    "my neighbour was billed for two of them, why",
    "please correct the name of my street",
    "you took the {p} and I have the {o}",
    "I am still waiting for your visit",
    "where is my {p}?",
    "the courier rang at my {door} and handed over a {p}",
    "I was happy with the {p} last year",
    "nobody knows what to do with the {o}",
    "I would like to have the {p} mended",
    "can you mend the {o}?",
    "I have a spare {part} here",
    "the {p} shakes when the {part} is loose",
    "I would like to send you a {p}",
    "can I swap the {p} for your {o}?",
    "I do not want the {o} any longer",
    "I asked for a {colour} {p} and got a {o}",
    "I cannot log in to read your email",
    "I forgot my password",
    "please change the name in my profile",
    "your site says that the {p} is listed under an old name",
    "I want to register for the class",
    "how do I connect the {p} to the {o}?",
    "I do not understand the drawing that you made",
    "which {part} do I fix first?",
    "could you explain how the {p} is put together?",
    "do you still sell your {p}?",
    "what would {number} pieces of it cost?",
    "I am thinking of buying a {p}",
    "which {p} would you recommend?",
    "I got a {p} from your sister",
    "flames came out of the house on the hill",
    "my child was hurt by the {o}",
    "it began to smoke in my {room}",
    "the {p} I bought with it is fine",
    "the {o} came on time and works well",
    "my {p} was paid without any trouble",
    "this is not about the {o}",
    "I have no question about the {p}",
    "setting up the {o} was easy",
    "I could log in when I ordered the {p}",
    "I sent the {o} back before",
    "nothing is wrong with my {p}",
    "the price of the {p} was good, the invoice was correct",
)
WISHES = {
    "high": (
        "please answer {t}, it is urgent",
        "I need this solved {t}",
        "I cannot wait any longer, come {t}",
        "my guests are here {t}",
        "it is an emergency, help me {t}",
        "every hour counts, everything stands still",
    ),
    "normal": (
        "please answer {t}",
        "I hope to hear from you {t}",
        "thank you for your help, kind regards",
        "let me know what to do {t}",
        "please look into it {t}",
    ),
    "low": (
        "please answer {t}",
        "there is no hurry, {t} will do",
        "take your time, I can wait",
        "I do not mind waiting",
        "it is not important, I only wonder",
        "it can be solved {t}, take your time",
    ),
}

_SLOTS = SLOTS | OTHER | SCENES
_PACE = {"high": "hurry", "normal": "usual", "low": "calm"}


def _desk_story(rng: random.Random) -> str:
    """Somebody has a thing and a trouble, and turns to the desk that deals with it; a second thing is in the way."""
    desk = rng.choice(list(DESKS))
    level = rng.choice(list(TIMES))
    thing, other = rng.sample(PRODUCTS, 2)
    who = rng.choice(PEOPLE)
    fact = fill(rng.choice(FACTS[desk]), rng, _SLOTS, p=thing)
    parts = [
        rng.choice(
            (
                f"{who} had a {thing} and a {other}.",
                f"{who} {{carry}} a {thing} last week.",
                f"In the {{room}} of {who} there was a {thing} next to the {other}.",
                f"The {other} of {who} was fine.",
            )
        ),
        rng.choice((f"But {fact}.", f"{fact}.", f"One day {fact}.", f'{who} {{said}}: "{fact}."')),
        rng.choice(
            (
                f"{who} {{went}} the {desk} desk about the {thing}.",
                f"So the {desk} desk heard about the {thing}.",
                f"That was work for {desk}.",
                f"The people of {desk} know all about {rng.choice(DESKS[desk])}.",
            )
        ),
        rng.choice(
            (
                f"{{{_PACE[level]}}}, so it was done {rng.choice(TIMES[level])}.",
                f'"Do it {rng.choice(TIMES[level])}," {{said}} {who}, "{{{_PACE[level]}}}."',
                f"{{{_PACE[level]}}}.",
            )
        ),
    ]
    parts.insert(
        rng.randint(2, 4),
        rng.choice(
            (
                f"{who} had bought it in the {RANGE_OF[thing]} hall.",
                f"It was one of the {RANGE_OF[thing]} goods.",
                f"The {RANGE_OF[thing]} hall sells it.",
            )
        ),
    )
    if rng.random() < 0.3:
        del parts[rng.randrange(len(parts))]
    return fill(" ".join(parts), rng, _SLOTS)


def _desk_words(rng: random.Random) -> str:
    """What a desk deals with."""
    desk = rng.choice(list(DESKS))
    first, second = rng.sample(DESKS[desk], 2)
    return fill(
        rng.choice(
            (
                f"The {desk} desk deals with {first} and {second}. {{person}} works there.",
                f"{desk} means {first}, {second} and the like.",
                f"Whoever has a question about {first} or {second} asks for {desk}.",
            )
        ),
        rng,
        _SLOTS,
    )


def _pace(rng: random.Random) -> str:
    """How soon something is needed, in words that agree with each other."""
    level = rng.choice(list(TIMES))
    first, second = rng.sample(TIMES[level], 2)
    kind = _PACE[level]
    return fill(
        rng.choice(
            (
                f"{{person}} wanted the {{product}} {first}. {{{kind}}}. {{{kind}}}.",
                f'"{{{kind}}}," {{said}} {{person}}. "{first} or {second}," {{said}} {{person}}.',
                f"{{{kind}}}. The {{product}} was needed {first}, {second}, and the stress was {level}.",
            )
        ),
        rng,
        _SLOTS,
    )


def _note(rng: random.Random) -> str:
    """A scene from another walk of life, and a note that names its topic, its people and the goods that they carry."""
    topic = rng.choice(list(SCENES))
    who, (thing, other) = rng.choice(PEOPLE), rng.sample(PRODUCTS, 2)
    place, crop, mood = (rng.choice(OTHER[slot]) for slot in ("place", "crop", "mood"))
    scene = fill(rng.choice(SCENES[topic]), rng, _SLOTS, who=who, place=place, crop=crop)
    parts = [
        f"{scene}.",
        f"{who} {{feel}} {mood}.",
        f"{who} {{carry}} a {thing}.",
    ]
    if rng.random() < 0.5:
        parts.append(rng.choice((f"A {other} lay on the ground.", f"There was a {other} too.", f"Nobody saw the {other}.")))
    rng.shuffle(parts)
    fields = {"topic": topic, "who": who, "where": place, "mood": mood, "goods": RANGE_OF[thing]}
    names = rng.sample(list(fields), rng.randint(2, 4))
    values = [fields[name] for name in names]
    note = rng.choice(
        (
            "Note: " + "; ".join(values),
            "Summary: " + ", ".join(values),
            "Diary: " + " / ".join(values),
            "Card: " + " - ".join(values),
            "Log: " + " | ".join(values),
            "\n".join(f"{name}: {fields[name]}" for name in names),
        )
    )
    return fill(" ".join(parts), rng, _SLOTS) + "\n" + note


def _letter(rng: random.Random) -> str:
    """A private letter: the first person, and requests that agree with how soon they are meant."""
    level = rng.choice(list(TIMES))
    thing, other = rng.sample(PRODUCTS, 2)
    news = [fill(part, rng, _SLOTS, p=thing, o=other) for part in rng.sample(NEWS, 2)]
    wish = fill(rng.choice(WISHES[level]), rng, _SLOTS, t=rng.choice(TIMES[level]))
    if rng.random() < 0.3:
        news.reverse()
    news.append(rng.choice((f"the {thing} is from the {RANGE_OF[thing]} hall", f"I like {RANGE_OF[thing]} goods")))
    body = " ".join(part if part.endswith("?") else part + "." for part in (*news, wish))
    return fill(f"{{greeting}} {body}", rng, _SLOTS)


def _list(rng: random.Random) -> str:
    """A list of things that is read twice: the plainest lesson in copying."""
    words = rng.choice((PRODUCTS, OTHER["crop"], OTHER["place"], PEOPLE, (*PRODUCTS, *OTHER["crop"], *PEOPLE)))
    line = rng.choice((", ", " and ", " ", "; ")).join(rng.sample(words, rng.randint(5, 14)))
    return fill(
        rng.choice(
            (
                f"{{person}} made a list: {line}. {{person}} read it again: {line}.",
                f"{line}. {line}.",
                f"First there were {line}, then there were {line}.",
            )
        ),
        rng,
        _SLOTS,
    )


def _thing(rng: random.Random) -> str:
    """Plain facts about a thing."""
    thing = rng.choice(PRODUCTS)
    name = RANGE_OF[thing]
    return fill(
        rng.choice(
            (
                f"A {thing} is {{use}}. The {thing} of {{person}} is {{colour}}. It is one of the {name} goods.",
                f"Whoever needs a {thing} goes to the {name} hall, where it is {{use}}.",
                f"Who sells the {thing}? The {name} hall.",
            )
        ),
        rng,
        _SLOTS,
    )


def _hall(rng: random.Random) -> str:
    """What a hall of the shop sells."""
    name = rng.choice(list(RANGES))
    goods = rng.sample(RANGES[name], rng.randint(3, 5))
    line = ", the ".join(goods[:-1]) + " and the " + goods[-1]
    return fill(
        rng.choice(
            (
                f"In the {name} hall there are the {line}.",
                f"The {line} are all {name} goods.",
                f"{{person}} works in the {name} hall and sells the {line}.",
            )
        ),
        rng,
        _SLOTS,
    )


KINDS = {_desk_story: 28, _desk_words: 5, _pace: 7, _letter: 20, _note: 28, _list: 2, _thing: 8, _hall: 6}


def documents(rng: random.Random) -> Iterator[str]:
    """Yields documents without end, the kinds mixed by weight."""
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        yield polish(rng.choices(kinds, weights)[0](rng))
