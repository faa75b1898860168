"""What a client does with a proxy: the local loop; and what a model is worth: evaluation, answers.

Nothing here imports transformers or datasets: see :mod:`fedveil.tasks`.
"""

from fedveil.training.evaluation import evaluate
from fedveil.training.generation import Answers, Generation, answer, generate, score
from fedveil.training.settings import Training
from fedveil.training.trainer import LocalRun, Trainer, TrainingRecord

__all__ = [
    "Answers",
    "Generation",
    "LocalRun",
    "Trainer",
    "Training",
    "TrainingRecord",
    "answer",
    "evaluate",
    "generate",
    "score",
]
