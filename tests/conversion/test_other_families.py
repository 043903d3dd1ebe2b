"""BERT, ViT and T5 compute what transformers computes, and go out again as they came in."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from revjax import cli
from revjax.config import load
from revjax.conversion import copy_parameters, open_pretrained, write_pretrained
from revjax.errors import ConfigError, RevjaxError
from revjax.experiment import FromHFConfig, RunConfig, from_hf
from revjax.experiment.trained import read_file
from revjax.models import EncoderConfig, EncoderDecoderConfig, VisionConfig, make_model
from revjax.training import split_abstract

from .models import UNTIED, Axes, crossed, write_random

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
BERT = SIZES | dict(vocab_size=101, max_position_embeddings=640)
VIT = SIZES | dict(image_size=96, patch_size=4, num_labels=7)  # 577 tokens
T5 = dict(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Axes]] = {  # class of the config, of the model, sizes, options
    "bert": (
        "Bert",
        "BertForMaskedLM",
        BERT,
        [
            {"": {}, "tanh gelu": {"hidden_act": "gelu_new"}, "relu": {"hidden_act": "relu"}},
            {"": {}, "one kind": {"type_vocab_size": 1}},
            {"": {}, "2 heads": {"num_attention_heads": 2}},
            {"": {}, "eps": {"layer_norm_eps": 1e-6}},
        ],
    ),
    "bert without head": (
        "Bert",
        "BertModel",
        BERT,
        [{"": {}, "relu": {"hidden_act": "relu"}}, {"": {}, "one kind": {"type_vocab_size": 1}}],
    ),
    "vit": (
        "ViT",
        "ViTForImageClassification",
        VIT,
        [
            {"": {}, "relu": {"hidden_act": "relu"}, "tanh gelu": {"hidden_act": "gelu_new"}},
            {"": {}, "fewer biases": {"qkv_bias": False}},
            {"": {}, "gray": {"num_channels": 1}},
            {"": {}, "large patches": {"patch_size": 8}},
            {"": {}, "eps": {"layer_norm_eps": 1e-6}},
        ],
    ),
    "t5": (
        "T5",
        "T5ForConditionalGeneration",
        T5,
        [
            {"": {}} | {kind: {"feed_forward_proj": kind} for kind in ("gated-gelu", "gated-silu")},
            UNTIED,
            {"": {}, "wide heads": {"d_kv": 12}},
            {"": {}, "fewer layers": {"num_decoder_layers": 2}},
            {"": {}, "buckets": {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 300}},
        ],
    ),
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    name: (kind, architecture, sizes | options)
    for family, (kind, architecture, sizes, axes) in FAMILIES.items()
    for name, options in crossed(family, axes).items()
}
SHAPES = {
    "bert": EncoderConfig(
        **dict(d_model=32, num_layers=3, d_ff=48, norm_placement="post", positions="learned", token_kinds=2),
        **dict(norm_eps=1e-12, activation="gelu_exact", coupling="near-residual:4", max_length=64),
    ),
    "vit": VisionConfig(d_model=32, num_layers=3, d_ff=48, norm_eps=1e-12, coupling="bdia:4", readout="last"),
    "t5": EncoderDecoderConfig(
        **dict(d_model=32, num_layers=3, d_ff=48, positions="relative", attention_scale=1.0, use_bias=False),
        **dict(coupling="near-residual:4", start_token=0, tie_embeddings=False),
    ),
}


def make_hf(name: str) -> Any:
    """A model of `CASES`, in eval mode, whose every parameter is random.

    T5's less so: its scores are not divided by sqrt(width), and where they are large, float32 is not good for 1e-5 (of
    gated-silu with wide heads, transformers' own logits were 2e-5 from those that it gives in float64).
    """
    torch = pytest.importorskip("torch", reason="parity is measured against transformers, which needs torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # beside another process, more of them wait for each other
    kind, architecture, options = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    if options.get("tie_word_embeddings") is False:  # transformers ties the head of a new T5 all the same
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    scale = 0.05 if kind == "T5" else 0.15
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def ours(folder: pathlib.Path, file: pathlib.Path) -> Any:
    """Our model with the parameters of a checkpoint of transformers, which go through `file`."""
    found = open_pretrained(folder)
    copy_parameters(found, found.config, file, {})
    make = lambda: make_model(found.config, plan="inputs", rngs=nnx.Rngs(0))
    return split_abstract(make)[0].merge(jax.tree.map(jnp.asarray, read_file(file, found.config)))


def inputs(kind: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """By transformers' names: 600 tokens, of which the second row has fewer; or images."""
    draw = np.random.default_rng(0)
    if kind == "ViT":
        size, channels = options["image_size"], options.get("num_channels", 3)
        return {"pixel_values": draw.normal(size=(2, channels, size, size)).astype(np.float32)}
    tokens = draw.integers(1, 101, (2, 600))
    given = {"input_ids": tokens, "attention_mask": (np.arange(600)[None] < np.array([[600], [450]])).astype(int)}
    if kind == "Bert":
        return given | {"token_type_ids": draw.integers(0, options.get("type_vocab_size", 2), (2, 600))}
    return given | {"decoder_input_ids": draw.integers(1, 101, (2, 580))}


