"""What a client does with a proxy: tasks, local training, evaluation.

Nothing here imports transformers or datasets: tokenizers, models and data sets are used by what
they can do (duck typing), so any that behave alike will work.
"""

from fedveil.training.evaluation import evaluate
from fedveil.training.generation import Answers, Generation, answer, generate, score
from fedveil.training.images import ImageClassification
from fedveil.training.language import CausalLM, Seq2Seq
from fedveil.training.settings import Training
from fedveil.training.tasks import Dataset, Measure, Prepared, Task
from fedveil.training.text import TextClassification
from fedveil.training.trainer import LocalRun, Trainer, TrainingRecord

__all__ = [
    "Answers",
    "CausalLM",
    "Dataset",
    "Generation",
    "ImageClassification",
    "LocalRun",
    "Measure",
    "Prepared",
    "Seq2Seq",
    "Task",
    "TextClassification",
    "Trainer",
    "Training",
    "TrainingRecord",
    "answer",
    "evaluate",
    "generate",
    "score",
]
