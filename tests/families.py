"""Tiny models of the families the kit knows, and where transformers keeps their parts."""

import torch

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA_LIKE = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "Llama": LLAMA_LIKE,
    "Qwen2": LLAMA_LIKE,
    "Qwen3": LLAMA_LIKE,
    "Gemma2": {**LLAMA_LIKE, "final_logit_softcapping": 5.0},
    "Gemma3Text": LLAMA_LIKE,
    "Mistral": LLAMA_LIKE,
    "Phi3": LLAMA_LIKE,
    "Olmo2": LLAMA_LIKE,
    "Granite": {**LLAMA_LIKE, "logits_scaling": 3.0},
    "Cohere": {**LLAMA_LIKE, "logit_scale": 0.5},
    "GPTNeoX": {**SMALL, "intermediate_size": 32},
    "GPT2": {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2},
    "OPT": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16},
}
# Layers, norm, MLP and attention, read in the source of transformers: a second opinion.
_USUAL = ("model.layers", "model.norm", "mlp", "self_attn")
_OTHER = {
    "GPTNeoX": ("gpt_neox.layers", "gpt_neox.final_layer_norm", "mlp", "attention"),
    "GPT2": ("transformer.h", "transformer.ln_f", "mlp", "attn"),
    "OPT": ("model.decoder.layers", "model.decoder.final_layer_norm", "fc2", "self_attn"),
}
NAMES = {name: _OTHER.get(name, _USUAL) for name in FAMILIES}
# These norm what attention and MLP put out before it joins the stream.
NORMED = ("Gemma2", "Gemma3Text", "Olmo2")


def family(name: str, vocab: int = 50):
    """A random model whose layers, norms and head all do something that shows."""
    import transformers

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = FAMILIES[name] | {"vocab_size": vocab}
    config = getattr(transformers, f"{name}Config")(**sizes, **special)
    stem = name.removesuffix("Text")
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, stem + suffix)(config).eval()
        for weight in model.parameters():
            weight.data += 0.3 * torch.randn_like(weight)
    return model
