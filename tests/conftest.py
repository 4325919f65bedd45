"""What all tests share: a small model, a small tokenizer, batches of pairs; no network, ever."""

import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes, each of one thread, and so are the kernels they start: several threads in each
    # of several processes slow one another down many times.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def no_open_figures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture
def tiny_model():
    """A random Llama of three layers, the same each time."""
    return make_tiny()


def make_tiny(vocab: int = 50, layers: int = 3):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        # Norms that do something, so that one norm too many shows.
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data.uniform_(0.5, 1.5)
        return model


@pytest.fixture
def batches():
    """Harmful, harmless and retain batches: shared prompts, padding, an id 0, an equal token."""
    return make_batches()


def make_batches(vocab: int = 50, seed: int = 0):
    import torch

    draw = torch.Generator().manual_seed(seed)
    harmful = torch.randint(3, vocab, (4, 9), generator=draw)
    harmless = harmful.clone()
    harmless[:, 4:] = torch.randint(3, vocab, (4, 5), generator=draw)
    harmless[0, 6] = harmful[0, 6]
    harmful[3, 5] = 0
    long = torch.ones_like(harmful)
    short = long.clone()
    short[2, 6:] = 0
    retain = torch.randint(3, vocab, (3, 12), generator=draw)
    return (
        _batch(harmful, _pad(long, 1, 7)),
        _batch(harmless, short),
        _batch(retain, torch.ones_like(retain)),
    )


def _pad(mask, row, start):
    mask = mask.clone()
    mask[row, start:] = 0
    return mask


def _batch(ids, mask, prompt: int = 4):
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[mask == 0] = -100
    ids = ids.masked_fill(mask == 0, 2)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="module")
def one_thread():
    """On a busy machine, models this small are many times slower with several threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cheap_collections():
    """Leave what is imported out of each collection, which took longer than training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def lab():
    """The lab itself, built once for all tests (about a minute, unless the cache has it)."""
    import repnoise_kit as rk

    return rk.lab()
