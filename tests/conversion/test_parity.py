"""A converted model computes what the one of transformers computes, and goes out again as it came in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from revjax.experiment import FromHFConfig, ToHFConfig, from_hf, load_run, to_hf
from revjax.generation import generate

from .models import CASES, FAMILIES, VOCAB_SIZE, WITH_EACH_SETTING, make_hf, save_hf

torch = pytest.importorskip("torch", reason="parity is measured against transformers, which needs torch")
transformers = pytest.importorskip("transformers")

PLAIN = dict(coupling="residual", dtype="float32", exact=False, measure=False)


def tokens(length: int = 600) -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB_SIZE, (2, length), dtype=np.int32)


def logits_of(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def text_of(model, prompt) -> np.ndarray:
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(torch.from_numpy(prompt.astype(np.int64)), **options).numpy()[:, prompt.shape[1] :]


@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_logits_and_tensors_are_those_of_transformers(name, tmp_path):
    model = make_hf(name)
    source = save_hf(model, tmp_path / "source")
    from_hf(source, FromHFConfig(output=str(tmp_path / "run"), **PLAIN))
    expected = logits_of(model, tokens())
    ours = load_run(tmp_path / "run").model
    found = np.asarray(jax.jit(ours)(jnp.asarray(tokens())))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    kind, _ = to_hf(tmp_path / "run", ToHFConfig(output=str(tmp_path / "back"), measure=False))
    assert kind == type(model).__name__
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor, values in before.items():
        assert values.dtype == after[tensor].dtype and values.tobytes() == after[tensor].tobytes(), tensor
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert np.array_equal(logits_of(again, tokens()), expected)
    text = text_of(model, tokens(40))
    assert np.array_equal(text_of(again, tokens(40)), text)
    if name in WITH_EACH_SETTING:  # to generate compiles two programs more
        assert np.array_equal(generate(ours, tokens(40), max_new_tokens=24, temperature=0), text)
