"""Typed configuration from YAML files, the environment and the command line.

    dataclass defaults  <  `base:` files  <  file  <  REVJAX__MODEL__NUM_LAYERS=48  <  --model.num_layers=48

The schema is any tree of frozen, keyword-only dataclasses: nothing here knows what they mean. Every
mistake is a `ConfigError` that names where it was made, the field, what was expected, and what came.

tyro renders `--help` from the dataclasses. It does not parse: one typed tree for files, environment and
command line gives all three the same precedence, the same errors, and a record of who set what.
"""

from .files import dump as dump
from .help import help_text as help_text
from .importing import import_function as import_function
from .loading import Loaded as Loaded
from .loading import load as load
from .loading import load_with_provenance as load_with_provenance
from .places import users_cache as users_cache
