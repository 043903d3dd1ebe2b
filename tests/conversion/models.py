"""Tiny random models of transformers, one for each architecture and option that revjax reads."""

import pathlib
from typing import Any

import tokenizers

VOCAB_SIZE, LAYERS = 101, 3
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
}
PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]

# class of the config: its options, beside `sizes`
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "gpt2, untied, wide, exact gelu": ("GPT2", dict(tie_word_embeddings=False, n_inner=80, activation_function="gelu")),
    "llama": ("Llama", {}),
    "llama, tied, biases": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama, kv heads, wide heads": ("Llama", dict(num_key_value_heads=1, head_dim=16)),
    "llama, linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})),
    "llama, dynamic": (
        "Llama",
        dict(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, max_position_embeddings=256),
    ),
    "llama, llama3": (
        "Llama",
        dict(rope_parameters=LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 128}),
    ),
    "llama, yarn": ("Llama", dict(rope_parameters=YARN | {"rope_theta": 1e4})),
    "llama, yarn by mscale": (
        "Llama",
        dict(rope_parameters=YARN | {"rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}),
    ),
    "llama, longrope": ("Llama", dict(rope_parameters=LONGROPE | {"rope_theta": 1e4})),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral, window": ("Mistral", dict(sliding_window=100, num_key_value_heads=2)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, num_key_value_heads=2)),
    "qwen3, biases, windows": (
        "Qwen3",
        dict(
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=64,
            layer_types=PATTERN,
        ),
    ),
    "gemma2": ("Gemma2", dict(head_dim=16, num_key_value_heads=2, sliding_window=100, query_pre_attn_scalar=24)),
    "gemma2, no caps": (
        "Gemma2",
        dict(
            head_dim=8,
            sliding_window=100,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
        ),
    ),
    "gemma3": ("Gemma3Text", dict(head_dim=16, num_key_value_heads=1, sliding_window=100)),
    "gemma3, scaled, pattern": (
        "Gemma3Text",
        dict(
            head_dim=8,
            sliding_window=100,
            layer_types=PATTERN,
            tie_word_embeddings=False,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ),
}
LM_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def make_hf(name: str, seed: int = 0, **sizes: Any) -> Any:
    """A model of `CASES`, in eval mode, whose every parameter is random."""
    import torch
    import transformers

    kind, options = CASES[name]
    is_gpt2 = kind == "GPT2"
    names = ("n_embd", "n_layer", "n_head") if is_gpt2 else ("hidden_size", "num_hidden_layers", "num_attention_heads")
    own = {} if is_gpt2 else {"num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 1024}
    given = {"vocab_size": VOCAB_SIZE, **dict(zip(names, (32, LAYERS, 4), strict=True)), **own, **options, **sizes}
    config = getattr(transformers, f"{kind}Config")(**given, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, LM_CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def save_hf(model: Any, folder: pathlib.Path, **options: Any) -> pathlib.Path:
    """Saves it with a tokenizer of its own."""
    model.save_pretrained(folder, **options)
    return save_tokenizer(folder)


def save_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer.json of words: w1, w2, ..."""
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
