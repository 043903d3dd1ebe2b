"""Conversations -> text, as a model's chat template writes it, and what of it the assistant says.

    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    ->  <|user|>2 + 2?<|end|><|assistant|>4<|end|>          trained on:  4<|end|>

A template is a Jinja program that came with a model, so it runs in Jinja's sandbox. What the assistant says is found by
the template's own {% generation %} marks, or, where it has none, as what a message adds to the conversation before it
with the invitation to answer (`add_generation_prompt`). Templates get no clock: text must not depend on the day.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .config import DataConfig
from .documents import Documents, Piece
from .tokenizer import Tokenizer

Message = dict[str, Any]  # role, content, and whatever else the template reads
Span = tuple[int, int]  # characters

_BEGIN, _END = "\uf8f4", "\uf8f5"  # of Unicode's private use: around what is inside {% generation %}
CHAT_TEMPLATE = "chat_template.json"  # in the folder of a run that learned from conversations
_TOKENS = "tokenizer_config.json"
_FILES = (CHAT_TEMPLATE, "chat_template.jinja", _TOKENS)


class ChatTemplate:
    """A chat template.

    Args:
      path: a .jinja file, a tokenizer_config.json, or a folder with one of them.

    Raises `ConfigError` where there is none, or it is no template.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = _find(pathlib.Path(path).expanduser())
        source, tokens = _read(self.path)
        self.file = json.dumps({"chat_template": source} | tokens, sort_keys=True, indent=2).encode()  # all of it
        self.fingerprint = hashlib.sha256(self.file).hexdigest()
        self._jinja2, environment = _environment()
        self._is_marked = "generation" in source
        try:
            self._template = environment.from_string(source, globals=tokens)
        except self._jinja2.TemplateError as e:
            raise ConfigError(f"{self.path} (data.chat_template) is no template: {e}.") from None

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a conversation, and where the assistant speaks in it, in order.

        Raises `ValueError` where the template refuses it, or writes it so that this cannot be told.
        """
        if any(mark in json.dumps(messages, ensure_ascii=False, default=str) for mark in (_BEGIN, _END)):
            raise ValueError("it holds U+F8F4 or U+F8F5, of Unicode's private use, which mark what is learned here")
        text, spans = self._write(messages, invite=False), []
        if self._is_marked:
            text, spans = _without_marks(text)
        if not spans:
            spans = [self._span(text, messages, i) for i, m in enumerate(messages) if m["role"] == "assistant"]
        return text, [(first, last) for first, last in spans if first < last]

    def invite(self, messages: Sequence[Message]) -> str:
        """The text after which the assistant answers `messages`; raises `ValueError` where the template refuses it."""
        return _without_marks(self._write(messages, invite=True))[0]

    def _span(self, text: str, messages: Sequence[Message], i: int) -> Span:
        before, after = self.invite(messages[:i]), _without_marks(self._write(messages[: i + 1], invite=False))[0]
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                f"the chat template writes message {i} otherwise where others follow it, or otherwise than it invites "
                "to answer, so what is to be learned cannot be told; one with {% generation %} marks tells it"
            )
        return len(before), len(after)

    def _write(self, messages: Sequence[Message], *, invite: bool) -> str:
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=invite)
        except self._jinja2.TemplateError as e:
            raise ValueError(f"the chat template refuses it: {e}") from None
        except Exception as e:  # a template may do anything that Python can with what is in a message
            raise ValueError(f"the chat template fails: {type(e).__name__}: {e}") from None


class Conversations(Documents):
    """The conversations in the field `text_field` of the rows of files, each as one piece."""

    nothing = "conversations in which the assistant says nothing"

    def __init__(self, paths: list[pathlib.Path], text_field: str, template: ChatTemplate):
        super().__init__(paths, text_field)
        self.template = template

    def _whole(self, path, file):
        raise DataError(
            f"{path} holds no conversations (data.chat_template): they are rows of .jsonl, .parquet or datasets. "
            "For plain text: --data.chat_template=null"
        )

    def _check_type(self, path, column):
        import pyarrow.types as types

        if not (types.is_list(column) or types.is_large_list(column)):
            raise DataError(f"{path}: the column {self.text_field!r} must hold lists of messages, but holds {column}.")

    def _row(self, value, name):
        messages = _messages(value, f"{name}: the field {self.text_field!r}")
        try:
            text, spans = self.template.render(messages)
        except ValueError as e:
            raise DataError(f"{name}: {e} ({self.template.path}).") from None
        if not self._can_be_text(text, name):
            return
        if spans:
            yield Piece(text, True, tuple(spans))
        else:
            self.empty += 1


class ChatTokenizer:
    """A tokenizer for which a text is what a user says first: it is encoded up to where the assistant answers."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template
        self.vocab_size, self.separator = tokenizer.vocab_size, tokenizer.separator
        self.begin: tuple[int, ...] = ()  # the template writes it
        self.fingerprint, self.encode_batch = tokenizer.fingerprint, tokenizer.encode_batch
        self.encode_marked_up = tokenizer.encode_marked_up
        self.decode, self.stream = tokenizer.decode, tokenizer.stream

    def encode(self, text: str) -> np.ndarray:
        """Raises `ConfigError` where the template refuses the text."""
        try:
            prompt = self._template.invite([{"role": "user", "content": text}])
        except ValueError as e:
            raise ConfigError(f"{text!r:.80}: {e} ({self._template.path}).") from None
        return self._tokenizer.encode_marked_up([prompt])[0][0]


