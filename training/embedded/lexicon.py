"""The words that the pretraining text and the task share, and the expansion of templates.

Owns vocabulary only. It must not know what a document or a task row looks like: the text must teach the words and
the company they keep, and leave the task itself to fine-tuning.
"""

import random
import re

# The products of a shop, by range.
RANGES = {
    "cooking": ("kettle", "toaster", "blender", "mixer", "oven", "fridge", "freezer", "grill"),
    "furniture": ("sofa", "chair", "table", "shelf", "wardrobe", "mattress", "mirror", "carpet"),
    "tools": ("ladder", "drill", "hammer", "saw", "mower", "pump", "hose"),
    "computing": ("printer", "scanner", "monitor", "keyboard", "tablet", "router", "charger"),
    "music": ("piano", "guitar", "violin", "drum", "radio", "speaker", "headset"),
    "outdoor": ("tent", "backpack", "bicycle", "scooter", "helmet", "stroller", "suitcase"),
    "household": ("lamp", "heater", "fan", "vacuum", "iron", "washer", "dryer", "clock"),
    "optics": ("camera", "telescope", "microscope", "projector", "drone"),
}
RANGE_OF = {product: name for name, products in RANGES.items() for product in products}
PRODUCTS = list(RANGE_OF)

PEOPLE = (
    "Mara Tom Anna Leo Ida Paul Nora Finn Ruth Carl Vera Hugo Ella Max Greta Noel Sara Ben Lucy Otto Clara Emil Jane "
    "Rolf Mina Karl Olga Peter Lena David Rosa Simon Eva Martin Alma Jon"
).split()

# What happens, by department. The clauses fit a story as well as a message; {p} is the product.
FACTS = {
    "billing": (
        "the {card} was charged twice for the {p}",
        "the invoice for the {p} shows the wrong {sum}",
        "the bill for the {p} lists {a fee} that nobody {agreed}",
        "the payment for the {p} was taken {again}",
        "the {sum} on the receipt for the {p} does not match the price",
        "the tax on the invoice for the {p} is {much} too high",
        "the {card} statement shows two payments for one {p}",
    ),
    "delivery": (
        "the {parcel} with the {p} never {came}",
        "the courier left the {p} at the wrong {door}",
        "the tracking page for the {p} has not moved for {days}",
        "the van with the {p} is {days} late",
        "the driver could not find the {door} and took the {p} away",
        "the {parcel} with the {p} is stuck at the depot",
        "the {p} was sent to an old address",
    ),
    "repairs": (
        "the {p} {stopped} after {days}",
        "the {p} makes a {loud} noise and then stops",
        "a {part} of the {p} came off",
        "the {p} is broken and needs a new {part}",
        "the {part} of the {p} is cracked",
        "the {p} does not switch on any more",
        "the {p} works for a minute and then turns itself off",
    ),
    "returns": (
        "the {p} came in the wrong {colour}",
        "the {p} is too {big} for the {room} and has to go back",
        "the {p} is not the one in the picture",
        "the {p} was a gift and is still in its box, so it can be sent back",
        "somebody changed their mind about the {p} and wants to exchange it",
        "the {p} does not suit the {room} and should be taken back",
        "a {p} of another {colour} was ordered",
    ),
    "account": (
        "the password for the page of the {p} is {refused}",
        "the login with the {p} order is locked",
        "the profile shows somebody else's name next to the {p}",
        "the email address of the profile with the {p} must be changed",
        "the code to sign in and register the {p} never {came}",
        "the user name that belongs to the {p} is {refused}",
        "the sign in page for the {p} forgets the password",
    ),
    "setup": (
        "the manual of the {p} does not say which {part} goes first",
        "the guide for the {p} is missing a page",
        "the steps to install the {p} are hard to follow",
        "it is not clear how to connect the {p} in the {room}",
        "the drawing in the guide shows another {p}",
        "putting the {p} together takes {days} with this manual",
        "the {p} must be assembled and the steps are {unclear}",
    ),
    "sales": (
        "the {p} in {colour} is out of stock",
        "there may be a discount on ten pieces of the {p}",
        "the newer model of the {p} may be better than the old one",
        "it is hard to choose between the small {p} and the large one",
        "a {p} for the {room} would be a good thing to buy",
        "the price of the {p} may fall before the holidays",
        "a quote for {number} pieces of the {p} is wanted",
    ),
    "safety": (
        "there was smoke from the {p}",
        "the {p} gave somebody {a shock}",
        "sparks flew from the {part} of the {p}",
        "the {p} became so hot that it burnt the {room} floor",
        "the {p} smells of burning {plastic}",
        "a sharp edge of the {p} cut a hand",
        "a small fire began next to the {p}",
    ),
}

