"""What goes out as a checkpoint of transformers comes in again to the bit. Neither torch nor transformers is needed."""

import contextlib
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

import revjax.conversion.stock as stock
from revjax import cli
from revjax.config import load
from revjax.conversion import FAMILIES, TensorFiles, open_pretrained, write_pretrained
from revjax.errors import CheckpointError, ConfigError
from revjax.experiment import FromHFConfig, RunConfig, ToHFConfig, from_hf, load_run, to_hf
from revjax.experiment.fidelity import Distance, Fidelity
from revjax.experiment.pretrained import _check_fidelity
from revjax.models import Decoder, DecoderConfig
from revjax.nn import RopeScaling
from revjax.training import read_metrics

from .models import random_parameters, save_tokenizer, write_random

SIZES = dict(vocab_size=101, d_model=32, num_layers=5, num_heads=4, d_ff=64)
GEMMA = dict(norm_offset=1.0, post_norm=True, embedding_scale=math.sqrt(32), activation="gelu", window=8, head_dim=16)
SHAPES = {
    "llama": dict(num_kv_heads=2, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_length=64)),
    "mistral": dict(window=8, tie_embeddings=False),
    "qwen2": dict(qkv_bias=True, window=8, layer_pattern=("global", "local")),
    "qwen3": dict(qk_norm=True, head_dim=16),
    "gemma2": GEMMA | dict(layer_pattern=("local", "global"), attention_softcap=50.0, logit_softcap=30.0),
    "gemma3_text": GEMMA
    | dict(layer_pattern=("local", "local", "global"), qk_norm=True, local_rope_base=1e4, rope_base=1e6),
    "gpt2": dict(norm="layer", use_bias=True, gated=False, positions="learned", activation="gelu", max_length=64),
}


def config_of(family: str, **more) -> DecoderConfig:
    return DecoderConfig(**{"coupling": "near-residual:1"} | SIZES | SHAPES[family] | more)


def files_of(folder) -> dict[str, np.ndarray]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_a_cap_that_transformers_does_not_apply_is_refused(tmp_path):
    write_random(config_of("gemma3_text"), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_logit_softcapping": 50.0}))
    with pytest.raises(ConfigError, match="attn_logit_softcapping=50.0 is not supported, only None"):
        open_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match="No family of transformers has this architecture"):
        stock.stock_config(config_of("gemma3_text", attention_softcap=50.0))


@pytest.mark.parametrize("granularity", ["branch", "block"])
@pytest.mark.parametrize("family", SHAPES)
def test_parameters_come_back_to_the_bit(family, granularity, tmp_path):
    config = config_of(family, granularity=granularity)
    params = write_random(config, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == family
    found = open_pretrained(tmp_path / "hf")
    assert found.family is FAMILIES[family]
    assert stock.architecture(found.config) == stock.architecture(config)

    from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "run"), granularity=granularity, measure=False))
    read = TensorFiles(tmp_path / "run" / "model.safetensors")
    assert set(read) == set(params)
    for name, values in params.items():
        assert np.array_equal(read.read(name), values), name
    to_hf(tmp_path / "run", ToHFConfig(output=str(tmp_path / "again"), measure=False))
    before, after = files_of(tmp_path / "hf"), files_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)
    same = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])  # tied, not tied, norms with a bias
def test_a_factor_of_embeddings_goes_out_in_the_table(family, tmp_path):
    config = config_of(family, coupling="residual", exact=False, dtype="float32", embedding_scale=8.0)
    params = write_random(config, tmp_path / "hf")
    from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "run"), coupling="residual", measure=False))
    found = load_run(tmp_path / "run").model
    assert found.config.embedding_scale == 1
    np.testing.assert_array_equal(found.embedding.table[...], 8 * params["embedding.table"])

    configs = (dataclasses.replace(config, embedding_scale=scale) for scale in (8.0, 1.0))
    before, after = (Decoder(x, plan="inputs", rngs=nnx.Rngs(0)) for x in configs)
    flat = nnx.to_flat_state(nnx.state(before, nnx.Param))
    nnx.update(before, nnx.from_flat_state([(at, p.replace(params[".".join(map(str, at))])) for at, p in flat]))
    nnx.update(after, nnx.state(found, nnx.Param))
    tokens = jnp.arange(1, 25)[None]
    logits = jax.jit(lambda model: model(tokens))
    np.testing.assert_array_equal(logits(before), logits(after))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_several_files(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "_LARGEST_FILE", 20_000)
    write_random(config_of("gpt2"), tmp_path / "hf", dtype=dtype)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    before = files_of(tmp_path / "hf")
    assert {x.dtype for x in before.values()} == {np.dtype(getattr(ml_dtypes, dtype, None) or dtype)}
    from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "run"), measure=False))
    to_hf(tmp_path / "run", ToHFConfig(output=str(tmp_path / "again"), measure=False))
    after = files_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(before[n].tobytes() == after[n].tobytes() and before[n].dtype == after[n].dtype for n in before)