def load_template(config: DataConfig) -> ChatTemplate | None:
    """The template of `config`; raises `ConfigError` where there is none."""
    return None if config.chat_template is None else ChatTemplate(config.chat_template)


def _messages(value: Any, where: str) -> list[Message]:
    expected = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list of messages, such as {expected}, but is {value!r:.80}.")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where} must hold messages with a role, such as {expected}, but one is {message!r:.80}.")
    return [
        {name: x for name, x in message.items() if x is not None} for message in value
    ]  # Parquet fills up with null


def _find(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        return path
    for folder in (path, path / "huggingface"):  # of a run that began as a pretrained model
        for name in _FILES:
            if (folder / name).is_file():
                return folder / name
    known = ", ".join(_FILES)
    raise ConfigError(
        f"There is no chat template in {path}: none of {known}. Set --data.chat_template to a file of one."
    )


def _read(path: pathlib.Path) -> tuple[str, dict[str, str]]:
    """The template's source, and the special tokens that it may name (bos_token, eos_token, ...)."""
    try:
        if path.suffix != ".json":
            beside = path.with_name(_TOKENS)
            tokens = _special_tokens(json.loads(beside.read_text(encoding="utf-8"))) if beside.is_file() else {}
            return path.read_text(encoding="utf-8"), tokens
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"Cannot read {path} (data.chat_template): {e.strerror}.") from None
    except ValueError as e:
        raise ConfigError(f"{path} (data.chat_template) cannot be read: {e}.") from None
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):  # several by name
        found = next((x.get("template") for x in found if isinstance(x, dict) and x.get("name") == "default"), None)
    if not isinstance(found, str):
        raise ConfigError(
            f"{path} (data.chat_template) has no chat_template: this model was not made for chats. Name another file."
        )
    return found, _special_tokens(config)


def _special_tokens(config: Any) -> dict[str, str]:
    content = lambda x: x.get("content") if isinstance(x, dict) else x
    items = config.items() if isinstance(config, dict) else ()
    found = {name: content(x) for name, x in items if name.endswith("_token")}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _without_marks(text: str) -> tuple[str, list[Span]]:
    first, *rest = text.split(_BEGIN)
    spans, written = [], first
    for part in rest:
        inside, _, outside = part.partition(_END)
        spans.append((len(written), len(written) + len(inside)))
        written += inside + outside
    return written, spans


def _environment() -> tuple[Any, Any]:
    """(jinja2, an environment as transformers makes it for templates)."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError:
        raise ConfigError("Chat templates (data.chat_template) need jinja2. Type: pip install jinja2") from None

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return f"{_BEGIN}{caller()}{_END}"

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    to_json = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return jinja2, environment
