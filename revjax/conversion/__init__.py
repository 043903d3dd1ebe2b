"""Pretrained decoders of transformers in, and out again: one file for each family, one table used both ways.

    fields          a config.json, of which every field must be understood
    rope            its rotary positions
    families        what each architecture's config and tensors are, beside ours
    places          which of our stacked parameters belongs to which layer
    tensor_files    safetensors, tensor by tensor
    pretrained      a checkpoint, and our parameters out of it
    stock           our parameters as a checkpoint

Nothing here needs torch or transformers.
"""

from .families import FAMILIES as FAMILIES
from .places import parameter_shapes as parameter_shapes
from .pretrained import CONFIG as CONFIG
from .pretrained import Pretrained as Pretrained
from .pretrained import copy_parameters as copy_parameters
from .pretrained import open_pretrained as open_pretrained
from .pretrained import read_config_json as read_config_json
from .stock import stock_config as stock_config
from .stock import write_pretrained as write_pretrained
from .tensor_files import TensorFiles as TensorFiles
