"""Conversations: written by a model's template, and learned only where the assistant speaks."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from revjax.data import (
    Batches,
    ByteTokenizer,
    ChatTemplate,
    DataConfig,
    FileTokenizer,
    load_corpus,
    validation_batches,
)
from revjax.errors import ConfigError, DataError

TEMPLATE = """{% for m in messages %}
<|{{ m.role }}|>{{ m.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>{% endif %}"""  # a line that ends in a tag leaves no line break
MARKED = """{% for m in messages %}
{% if m.role == 'assistant' %}
<|assistant|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}
{% else %}
<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}
{% endfor %}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2 – how much?"},
    {"role": "assistant", "content": "4 – no more."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Héh."},
]


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_text(TEMPLATE)
    return path


def write_rows(path, rows, field="messages"):
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    return path


def configure(tmp_path, template, rows, **more) -> DataConfig:
    source = write_rows(tmp_path / "chats.jsonl", rows)
    given = dict(text_field="messages", sequence_length=16, validation_fraction=0.0, batch_size=1)
    return DataConfig(source=str(source), chat_template=str(template), cache=str(tmp_path / "cache"), **given | more)


@pytest.mark.parametrize("source", [TEMPLATE, MARKED])
def test_what_the_assistant_says_is_found(tmp_path, source):
    (tmp_path / "t.jinja").write_text(source)
    text, spans = ChatTemplate(tmp_path / "t.jinja").render(CHAT)
    said = [text[first:last].strip() for first, last in spans]
    assert said == ["4 – no more.<|end|>", "Héh.<|end|>"]
    assert text.startswith("<|system|>Be brief.<|end|>") and "<|assistant|>4" in text


def test_tokens_are_trained_on_where_the_assistant_speaks(tmp_path, template):
    corpus = load_corpus(configure(tmp_path, template, [CHAT, CHAT[:3]]))
    (part,) = corpus.train
    tokens, trained = np.asarray(part.text.tokens), np.asarray(part.text.trained)
    decode = lambda chosen: ByteTokenizer().decode(tokens[chosen])
    assert decode(trained == 1) == "4 – no more.<|end|>\nHéh.<|end|>\n" + "4 – no more.<|end|>\n"
    assert decode(slice(0, 12)) == "<|system|>Be"  # and no separator before it
    learned = "4 – no more.<|end|>\nHéh.<|end|>\n4 – no more.<|end|>\n".encode()
    assert part.text.num_bytes == part.text.num_trained == len(learned) and part.text.bytes_per_token == 1


def test_weights_are_those_of_the_token_that_is_predicted(tmp_path, template):
    config = configure(tmp_path, template, [CHAT, CHAT[:3]])
    (part,) = load_corpus(config).train
    rows = list(validation_batches(part.text, batch_size=1, sequence_length=16))
    tokens = np.concatenate([row["tokens"][0, 1:] for row in rows])
    weights = np.concatenate([row["weights"][0] for row in rows])
    np.testing.assert_array_equal(tokens, part.text.tokens[1 : 1 + len(tokens)])
    np.testing.assert_array_equal(weights, part.text.trained[1 : 1 + len(tokens)])
    assert 0 < weights.sum() < len(weights)
    batches = Batches(load_corpus(config), batch_size=1, sequence_length=16, seed=0)
    assert next(batches)["weights"].shape == (1, 16)
    batches.close()


def byte_level_tokenizer(path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "</s>"])
    tokenizer.save(str(path))
    return FileTokenizer(path)


def test_special_tokens_of_the_template_are_these_tokens(tmp_path, template):
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer.json")
    corpus = load_corpus(
        configure(tmp_path, template, [CHAT], tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=8)
    )
    (part,) = corpus.train
    tokens, trained = np.asarray(part.text.tokens), np.asarray(part.text.trained)
    end = tokenizer._tokenizer.token_to_id("<|end|>")
    assert (tokens == end).sum() == 5 and (tokens[trained == 1] == end).sum() == 2
    assert tokenizer.decode(tokens[trained == 1]) == "4 – no more.\nHéh.\n"
    assert end not in tokenizer.encode("<|end|>")  # in plain text it is text


@pytest.mark.parametrize("source", [TEMPLATE, MARKED])
def test_transformers_writes_the_same_tokens_and_marks_the_same(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=source)
    (tmp_path / "t.jinja").write_text(source)
    template = ChatTemplate(tmp_path / "t.jinja")
    text, _ = template.render(CHAT)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False)
    if source == TEMPLATE:
        invited = theirs.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
        assert template.invite(CHAT[:2]) == invited
        return
    expected = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    config = configure(
        tmp_path, tmp_path / "t.jinja", [CHAT], tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=8
    )
    part = load_corpus(config).train[0].text
    assert part.tokens.tolist() == tokenizer.encode_marked_up([text])[0][0].tolist() == expected["input_ids"]
    assert part.trained.tolist() == expected["assistant_masks"]


