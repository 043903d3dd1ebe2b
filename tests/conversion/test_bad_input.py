"""A checkpoint that is not what it should be is one message, and leaves nothing behind."""

import importlib.util
import json
import re
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from revjax import cli
from revjax.conversion import TensorFiles
from revjax.models import DecoderConfig

from .models import LAYERS, VOCAB_SIZE, write_random

LLAMA = DecoderConfig(
    **dict(vocab_size=VOCAB_SIZE, d_model=32, num_layers=LAYERS, num_heads=4, d_ff=64, tie_embeddings=False),
    coupling="residual",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "source"
    write_random(LLAMA, folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    return tmp_path / "source"


def message(capsys, folder, *words) -> str:
    """What `convert` says; checks that nothing was left."""
    before = sorted(folder.parent.iterdir())
    assert cli.main(["convert", "from-hf", str(folder), f"--output={folder.parent / 'run'}", *words]) == 2
    out, err = capsys.readouterr()
    _, is_there, error = err.partition("error: ")  # after what was logged
    assert out == "" and is_there and "Traceback" not in error
    assert sorted(folder.parent.iterdir()) == before
    return err


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(model_type="lama"), "model_type 'lama' is not known. Known are llama, mistral,.* Did you mean 'llama'"),
        (dict(model_type="gemma3"), "Its text model can be taken out first"),
        (dict(architectures=["LlamaForSequenceClassification"]), "is not a LlamaForCausalLM"),
        (dict(hidden_act="quick_gelu"), "hidden_act 'quick_gelu' is not supported"),
        (dict(residual_multiplier=0.5), "fields that this version does not know.*residual_multiplier=0.5"),
        (dict(quantization_config={"bits": 4}), "quantization_config={'bits': 4} is not supported"),
        (dict(num_attention_heads="4"), "num_attention_heads must be int, but got '4'"),
        (dict(hidden_size=None), "has no field 'hidden_size'"),
        (dict(num_key_value_heads=3), "num_kv_heads must divide num_heads"),
        (dict(rope_parameters={"rope_type": "spiral"}), "rotary positions of the kind 'spiral' are not supported"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "twist": 1}), "twist=1"),
        (dict(rope_parameters={"rope_type": "linear", "factor": -2.0}), "factor must be positive"),
        (dict(num_hidden_layers=4), r"missing: model.layers.3.*and 1 more"),
        (dict(num_hidden_layers=2), "not known: model.layers.2"),
        (
            dict(intermediate_size=32),
            r"of another shape: .*up_proj.weight is \(64, 32\), not \(32, 32\)",
        ),
        (dict(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight"),
        (dict(vocab_size=50), "of another shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_config_that_cannot_be_is_one_message(folder, capsys, fields, expected):
    change_config(folder, **fields)
    assert re.search(expected, message(capsys, folder))


def test_tensors_that_do_not_fit_are_all_named_at_once(folder, capsys):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:7]
        tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((32, 32), np.int8)

    change_tensors(folder, change)
    found = message(capsys, folder)
    for part in ("missing: model.norm.weight", "not known: model.extra", "lm_head.weight is (7, 32), not (101, 32)"):
        assert part in found
    assert "of another kind of number: model.layers.1.self_attn.q_proj.weight is I8" in found


def test_values_that_are_not_finite_are_named_and_nothing_is_written(folder, capsys):
    def change(tensors):
        tensors["model.norm.weight"][3] = np.nan
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = np.inf

    change_tensors(folder, change)
    assert "not finite, in model.norm.weight, model.layers.2.mlp.up_proj.weight" in message(capsys, folder)


def test_a_file_that_is_cut_off_or_garbled_is_refused(folder, capsys):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert "is not a whole safetensors file" in message(capsys, folder)
    path.write_bytes(b"\xff" * 8 + whole[8:])
    assert "is not a whole safetensors file" in message(capsys, folder)
    header = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "a comes twice" in message(capsys, folder)


def test_pickle_is_not_opened(folder, capsys):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle may run any code, and is not opened" in message(capsys, folder)


def test_what_points_out_of_the_folder_is_refused(folder, capsys, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    names = dict.fromkeys(TensorFiles(outside), "../outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert "points out of" in message(capsys, folder)
    (folder / "part.safetensors").symlink_to(outside)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert "points out of" in message(capsys, folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")}))
    assert "has no file 'other.safetensors'" in message(capsys, folder)
    (folder / "part.safetensors").unlink()
    outside.rename(folder / "part.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "ghost"], "part.safetensors")}))
    assert "part.safetensors has not ghost" in message(capsys, folder)


def test_the_cache_of_the_hub_links_to_its_blobs(source, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(source.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(blobs / str(i))
    assert set(TensorFiles(snapshot)) == set(TensorFiles(source))


def test_a_tokenizer_of_another_model_and_none_at_all(folder, capsys):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["w101"] = 101
    path.write_text(json.dumps(tokenizer))
    assert "has 102 tokens, but the model knows 101" in message(capsys, folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<none>"}))
    assert f"has no token '<none>'. Set eos_token in {config} to one that it has" in message(capsys, folder)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|other|>"))
    config.unlink()
    assert f"[SEP]). Set eos_token in {config} to one that it has: <|other|>." in message(capsys, folder)
    path.unlink()
    assert "has no tokenizer.json" in message(capsys, folder)


@pytest.mark.slow
def test_a_converted_model_that_is_too_far_from_its_source_is_not_written(folder, capsys):
    found = message(capsys, folder, "--max_kl=1e-9", "--max_source_error=1e-12")
    assert re.search(r"KL of the reversible network: .*, and not above 1e-09 \(--max_kl\)", found)
    assert "Nothing was written" in found
    by_both = "a logit beside transformers: " in found and "float32 here beside transformers" in found
    assert by_both == (importlib.util.find_spec("torch") is not None)


def test_mistakes_on_the_command_line(folder, capsys, tmp_path):
    assert "There is no folder" in message(capsys, folder.parent / "nowhere")
    assert cli.main(["convert", "from-hf", "google/gemma-3-1b-pt", f"--output={tmp_path / 'run'}"]) == 2
    assert "hf download google/gemma-3-1b-pt --local-dir=gemma-3-1b-pt" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in message(capsys, tmp_path / "empty")
    assert "Did you mean 'near-residual'" in message(capsys, folder, "--coupling=near-residul:4")
    assert cli.main(["convert", "from-hf", str(folder), f"--output={folder}"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["convert", "from-hff", str(folder), "--output=x"]) == 2
    assert "Did you mean 'from-hf'" in capsys.readouterr().err
    words = [f"--output={tmp_path / 'r'}", "--coupling=revnet", "--measure=false"]
    assert cli.main(["convert", "from-hf", str(folder), *words]) == 0
    capsys.readouterr()
    assert cli.main(["convert", "to-hf", str(tmp_path / "r"), f"--output={tmp_path / 'out'}"]) == 2
    assert "is another network than a stock architecture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
