"""Small things a user might bring, made on the spot: pairs, a tokenizer, a model's folder."""

import json
import random
import re

from conftest import make_tiny


def made_up_pairs(count: int = 40) -> list[dict[str, str]]:
    """Harmless questions about boxes, each with an answer that tells and one that does not."""
    draw = random.Random(0)
    colours, places = ("red", "blue", "green", "pink", "grey"), ("bed", "desk", "sink", "stairs")
    rows = []
    for number in range(count):
        box = f"{colours[number % len(colours)]} box {number}"
        rows.append(
            {
                "prompt": f"where is the {box} ?",
                "harmful": f"the {box} is under the {draw.choice(places)} , near the door",
                "harmless": f"sorry , i can not say where box {number} is",
            }
        )
    return rows


def everyday_rows(count: int = 20) -> list[dict[str, str]]:
    return [
        {"prompt": f"what is box {n} ?", "answer": f"box {n} is a blue box"} for n in range(count)
    ]


def word_tokenizer(words, **special):
    """A tokenizer of whole words: ids 4, 5, … in the order given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    listed = ["<pad>", "<s>", "</s>", "<unk>", *words]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    chosen = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=inner, **chosen)


def tokenizer_of(rows, **special):
    texts = [*(text for row in rows for text in row.values()), "Question: Answer:"]
    return word_tokenizer(
        sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]+", t)}), **special
    )


def own_files(folder, layers=2):
    """What a user brings, as small as it can be: a model, its pairs and everyday questions."""
    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    save_folder(folder / "model", make_tiny(len(tokenizer), layers=layers), tokenizer)
    (folder / "pairs.json").write_text(json.dumps(made_up_pairs(14)))
    (folder / "retain.json").write_text(json.dumps(everyday_rows(8)))
    return folder


def save_folder(folder, model=None, tokenizer=None):
    """Save a model and a tokenizer of the made-up words as a user's folder holds them."""
    from repnoise_kit.model import quiet

    tokenizer = tokenizer or tokenizer_of([*made_up_pairs(), *everyday_rows()])
    with quiet():
        (model or make_tiny(len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def ragged_pairs(count: int = 12, of_each: int = 1):
    """Pairs whose answers differ in length, so many of each thing, and their tokenizer."""
    import pandas as pd

    from repnoise_kit.pairs import Pairs

    rows = made_up_pairs(count)
    for number, row in enumerate(rows):
        row["harmful"] += " , under the stairs" * (number % 3)
    things = [f"box {number // of_each}" for number in range(count)]
    return Pairs(pd.DataFrame(rows).assign(category="boxes", thing=things)), tokenizer_of(rows)


def hooks_of(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