# Signs of how soon something is needed.
TIMES = {
    "high": (
        "at once",
        "today",
        "right now",
        "before tonight",
        "within the hour",
        "without any delay",
        "before tomorrow morning",
        "as fast as possible",
    ),
    "normal": ("this week", "in the next days", "in a few days", "by the end of the week", "in the usual time"),
    "low": (
        "some day",
        "whenever there is time",
        "next month",
        "in some weeks",
        "one of these months",
        "when all else is done",
    ),
}

SLOTS = {
    "card": ("card", "bank card", "credit card", "account"),
    "sum": ("amount", "sum", "total"),
    "a fee": ("a fee", "a charge", "an extra cost", "a tip"),
    "agreed": ("agreed to", "asked for", "knows"),
    "again": ("again", "two times", "a second time", "too early"),
    "much": ("much", "far", "a little", "clearly"),
    "parcel": ("parcel", "package", "box", "shipment"),
    "came": ("came", "arrived", "appeared", "turned up"),
    "door": ("door", "house", "street", "gate"),
    "days": ("two days", "three days", "a week", "some days", "ten days", "a day"),
    "stopped": ("stopped working", "broke", "failed", "died", "fell apart"),
    "loud": ("loud", "strange", "terrible", "deep", "sharp"),
    "part": ("handle", "cable", "button", "wheel", "cover", "screw", "switch", "leg", "motor", "hinge"),
    "colour": ("red", "blue", "green", "white", "black", "grey", "yellow", "brown"),
    "big": ("big", "small", "heavy", "wide", "tall", "narrow"),
    "room": ("kitchen", "hall", "garden", "office", "bedroom", "cellar", "attic", "workshop", "garage"),
    "refused": ("refused", "not accepted", "not known", "wrong"),
    "unclear": ("unclear", "in the wrong order", "too short", "hard to read"),
    "number": ("five", "six", "eight", "ten", "twelve", "twenty", "thirty"),
    "a shock": ("a shock", "an electric shock", "a burn"),
    "plastic": ("plastic", "rubber", "wire", "dust"),
    "person": tuple(PEOPLE),
    "product": tuple(PRODUCTS),
}

_SLOT = re.compile(r"\{([^{}]+)\}")


def fill(template: str, rng: random.Random, slots: dict[str, tuple[str, ...]] = SLOTS, **bound: str) -> str:
    """Returns `template` with every `{slot}` replaced, by its bound value or by a random one; slots may nest.

    Args:
        template: The text with slots.
        rng: Where the choices come from.
        slots: The alternatives of each slot.
        **bound: Values that are fixed for this text.

    Raises:
        KeyError: A slot is neither bound nor known.
    """
    while _SLOT.search(template):
        template = _SLOT.sub(lambda m: bound[m[1]] if m[1] in bound else rng.choice(slots[m[1]]), template)
    return template


def polish(text: str) -> str:
    """Returns `text` with a capital after each full stop, and `an` before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeio]|um)", r"\1n ", text)
    return re.sub(r'(^"?|[.!?] +|: ")([a-z])', lambda m: m[1] + m[2].upper(), text)
