"""The config.json of a pretrained model, of which every field must be understood.

A field that is not known may change what the model computes, so that leaving it out would be a silent mistake.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

REQUIRED: Any = object()

# What a model computes does not depend on these: names of tokens, how it is trained, bookkeeping.
_NOT_OF_THE_FUNCTION = set(
    "architectures model_type torch_dtype dtype transformers_version _name_or_path auto_map use_cache "
    "cache_implementation initializer_range bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
    "attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout hidden_dropout_prob "
    "attention_probs_dropout_prob task_specific_params _attn_implementation "
    "attn_implementation summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
    "id2label label2id problem_type finetuning_task tokenizer_class prefix return_dict return_dict_in_generate "
    "output_hidden_states output_attentions output_scores chunk_size_feed_forward pretraining_tp "
    "gradient_checkpointing reorder_and_upcast_attn n_ctx max_window_layers _sliding_window_pattern".split()
)
# These would change it, and are known to be switched off in decoders.
_OFF = {"is_encoder_decoder": False, "add_cross_attention": False, "is_decoder": False, "quantization_config": None}


class Fields:
    """Takes the fields of a config one by one; `finish` refuses what is left.

    Args:
      values: what the file says.
      where: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._left = dict(values)
        self._known: set[str] = set()
        self.where = where

    def take(self, name: str, kind: type, default: Any = REQUIRED, *, or_null: bool = False) -> Any:
        """Returns the field, of the type `kind`; raises `ConfigError` for another type.

        Where it is not there, it is the default. One that is null is None if `or_null`, and otherwise not there.
        """
        self._known.add(name)
        is_there, value = name in self._left, self._left.pop(name, None)
        if value is None:
            if is_there and or_null:
                return None
            if default is REQUIRED:
                raise ConfigError(f"{self.where} has no field {name!r}.")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.where}: {name} must be {kind.__name__}, but got {value!r}.")
        return value

    def choose(self, name: str, choices: Mapping[str, str], default: Any = REQUIRED) -> str:
        """Returns what the field's value means here; raises `ConfigError` for one that means nothing here."""
        value = self.take(name, str, default)
        if value not in choices:
            raise ConfigError(f"{self.where}: {name} {value!r} is not supported. Supported are {', '.join(choices)}.")
        return choices[value]

    def ignore(self, *names: str) -> None:
        """These do not change what the model computes."""
        self._known.update(names)
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, *allowed: Any) -> None:
        """Raises `ConfigError` if the field is there with another value than these."""
        self._known.add(name)
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            raise ConfigError(
                f"{self.where}: {name}={value!r} is not supported, only {' or '.join(map(repr, allowed))}."
            )

    def finish(self) -> None:
        """Raises `ConfigError` where a field is left that may change what the model computes."""
        for name, value in _OFF.items():
            self.only(name, value)
        left = {n: value for n, value in self._left.items() if value is not None and n not in _NOT_OF_THE_FUNCTION}
        if left:
            shown = ", ".join(f"{name}={value!r}" for name, value in left.items())
            near = [n for name in left for n in difflib.get_close_matches(name, self._known, n=1)]
            hint = f" (Known are {', '.join(near)}.)" if near else ""
            raise ConfigError(
                f"{self.where} has fields that this version does not know, and that may change what the model "
                f"computes: {shown}.{hint} If they do not, delete them there."
            )
