"""fedveil: federated fine-tuning in which neither the data nor the model is handed over.

The data stays with the clients and the model with its owner: in each round the server releases
only a proxy, some units withheld and the rest quantized, clients train their proxies and return
updates, and the server adds these to the full-precision model that nobody else ever holds.
"""

from fedveil.aggregation import Mean, RegMean
from fedveil.engine import Bounds, Evaluation, Observer
from fedveil.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    FedveilError,
    ProtocolError,
    TrainingError,
    UnknownArchitectureError,
    WireError,
)
from fedveil.federation import Federation, Result, Tuning
from fedveil.run import RoundRecord
from fedveil.schemes import FedAvg, FedLPP, FedQSN, Scheme
from fedveil.secret import Secret
from fedveil.tasks import CausalLM, ImageClassification, Seq2Seq, TextClassification
from fedveil.training import Training

__version__ = "0.1.0"

__all__ = [
    "Bounds",
    "CausalLM",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "Evaluation",
    "FedAvg",
    "FedLPP",
    "FedQSN",
    "Federation",
    "FedveilError",
    "ImageClassification",
    "Mean",
    "Observer",
    "ProtocolError",
    "RegMean",
    "Result",
    "RoundRecord",
    "Scheme",
    "Secret",
    "Seq2Seq",
    "TextClassification",
    "Training",
    "TrainingError",
    "Tuning",
    "UnknownArchitectureError",
    "WireError",
    "__version__",
]
