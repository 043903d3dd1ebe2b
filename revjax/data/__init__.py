"""Tokens of local text, or images, in batches that can be resumed at any step.

files -> documents -> tokens, cached -> texts, to train on and held out -> rows -> batches
images, to train on and held out -> batches -> changed at random, on the device
"""

from .augment import make_augment as make_augment
from .batches import Batch as Batch
from .batches import Batches as Batches
from .batches import RowBatches as RowBatches
from .batches import batch_shapes as batch_shapes
from .batches import validation_batches as validation_batches
from .chat import CHAT_TEMPLATE as CHAT_TEMPLATE
from .chat import ChatTemplate as ChatTemplate
from .chat import ChatTokenizer as ChatTokenizer
from .chat import load_template as load_template
from .config import BYTES as BYTES
from .config import STDLIB as STDLIB
from .config import DataConfig as DataConfig
from .config import TokenizerConfig as TokenizerConfig
from .corpus import Corpus as Corpus
from .corpus import Part as Part
from .corpus import Text as Text
from .corpus import find_texts as find_texts
from .corpus import load_corpus as load_corpus
from .images import ImageBatches as ImageBatches
from .images import Images as Images
from .images import ImagesConfig as ImagesConfig
from .images import find_images as find_images
from .images import image_batches as image_batches
from .images import load_images as load_images
from .rows import PackedRows as PackedRows
from .tokenizer import BYTE_0 as BYTE_0
from .tokenizer import SEPARATORS as SEPARATORS
from .tokenizer import ByteTokenizer as ByteTokenizer
from .tokenizer import FileTokenizer as FileTokenizer
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import byte_tokenizer_json as byte_tokenizer_json
from .tokenizer import load_tokenizer as load_tokenizer
from .tokenizer import special_token as special_token
from .tokenizer import train_tokenizer as train_tokenizer