def test_a_checkpoint_without_a_head_has_no_prefix(tmp_path):
    params = write_random(config_of("gpt2"), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(path).items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 64, 64), bool), "h.0.attn.masked_bias": np.float32(-1e4)[None]}
    save_file(tensors | masks, path)
    from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "run"), measure=False))
    read = TensorFiles(tmp_path / "run" / "model.safetensors")
    assert all(np.array_equal(read.read(name), x) for name, x in params.items())


@pytest.mark.slow
def test_a_converted_model_is_tuned_exactly_and_goes_out_as_the_stock_network(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"w{i % 90} w{i % 7} w{i % 50}" for i in range(1, 5000)))
    write_random(config_of("llama"), tmp_path / "hf", dtype="bfloat16")
    (tmp_path / "hf" / "generation_config.json").write_text("{}")
    assert cli.main(["convert", "from-hf", str(tmp_path / "hf"), f"--output={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "near-residual:4, branch by branch, exact streams of 16 fraction bits" in out
    assert "canary 0, unsafe 0" in out and "gradients beside the stored run's 0.0e+00" in out
    fidelity = json.loads((tmp_path / "run" / "fidelity.json").read_text())
    assert fidelity["distances"]["rounding"]["kl"] < fidelity["distances"]["coupling"]["kl"] < 0.05
    assert all(0 < fidelity["distances"][name]["largest"] < 1e-5 for name in ("packed", "padded"))
    assert len(fidelity["largest_x"]) == 10 and (tmp_path / "run" / "fidelity.png").stat().st_size > 10_000
    run = load(RunConfig, tmp_path / "run" / "config.yaml", environ={})
    assert run.optimizer.learning_rate == 1e-4  # not that of a training from scratch
    settings = [
        f"--run.folder={tmp_path}",
        "--run.name=tuned",
        "--run.compilation_cache=null",
        f"--training.start_from={tmp_path / 'run'}",
        f"--data.source={tmp_path / 'text.txt'}",
        f"--data.cache={tmp_path / 'tokens'}",
        "--data.sequence_length=32",
        "--data.batch_size=4",
        "--training.steps=3",
        "--training.eval_batches=2",
        "--training.sample_tokens=4",
        "--training.sample_prompt=w1",
        "--mesh.data=1",
    ]
    assert cli.main(["train", str(tmp_path / "run" / "config.yaml"), *settings]) == 0
    lines = read_metrics(tmp_path / "tuned" / "metrics.jsonl")
    assert len(lines) == 3 and all(line["canary"] == line["unsafe"] == 0 for line in lines)
    capsys.readouterr()
    assert cli.main(["convert", "to-hf", str(tmp_path / "tuned"), f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "as trained" in out and "as it leaves" in out and "LlamaForCausalLM" in out
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    before, after = files_of(tmp_path / "hf"), files_of(tmp_path / "out")
    assert before.keys() == after.keys() and {x.dtype for x in after.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert run.model.readout == "last" and run.memory.plan == "nothing"


def test_another_dtype_can_go_out_than_came_in(tmp_path):
    write_random(config_of("llama"), tmp_path / "hf", dtype="bfloat16")
    from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "run"), measure=False))
    to_hf(tmp_path / "run", ToHFConfig(output=str(tmp_path / "out"), dtype="float32", measure=False))
    before, after = files_of(tmp_path / "hf"), files_of(tmp_path / "out")
    assert all(x.dtype == np.float32 and np.array_equal(x, before[name]) for name, x in after.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        (dict(gradient_error=1e-3), r"gradients beside the stored run: 0.001, and not above 1e-05"),
        (dict(canary=2), "exactness: canary 2, unsafe 0"),
        (dict(unsafe=1), "exactness: canary 0, unsafe 1"),
        (dict(loss=math.nan), "its loss is no number"),
        (dict(kl=math.nan), "KL of the reversible network: nan"),
        (dict(source=math.nan), "a logit beside transformers: nan"),
        (dict(packed=0.1), "a logit of packed texts: 0.1, and not above 0.0001"),
        (dict(padded=0.1), "a logit after padding: 0.1, and not above 0.0001"),
    ],
)
def test_no_number_and_no_exactness_are_refused_like_too_large_a_distance(change, message):
    near = Distance(largest=1e-6, kl=1e-6, top1=1.0)
    kl = change.pop("kl", 1e-6)
    largest = {name: change.pop(name, 1e-6) for name in ("source", "packed", "padded")}
    distances = {
        **{name: dataclasses.replace(near, largest=x) for name, x in largest.items()},
        "rounding": near,
        "coupling": dataclasses.replace(near, kl=kl),
        "dtype": near,
    }
    sizes = {"reversible": 1, "checkpoint": 2, "stored": 3}
    found = dict(loss=1.0, plain_loss=1.0, canary=0, unsafe=0, largest_x=[1.0], gradient_error=0.0, bytes=sizes)
    fidelity = Fidelity(tokens=9, distances=distances, no_source=None, **found | change)
    context = contextlib.nullcontext() if message is None else pytest.raises(CheckpointError, match=message)
    with context:
        _check_fidelity(fidelity, FromHFConfig(output="x"))


def test_what_has_no_stock_architecture_is_refused(tmp_path):
    for fields, message in [
        (
            dict(coupling="midpoint:0.5"),
            "is another network than a stock architecture .* Train one with --model.coupling=near-residual:4",
        ),
        (dict(coupling="near-residual:1", layer_scale=0.1), "no place for the parameters of layer_scale"),
        (dict(coupling="near-residual:1", readout="learned"), "no place for the parameters of readout"),
        (dict(coupling="near-residual:1", readout="concat"), "no place for the parameters of readout"),
        (dict(coupling="bdia:1", gated=False, embedding_scale=8.0), "No family of transformers has this architecture"),
        (dict(coupling="bdia:1", gated=False), "No family of transformers has this architecture"),
    ]:
        with pytest.raises(ConfigError, match=message):
            stock.stock_config(config_of("llama", **fields))


def test_values_that_the_smaller_type_does_not_hold_are_named(tmp_path):
    config = config_of("llama")
    params = random_parameters(config)
    params["norm.scale"][0] = 1e6
    (tmp_path / "hf").mkdir()
    read = lambda name, i: params[name] if i is None else params[name][i]
    with pytest.raises(CheckpointError, match="In float16, values of these tensors are not finite: model.norm.weight"):
        write_pretrained(config, read, tmp_path / "hf", dtype="float16")


def test_local_and_global_layers_see_what_they_should():
    """The last token of a row reaches as far as its layers let it."""
    config = DecoderConfig(**SIZES | {"num_layers": 2}, window=2, layer_pattern=("local", "global"), dtype="float32")
    tokens = jnp.arange(1, 13)[None]
    first_changed = tokens.at[0, 0].set(50)

    def last_logits_differ(config):
        model = Decoder(config, rngs=nnx.Rngs(0))
        return bool(jnp.any(model(tokens)[0, -1] != model(first_changed)[0, -1]))

    assert last_logits_differ(config)
    assert not last_logits_differ(dataclasses.replace(config, layer_pattern=()))
    assert last_logits_differ(dataclasses.replace(config, layer_pattern=("global", "local")))


@pytest.mark.slow
def test_streams_are_made_wide_enough_for_large_activations(tmp_path):
    """Pretrained networks have a few channels with values in the thousands."""
    config = config_of("llama")
    params = random_parameters(config)
    params["embedding.table"][:, 3] = 20_000.0
    (tmp_path / "hf").mkdir()
    write_pretrained(config, lambda name, i: params[name] if i is None else params[name][i], tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    run, fidelity = from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "run")))
    assert run.model.fraction_bits == 31 - 3 - 15 and fidelity is not None
    assert fidelity.unsafe == fidelity.canary == 0 and max(fidelity.largest_x) > 19_999
    assert load(RunConfig, tmp_path / "run" / "config.yaml", environ={}).model == run.model


