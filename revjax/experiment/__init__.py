"""A run from its configuration: the one package that knows all parts.

config  ->  build: text, model, optimizer, compiled step  ->  run: trains in runs/NAME/
"""

from .advice import Suggestion as Suggestion
from .advice import describe_suggestions as describe_suggestions
from .advice import suggestions as suggestions
from .build import Experiment as Experiment
from .build import build as build
from .build import check_model as check_model
from .compilation import use_compilation_cache as use_compilation_cache
from .config import FolderConfig as FolderConfig
from .config import MemoryConfig as MemoryConfig
from .config import RunConfig as RunConfig
from .config import SampleConfig as SampleConfig
from .devices import Devices as Devices
from .doctor import doctor as doctor
from .evaluation import EvaluateConfig as EvaluateConfig
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .fidelity import describe_departure as describe_departure
from .plan_report import describe_plan as describe_plan
from .plan_report import plan_json as plan_json
from .planning import SIZES as SIZES
from .planning import candidates as candidates
from .planning import largest as largest
from .planning import plan as plan
from .planning import with_choice as with_choice
from .pretrained import FromHFConfig as FromHFConfig
from .pretrained import ToHFConfig as ToHFConfig
from .pretrained import describe_from_hf as describe_from_hf
from .pretrained import from_hf as from_hf
from .pretrained import to_hf as to_hf
from .program import Program as Program
from .program import bytes_of_step as bytes_of_step
from .program import stepper as stepper
from .run import Result as Result
from .run import run as run
from .samples import read_prompts as read_prompts
from .samples import sample_text as sample_text
from .samples import sample_texts as sample_texts
from .samples import stream_text as stream_text
from .trained import LanguageModel as LanguageModel
from .trained import TrainedRun as TrainedRun
from .trained import chat_tokenizer as chat_tokenizer
from .trained import export as export
from .trained import load_language_model as load_language_model
from .trained import load_run as load_run
from .versions import versions as versions
from .words import announce as announce
from .words import describe_gpu_use as describe_gpu_use
from .words import describe_memory as describe_memory
from .words import describe_time as describe_time
from .words import summarize as summarize
