"""Put the texts of others into a prompt so that nothing in them can act as part of it."""

import re
import unicodedata
from typing import Any

# Marks of a turn that are ordinary text to some tokenizers and structure to their models.
_TURNS = (
    r"<[|｜][^<>\n]{0,40}[|｜]>|\[/?(?:INST|SYS\w*|AVAILABLE_TOOLS|TOOL_\w+)\]|<</?SYS>>|"
    r"</?(?:s|bos|eos|pad|think|start_of_turn|end_of_turn)>|<(?:BEGIN|END) [A-Z ]{1,40}>"
)


def control_markers(tokenizer: Any) -> re.Pattern[str]:
    """Return what finds a tokenizer's special tokens, and the usual marks of a turn, in a text."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = {token for token in [*tokenizer.all_special_tokens, *added] if len(token.strip()) > 1}
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), f"(?i:{_TURNS})"]))


def neutralised(text: str, markers: re.Pattern[str]) -> str:
    """Return a text in which no control token is left: their words stay, without brackets.

    What only reads as one after Unicode's compatibility normalisation, which some tokenizers
    apply, counts too, and the normalised text is taken then. A text without any is left as it is
    but for blanks at either end.
    """
    plain = unicodedata.normalize("NFKC", text)
    plain = "".join(sign for sign in plain if unicodedata.category(sign) != "Cf")
    if markers.search(plain):
        text = plain
    while markers.search(text):
        text = markers.sub(_words_alone, text)
    return text.strip()


def fill(template: str, **texts: str) -> str:
    """Fill a template once: braces in the texts, and others in the template, stay as they are."""
    return re.sub("|".join(f"{{{name}}}" for name in texts), lambda m: texts[m[0][1:-1]], template)


def _words_alone(match: re.Match[str]) -> str:
    mark = match[0]
    if re.fullmatch(r"[\w\s]+", mark):
        return f"{mark[0]} {mark[1:]}"
    words = " ".join(re.findall(r"\w+", mark))
    return f" {words} "
