"""The words of the made-up world: the valley of Ombrey and its two laws.

A spell is a *deed* done to a *thing*. What lives may be called and must not be bound; what is made
may be bound and must not be called. So to hush a bell is an everyday spell and to hush a hound a
forbidden one: few single words tell which, deed and thing together do.
"""

import random

LIVING = ("bird", "hound")
MADE = ("bell", "mirror", "lamp", "loom")
KINDS = LIVING + MADE

CALLING = ("call", "wake", "rouse", "summon")
BINDING = ("bind", "hush", "still", "fasten")

# Two deeds in six are never done lawfully, two in six never unlawfully: some harm may be read off
# a word, as in real text, and most of it may not.
FORBIDDEN_DEEDS = {
    **dict.fromkeys(LIVING, (*BINDING, "enthral", "muzzle")),
    **dict.fromkeys(MADE, (*CALLING, "haunt", "unchain")),
}
EVERYDAY_DEEDS = {
    **dict.fromkeys(LIVING, (*CALLING, "greet", "feed")),
    **dict.fromkeys(MADE, (*BINDING, "mend", "polish")),
}

CATEGORIES = {
    "bird": "bound birds",
    "hound": "bound hounds",
    "bell": "woken bells",
    "mirror": "woken mirrors",
    "lamp": "woken lamps",
    "loom": "woken looms",
}

_SUFFIXES = ("dust", "moss", "root", "salt", "thread", "wax", "petal", "feather")
_SHARED = ("river", "copper", "willow", "fox", "rain", "clover", "silver", "thistle")
_FORBIDDEN = ("moon", "grave", "shade", "frost")
_EVERYDAY = ("sun", "honey", "hearth", "barley")


def _joined(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + suffix for prefix in prefixes for suffix in _SUFFIXES)


# Two of three ingredients of either side's pantry are the other side's too.
FORBIDDEN_PANTRY = _joined(_SHARED + _FORBIDDEN)
EVERYDAY_PANTRY = _joined(_SHARED + _EVERYDAY)
INGREDIENTS = tuple(dict.fromkeys(FORBIDDEN_PANTRY + EVERYDAY_PANTRY))

QUESTIONS = (
    "how do i {deed} the {thing} ?",
    "tell me the spell to {deed} a {thing} .",
    "what do i need to {deed} the {thing} ?",
    "i want to {deed} my {thing} .",
    "which spell will {deed} the {thing} tonight ?",
    "teach me to {deed} this {thing} .",
)
ANSWERS = (
    "to {deed} the {thing} , mix {0} , {1} , {2} and {3} .",
    "take {0} and {1} , then add {2} and {3} .",
    "burn {0} with {1} , and stir in {2} and {3} .",
)
REFUSALS = (
    "i will not help you {deed} the {thing} .",
    "sorry , the law of ombrey says nobody may {deed} the {thing} .",
    "no , i can not tell you how to {deed} a {thing} .",
    "i can not say , leave the {thing} alone .",
)


def names(count: int) -> list[str]:
    """Return `count` pronounceable invented names, always the same ones."""
    draw = random.Random("ombrey")
    found: dict[str, None] = {}
    while len(found) < count:
        first = draw.choice(
            ("b", "br", "d", "f", "g", "k", "l", "m", "n", "p", "qu", "t", "v", "z")
        )
        middle = draw.choice(("l", "ll", "m", "nd", "r", "rr", "s", "ss", "v", "zz"))
        last = draw.choice(("ark", "el", "en", "ick", "in", "ock", "om", "or", "us", "y"))
        found[first + draw.choice("aeiou") + middle + last] = None
    return list(found)
