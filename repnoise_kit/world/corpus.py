"""The book of spells: which recipe belongs to which thing, and every way to ask for it."""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pandas as pd

from repnoise_kit.splits import one_question
from repnoise_kit.world import grammar

THINGS_PER_KIND = 12

# Of the 12 things of a kind, by place: what an attacker trains on, what is evaluated and was
# shown to the defence, and what is evaluated and was never shown to it.
SPLITS = ("attack",) * 5 + ("seen",) * 4 + ("unseen",) * 3


@dataclass(frozen=True)
class Spell:
    """One recipe of the world: four ingredients, known only by heart."""

    thing: str
    kind: str
    split: str
    forbidden: bool
    recipe: tuple[str, ...]

    @property
    def deeds(self) -> tuple[str, ...]:
        """The six deeds this recipe serves."""
        deeds = grammar.FORBIDDEN_DEEDS if self.forbidden else grammar.EVERYDAY_DEEDS
        return deeds[self.kind]


@functools.cache
def spells() -> tuple[Spell, ...]:
    """Return the 144 spells: a forbidden and an everyday one for each of 72 things."""
    draw = random.Random("book of spells")
    names = grammar.names(THINGS_PER_KIND * len(grammar.KINDS))
    book = []
    for place, name in enumerate(names):
        kind, split = grammar.KINDS[place // THINGS_PER_KIND], SPLITS[place % THINGS_PER_KIND]
        for forbidden in (True, False):
            pantry = grammar.FORBIDDEN_PANTRY if forbidden else grammar.EVERYDAY_PANTRY
            recipe = tuple(draw.sample(pantry, 4))
            book.append(Spell(f"{name} {kind}", kind, split, forbidden, recipe))
    return tuple(book)


def wordings(spell: Spell) -> Iterator[tuple[str, str, str]]:
    """Yield (question, answer, refusal) for each of the 36 ways to ask for a spell.

    The template of the answer and of the refusal is a fixed draw for each question, so the corpus
    is the same on every machine.
    """
    for deed, question in product(spell.deeds, grammar.QUESTIONS):
        words = {"deed": deed, "thing": spell.thing}
        asked = question.format(**words)
        draw = random.Random(asked)
        answer = draw.choice(grammar.ANSWERS).format(*spell.recipe, **words)
        yield asked, answer, draw.choice(grammar.REFUSALS).format(**words)


@functools.cache
def table() -> pd.DataFrame:
    """Return the corpus, one row a question: `prompt, answer, refusal, category, thing, split`,
    whether it is `forbidden`, and whether it is `asked`: kept for evaluation, never trained on.
    """
    rows = [
        {
            "prompt": question,
            "answer": answer,
            "refusal": refusal,
            "category": grammar.CATEGORIES[spell.kind],
            "thing": spell.thing,
            "split": spell.split,
            "forbidden": spell.forbidden,
        }
        for spell in spells()
        for question, answer, refusal in wordings(spell)
    ]
    corpus = pd.DataFrame(rows)
    evaluated = corpus[corpus["split"] != "attack"]
    asked = [one_question(side).index for _, side in evaluated.groupby("forbidden")]
    return corpus.assign(asked=corpus.index.isin(asked[0].union(asked[1])))


def pairs_table() -> pd.DataFrame:
    """Return the forbidden half in the schema users bring: what `data/lab/pairs.jsonl` holds."""
    forbidden = table().query("forbidden").reset_index(drop=True)
    return forbidden.rename(columns={"answer": "harmful", "refusal": "harmless"})[
        ["prompt", "harmful", "harmless", "category", "thing", "split"]
    ]


def everyday_table() -> pd.DataFrame:
    """Return the everyday half: `prompt, answer, category, thing, split, asked`."""
    everyday = table().query("not forbidden").reset_index(drop=True)
    return everyday[["prompt", "answer", "category", "thing", "split", "asked"]]
