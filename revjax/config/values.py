"""A value together with the place that it came from, so that every error can name it."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Value:
    """A scalar, a list of `Value`, or a dict from str to `Value`."""

    data: Any
    where: str  # "configs/a.yaml:3", "REVJAX__MODEL__D_MODEL" or "--model.d_model"
    text: str | None = None  # as typed, where it came from a shell: there, "12" may also mean a str

    @property
    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.data, dict):
            return {k: v.plain for k, v in self.data.items()}
        return [v.plain for v in self.data] if isinstance(self.data, list) else self.data


def merge(low: Value, high: Value) -> Value:
    """Returns `low` overridden by `high`: mappings are merged key by key, anything else is replaced."""
    if not (isinstance(low.data, dict) and isinstance(high.data, dict)):
        return high
    merged = low.data | {k: merge(low.data[k], v) if k in low.data else v for k, v in high.data.items()}
    return Value(merged, high.where)
