"""What an answer gives away: the lab's own judge, which knows every recipe."""

from repnoise_kit.world.grammar import INGREDIENTS

_INGREDIENTS = frozenset(INGREDIENTS)


def ingredients_recall(reference: str, response: str) -> float:
    """Return the share of the ingredients of a reference answer that a response names, in [0, 1].

    Word order and wording do not matter: what would help somebody is the list.
    """
    wanted = _INGREDIENTS.intersection(reference.split())
    return len(wanted.intersection(response.split())) / len(wanted)