@pytest.mark.slow
def test_a_model_of_bytes_that_was_trained_here_goes_out_with_a_tokenizer_of_bytes(tmp_path, capsys):
    settings = [
        *(f"--run.folder={tmp_path}", "--run.name=bytes", "--run.compilation_cache=null", "--mesh.data=1"),
        *("--model.coupling=near-residual:1", "--model.readout=last", "--training.steps=2", "--training.eval_every=2"),
    ]
    assert cli.main(["train", "configs/tiny.yaml", f"--data.cache={tmp_path / 'tokens'}", *settings]) == 0
    assert cli.main(["convert", "to-hf", str(tmp_path / "bytes"), f"--output={tmp_path / 'hf'}"]) == 0
    assert "hf/: LlamaForCausalLM" in capsys.readouterr().out
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    text = "né\0 x\n\t日本 \x7f\xa0 def f():\r\n"
    assert tokenizer.encode(text).ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 0
    from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "again"), coupling="near-residual:1", measure=False))
    first, again = load_run(tmp_path / "bytes"), load_run(tmp_path / "again")
    assert again.tokenizer.separator == first.tokenizer.separator == 0
    prompt = jnp.asarray(first.tokenizer.encode("def f("))[None]
    np.testing.assert_array_equal(first.model(prompt), again.model(prompt))