def theirs_of(model: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        found = model(**{name: torch.from_numpy(x) for name, x in given.items()})
    names = ("logits", "last_hidden_state", "pooler_output")
    return {name: found[name].numpy() for name in names if name in found and found[name] is not None}


def ours_of(model: Any, given: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    x = {name: jnp.asarray(a, jnp.float32 if a.dtype == np.float32 else jnp.int32) for name, a in given.items()}
    if "pixel_values" in x:
        return {"logits": jax.jit(lambda m, x: m(x))(model, x["pixel_values"].transpose(0, 2, 3, 1))}
    mask = x["attention_mask"]
    if "decoder_input_ids" in x:
        run = lambda m, x: m(x["input_ids"], x["decoder_input_ids"], source_segment_ids=mask)
        return {"logits": jax.jit(run)(model, x)}
    seen = dict(segment_ids=mask, kinds_BT=x["token_type_ids"])
    if model.config.head:
        return {"logits": jax.jit(lambda m, x: m(x, **seen))(model, x["input_ids"])}
    hidden = jax.jit(lambda m, x: m.hidden(x, **seen))(model, x["input_ids"])
    return {"last_hidden_state": hidden, "pooler_output": model.pooled(hidden)}


@pytest.mark.parametrize("name", [n if n in SHAPES else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_outputs_and_tensors_are_those_of_transformers(name, tmp_path):
    hf = make_hf(name)
    hf.save_pretrained(tmp_path / "hf")
    kind, architecture, options = CASES[name]
    given = inputs(kind, options)
    model = ours(tmp_path / "hf", tmp_path / "ours.safetensors")
    there = given.get("attention_mask", np.ones((2, 1)))[..., None] > 0
    there = np.ones((2, 1, 1), bool) if kind == "T5" else there  # of padding, outputs say nothing
    theirs, found_here = theirs_of(hf, given), ours_of(model, given)
    for output, expected in theirs.items():
        found = np.asarray(found_here[output])
        assert found.shape == expected.shape
        shown = there if expected.ndim == 3 else True
        assert np.abs(np.where(shown, found - expected, 0)).max() <= 1e-5 * np.abs(expected).max(), output

    params = load_file(tmp_path / "ours.safetensors")
    read = lambda name, i: params[name] if i is None else params[name][i]
    (tmp_path / "back").mkdir()
    write_pretrained(open_pretrained(tmp_path / "hf").config, read, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [architecture]
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert before.keys() == after.keys() and ("lm_head.weight" in before) == ("untied" in name)
    for tensor, values in before.items():
        assert values.dtype == after[tensor].dtype and values.tobytes() == after[tensor].tobytes(), tensor
    again = type(hf).from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    found = theirs_of(again, given)
    assert all(np.array_equal(found[output], expected) for output, expected in theirs.items())


ARCHITECTURES = {"bert": "BertForMaskedLM", "vit": "ViTForImageClassification", "t5": "T5ForConditionalGeneration"}


@pytest.mark.parametrize("family", SHAPES)
def test_parameters_come_back_to_the_bit_without_transformers(family, tmp_path):
    params = write_random(SHAPES[family], tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == family
    found = open_pretrained(tmp_path / "hf")
    copy_parameters(found, SHAPES[family], tmp_path / "ours.safetensors", {})
    read = load_file(tmp_path / "ours.safetensors")
    assert read.keys() == params.keys() and all(np.array_equal(read[name], params[name]) for name in read)


def test_old_names_and_the_other_heads_of_bert(tmp_path):
    """bert-base-uncased has gamma and beta, a pooler, a head for the next sentence, and its tied head twice."""
    params = write_random(SHAPES["bert"], tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    tensors = {old(name): x for name, x in load_file(path).items()}
    more = {
        "bert.pooler.dense.weight": np.ones((32, 32), np.float32),
        "bert.pooler.dense.bias": np.ones(32, np.float32),
        "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
    }
    save_file(tensors | more, path)
    found = open_pretrained(tmp_path / "hf")
    assert isinstance(found.config, EncoderConfig) and found.config.pooler and found.config.head
    copy_parameters(found, found.config, tmp_path / "ours.safetensors", {})
    read = load_file(tmp_path / "ours.safetensors")
    assert all(np.array_equal(read[name], x) for name, x in params.items())
    assert set(read) - set(params) == {"pooler.kernel", "pooler.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_a_run_comes_from_a_checkpoint_is_tuned_exactly_and_goes_out_as_the_stock_network(family, tmp_path, capsys):
    write_random(SHAPES[family], tmp_path / "hf")
    settings = ["--training.steps=3", "--training.eval_every=3", "--training.eval_batches=1", "--data.batch_size=4"]
    if family == "vit":
        pytest.importorskip("sklearn", reason="digits come with scikit-learn")
        scale = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
        (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(scale))
    else:
        (tmp_path / "text.txt").write_text("\n\n".join(f"w{i % 90} w{i % 7} w{i % 50}" for i in range(1, 5000)))
        settings += [f"--data.source={tmp_path / 'text.txt'}", f"--data.cache={tmp_path / 'tokens'}"]
        settings += ["--data.sequence_length=32"]
    run = tmp_path / "run"
    assert cli.main(["convert", "from-hf", str(tmp_path / "hf"), f"--output={run}", "--max_kl=1"]) == 0
    out = capsys.readouterr().out
    assert "canary 0, unsafe 0" in out and "gradients beside the stored run's 0.0e+00" in out
    found = json.loads((run / "fidelity.json").read_text())
    assert found["distances"]["rounding"]["kl"] < found["distances"]["coupling"]["kl"]
    assert ("packed" in found["distances"]) == ("padded" in found["distances"]) == (family != "vit")
    if family == "vit":
        assert load(RunConfig, run / "config.yaml", environ={}).model.image_mean == (0.1, 0.2, 0.3)
    else:
        assert all(found["distances"][name]["largest"] < 1e-5 for name in ("packed", "padded"))
    settings += [f"--run.folder={tmp_path}", "--run.name=tuned", "--run.compilation_cache=null", "--mesh.data=1"]
    start = [f"--training.start_from={run}"]
    assert cli.main(["train", str(run / "config.yaml"), *settings, *start]) == 0
    assert "every stream was rebuilt to the bit, at each of 3 steps" in capsys.readouterr().out
    assert cli.main(["convert", "to-hf", str(tmp_path / "tuned"), f"--output={tmp_path / 'out'}"]) == 0
    assert "as it leaves" in capsys.readouterr().out
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "out"))
    assert before.keys() == after.keys() and any(not np.array_equal(before[name], after[name]) for name in before)
    same = [json.loads((tmp_path / name / "config.json").read_text())["architectures"] for name in ("hf", "out")]
    assert same[0] == same[1] == [ARCHITECTURES[family]]


def test_a_checkpoint_without_a_head_is_no_run(tmp_path):
    config = dataclasses.replace(SHAPES["bert"], head=False, pooler=True)
    write_random(config, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["BertModel"]
    found = open_pretrained(tmp_path / "hf").config
    assert isinstance(found, EncoderConfig) and not found.head and found.pooler
    with pytest.raises(ConfigError, match="has no head, so a run has nothing to train it for"):
        from_hf(tmp_path / "hf", FromHFConfig(output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_family_or_with_values_of_none_is_refused(tmp_path):
    write_random(SHAPES["vit"], tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    theirs = json.loads(path.read_text())
    for change, message in [
        ({"model_type": "bert"}, r"architectures \['ViTForImageClassification'\] is not a BertForMaskedLM"),
        ({"image_size": [32, 48]}, "image_size must be int"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ({"layerscale": 0.1}, "layerscale=0.1"),
        ({"patch_size": 8}, "vit.embeddings.patch_embeddings.projection.weight is"),
    ]:
        path.write_text(json.dumps(theirs | change))
        with pytest.raises(RevjaxError, match=message):
            open_pretrained(tmp_path / "hf")