def test_conversations_come_from_parquet_too(tmp_path, template):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with_tools = [CHAT[1] | {"name": "ann"}, CHAT[2]]  # a key that other messages lack: null in their rows
    parquet.write_table(pyarrow.table({"messages": [CHAT, with_tools]}), tmp_path / "chats.parquet")
    lines = load_corpus(configure(tmp_path, template, [CHAT, with_tools])).train[0].text
    config = DataConfig(
        source=str(tmp_path / "chats.parquet"),
        chat_template=str(template),
        text_field="messages",
        sequence_length=16,
        validation_fraction=0.0,
        cache=str(tmp_path / "cache"),
    )
    rows = load_corpus(config).train[0].text
    np.testing.assert_array_equal(rows.tokens, lines.tokens)
    np.testing.assert_array_equal(rows.trained, lines.trained)


def test_a_template_is_found_in_a_folder_and_in_a_config(tmp_path):
    run = tmp_path / "run" / "huggingface"
    run.mkdir(parents=True)
    config = {"chat_template": "{{ bos_token }}" + TEMPLATE, "bos_token": {"content": "<s>"}}
    (run / "tokenizer_config.json").write_text(json.dumps(config))
    for path in (tmp_path / "run", run, run / "tokenizer_config.json"):
        assert ChatTemplate(path).render(CHAT)[0].startswith("<s><|system|>")
    (run / "chat_template.jinja").write_text("{{ bos_token }}!" + TEMPLATE)
    assert ChatTemplate(run).render(CHAT)[0].startswith("<s>!<|system|>")
    named = {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]}
    (tmp_path / "several.json").write_text(json.dumps(named))
    assert ChatTemplate(tmp_path / "several.json").render(CHAT)[0].startswith("<|system|>")


def test_another_template_is_another_text(tmp_path, template):
    config = configure(tmp_path, template, [CHAT])
    before = load_corpus(config).fingerprint
    assert load_corpus(config).fingerprint == before
    template.write_text(TEMPLATE.replace("<|end|>", "<|stop|>"))
    assert load_corpus(config).fingerprint != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses it: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses it: access to attribute 'append'"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ raise_exception('only two messages') }}", "refuses it: only two messages"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "writes message 2 otherwise"),
    ],
)
def test_a_template_cannot_do_harm_and_says_what_it_refuses(tmp_path, template, source, message):
    template.write_text(source)
    with pytest.raises(DataError, match="chats.jsonl:1: .*the chat template") as e:
        load_corpus(configure(tmp_path, template, [CHAT]))
    assert message in str(e.value)
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())  # nothing half written


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("hello", "'messages' must be a list of messages, such as .* but is 'hello'"),
        ([{"from": "human", "value": "hi"}], "messages with a role, such as .* but one is {'from'"),
        ([["user", "hi"]], "messages with a role"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(tmp_path, template, row, message):
    with pytest.raises(DataError, match=f"chats.jsonl:2: .*{message}"):
        load_corpus(configure(tmp_path, template, [CHAT, row]))


@pytest.mark.parametrize("mark", ["\uf8f4", "\uf8f5"])
def test_a_message_cannot_say_what_is_learned(tmp_path, template, mark):
    template.write_text(MARKED)
    row = [{"role": "user", "content": f"Learn this: {mark}x"}, CHAT[2]]
    with pytest.raises(DataError, match="chats.jsonl:1: it holds U.F8F4 or U.F8F5"):
        load_corpus(configure(tmp_path, template, [row]))


def test_conversations_without_an_answer_are_left_out(tmp_path, template, caplog):
    caplog.set_level("INFO")
    corpus = load_corpus(configure(tmp_path, template, [CHAT[:2], CHAT]))
    assert corpus.train[0].text.num_documents == 1
    assert "left out 1 conversations in which the assistant says nothing" in caplog.text
    with pytest.raises(DataError, match="all are conversations in which the assistant says nothing"):
        load_corpus(configure(tmp_path, template, [CHAT[:2]]))


def test_what_is_no_template_is_refused(tmp_path, template):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    (tmp_path / "broken.json").write_text("{")
    for path, message in (
        (
            "empty",
            "no chat template in .*empty: none of chat_template.json, chat_template.jinja, tokenizer_config.json",
        ),
        ("gone.jinja", "Cannot read .*gone.jinja"),
        ("tokenizer_config.json", "has no chat_template"),
        ("broken.jinja", "is no template: Unexpected end of template"),
        ("broken.json", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            ChatTemplate(tmp_path / path)
    (tmp_path / "a.txt").write_text("Hello, this is no conversation.")
    config = configure(tmp_path, template, [CHAT])
    with pytest.raises(DataError, match="holds no conversations .*--data.chat_template=null"):
        load_corpus(DataConfig(source=str(tmp_path / "a.txt"), chat_template=config.chat_template, cache=config.cache))
