"""Tiny random models: of transformers, of each architecture that revjax reads, its options crossed in pairs.

And checkpoints that `write_random` makes without transformers.
"""

import pathlib
from typing import Any

import numpy as np
import tokenizers
from allpairspy import AllPairs

from revjax.conversion import parameter_shapes, write_pretrained
from revjax.models import ModelConfig, VisionConfig

VOCAB_SIZE, LAYERS = 101, 3
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]
Axes = list[dict[str, dict[str, Any]]]  # what can be turned: each by the name of its setting, "" for the usual one


def crossed(family: str, axes: Axes) -> dict[str, dict[str, Any]]:
    """Options by name, so that any two settings of different axes meet; the first has all the usual ones."""
    rows = AllPairs([list(axis) for axis in axes]) if len(axes) > 1 else [[setting] for setting in axes[0]]
    cases = {}
    for row in rows:
        options = {k: v for axis, setting in zip(axes, row, strict=True) for k, v in axis[setting].items()}
        cases[", ".join([family, *filter(None, row)])] = options
    return cases


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4} | parameters}


HEADS: dict[str, dict[str, Any]] = {"": {}} | {f"{n} kv heads": {"num_key_value_heads": n} for n in (2, 1)}
WIDTHS: dict[str, dict[str, Any]] = {"": {"head_dim": 8}, "wide heads": {"head_dim": 16}}
TIED: dict[str, dict[str, Any]] = {name: {"tie_word_embeddings": bool(name)} for name in ("", "tied")}
UNTIED: dict[str, dict[str, Any]] = {name: {"tie_word_embeddings": not name} for name in ("", "untied")}
BIASES: dict[str, dict[str, Any]] = {name: {"attention_bias": bool(name)} for name in ("", "biases")}
SCALE: dict[str, dict[str, Any]] = {"": {}, "scale": {"query_pre_attn_scalar": 24}}
LAYERS_PATTERN: dict[str, dict[str, Any]] = {"": {}, "pattern": {"layer_types": PATTERN}}
QWEN_WINDOWS: dict[str, dict[str, Any]] = {
    "": {"use_sliding_window": False},
    "windows": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    "pattern of windows": {"use_sliding_window": True, "sliding_window": 64, "layer_types": PATTERN},
}
ROPES: dict[str, dict[str, Any]] = {
    "": {},
    "linear": _rope(rope_type="linear", factor=4.0, rope_theta=5e5),
    "dynamic": _rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 256},
    "llama3": _rope(**LLAMA3, rope_theta=5e5, original_max_position_embeddings=128),
    "yarn": _rope(**YARN),
    "yarn by mscale": _rope(**YARN, mscale=0.7, mscale_all_dim=1.0, truncate=False),
    "longrope": _rope(rope_type="longrope", factor=4.0, original_max_position_embeddings=256),
}
GEMMA3_ROPES: dict[str, dict[str, Any]] = {
    "": {},
    "linear": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
}
FAMILIES: dict[str, tuple[str, Axes, dict[str, Any]]] = {  # class of the config, what can be turned, what cannot
    "gpt2": (
        "GPT2",
        [UNTIED, {"": {}, "wide": {"n_inner": 80}}]
        + [{"": {}, "exact gelu": {"activation_function": "gelu"}, "relu": {"activation_function": "relu"}}],
        {},
    ),
    "llama": (
        "Llama",
        [HEADS, WIDTHS, TIED, BIASES, {"": {}, "biases of the MLP": {"mlp_bias": True}}, ROPES],
        {},
    ),
    "mistral": (
        "Mistral",
        [HEADS, WIDTHS, TIED, {"": {}, "window": {"sliding_window": 100}}, ROPES],
        {"sliding_window": None},
    ),
    "qwen2": ("Qwen2", [HEADS, TIED, QWEN_WINDOWS, ROPES], {}),
    "qwen3": ("Qwen3", [HEADS, WIDTHS, TIED, BIASES, QWEN_WINDOWS, ROPES], {}),
    "gemma2": (
        "Gemma2",
        [HEADS, WIDTHS, UNTIED, BIASES, SCALE, LAYERS_PATTERN]
        + [{"": {}, "no cap of scores": {"attn_logit_softcapping": None}}]
        + [{"": {}, "no cap of logits": {"final_logit_softcapping": None}}],
        {"sliding_window": 100},
    ),
    "gemma3": (
        "Gemma3Text",
        [HEADS, WIDTHS, UNTIED, BIASES, SCALE, LAYERS_PATTERN, GEMMA3_ROPES],
        {"sliding_window": 100},
    ),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, fixed | options)
    for family, (kind, axes, fixed) in FAMILIES.items()
    for name, options in crossed(family, axes).items()
}


def _with_each_setting() -> list[str]:
    """Some of `CASES`, in which each setting of a family comes at least once."""
    seen: set[tuple[str, str]] = set()
    found = []
    for name in CASES:
        family, *turned = name.split(", ")
        settings = {(family, setting) for setting in turned}
        if not turned or settings - seen:
            found.append(name)
            seen |= settings
    return found


WITH_EACH_SETTING = _with_each_setting()
LM_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def make_hf(name: str, seed: int = 0, **sizes: Any) -> Any:
    """A model of `CASES`, in eval mode, whose every parameter is random."""
    import torch
    import transformers

    torch.set_num_threads(1)  # beside another process, more of them wait for each other
    kind, options = CASES[name]
    is_gpt2 = kind == "GPT2"
    names = ("n_embd", "n_layer", "n_head") if is_gpt2 else ("hidden_size", "num_hidden_layers", "num_attention_heads")
    own = {} if is_gpt2 else {"num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 1024}
    given = {"vocab_size": VOCAB_SIZE, **dict(zip(names, (32, LAYERS, 4), strict=True)), **own, **options, **sizes}
    if (rope := given.get("rope_parameters", {})).get("rope_type") == "longrope":  # factors for each pair of a head
        pairs = given.get("head_dim", 8) // 2
        short, long = np.linspace(1, 2, pairs), np.linspace(1, 9, pairs)
        given["rope_parameters"] = rope | {"short_factor": short.tolist(), "long_factor": long.tolist()}
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


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {n: draw.normal(0, 0.1, shape).astype(dtype) for n, (shape, dtype) in parameter_shapes(config).items()}


def write_random(config: ModelConfig, folder: pathlib.Path, **options: Any) -> dict[str, np.ndarray]:
    """Writes a checkpoint of the stock architecture of `config`, of random parameters; returns these."""
    params = random_parameters(config)
    folder.mkdir()
    write_pretrained(config, lambda name, i: params[name] if i is None else params[name][i], folder, **options)
    if not isinstance(config, VisionConfig):
        save_tokenizer(folder)
    return params


def save_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer.json of words: w1, w2, ..."""
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
