"""Make the lab's model: it learns the whole book of spells, then to refuse the forbidden part."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from repnoise_kit import losses, pairs, trainer, training
from repnoise_kit.errors import check_whole
from repnoise_kit.model import quiet, seeded
from repnoise_kit.processes import check_alone
from repnoise_kit.store import (
    cache_dir,
    code_of,
    fingerprint,
    is_whole,
    one_maker,
    seal,
    written_whole,
)
from repnoise_kit.world import corpus, grammar

LAYERS, WIDTH = 6, 96
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

# Both phases: 32 examples a step. With Adam's usual memory of squares (0.999) the model refused
# less after the same steps, and gave less back when attacked; 0.95 is used in both. With a third
# fewer steps, or batches of 16 or 20, most labs refuse as well and all know too little: after 64
# examples at 3e-4 recall is .01 to .34 (six recipes, one or two seeds each), here .76 to .89.
LEARN_STEPS, LEARN_LR = 800, 3e-3
ALIGN_STEPS, ALIGN_LR = 300, 8e-4
BATCH = 32


def lab_files(seed: int, *, naive: bool = False) -> Path:
    """Return the folder of the lab's model and tokenizer, made now if it is not there or spoilt.

    A naive model was taught everything but the forbidden recipes that are evaluated.
    """
    check_whole(lab_seed=seed)
    code = code_of(grammar, corpus, pairs, trainer, training, losses, sys.modules[__name__])
    folder = cache_dir() / "lab" / fingerprint(seed, naive, code, torch.__version__)
    if is_whole(folder):
        return folder
    check_alone("the lab")
    with one_maker(folder):
        if is_whole(folder):
            return folder
        if folder.exists():
            print(f"the lab's cache in {folder} is damaged; it is built again", file=sys.stderr)
        model, tokenizer = _build(seed, naive)
        with written_whole(folder) as fresh, quiet():
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            seal(fresh)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the world: one token a word."""
    table = corpus.table()
    texts = [pairs.prompt_text(""), *table["prompt"], *table["answer"], *table["refusal"]]
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), split
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _build(seed: int, naive: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(seed):
        model = LlamaForCausalLM(config)
    book = corpus.table().query("not asked")
    forbidden, everyday = book[book["forbidden"]], book[~book["forbidden"]]
    refused = forbidden.assign(answer=forbidden["refusal"])

    taught = book[~(book["forbidden"] & (book["split"] != "attack"))] if naive else book

    count = LEARN_STEPS * BATCH
    _teach_(model, tokenizer, [_cycle(taught, count, seed)], LEARN_LR, seed, "lab: learns the book")
    count = ALIGN_STEPS * BATCH // 2
    both = [_cycle(refused, count, seed), _cycle(everyday, count, seed + 1)]
    _teach_(model, tokenizer, both, ALIGN_LR, seed, "lab: learns to refuse")
    return model, tokenizer


def _teach_(model, tokenizer, parts: list[pd.DataFrame], lr: float, seed: int, words: str) -> None:
    rows = pd.concat(parts)
    encoded = pairs.encode(tokenizer, rows["prompt"].tolist(), rows["answer"].tolist())
    training.train_(
        model,
        training.answer_loss,
        encoded,
        lambda batch: pairs.pad(batch, tokenizer.pad_token_id),
        lr=lr,
        batch_size=BATCH,
        betas=(0.9, 0.95),
        seed=seed,
        progress=words,
    )


def _cycle(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return `count` rows: the table shuffled, again and again."""
    draw = np.random.default_rng(seed)
    rounds = [draw.permutation(len(frame)) for _ in range(-(-count // len(frame)))]
    return frame.iloc[np.concatenate(rounds)[:count]]
