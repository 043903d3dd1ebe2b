"""Tokens of local text, in batches that can be resumed at any step."""

from .batches import Batches as Batches
from .batches import batches as batches
from .batches import validation_batches as validation_batches
from .corpus import END_OF_FILE as END_OF_FILE
from .corpus import Corpus as Corpus
from .corpus import DataConfig as DataConfig
from .corpus import load_corpus as load_corpus
from .tokenizer import ByteTokenizer as ByteTokenizer
