"""What a task is: how rows become batches, what a batch's loss is, and what a model is judged by.

Nothing here imports transformers or datasets: tokenizers, models and data sets are used by what
they can do (duck typing), so any that behave alike will work.
"""

from fedveil.tasks.images import ImageClassification
from fedveil.tasks.language import CausalLM, Seq2Seq
from fedveil.tasks.task import Dataset, Measure, Prepared, Task
from fedveil.tasks.text import TextClassification

__all__ = [
    "CausalLM",
    "Dataset",
    "ImageClassification",
    "Measure",
    "Prepared",
    "Seq2Seq",
    "Task",
    "TextClassification",
]
