"""The folder of a run: everything that a run writes down, and reads again."""

from fedveil.run.exposure import Exposure
from fedveil.run.findings import Attacked, Audit, Checked, ClientExposure, UpdateGuess
from fedveil.run.folder import RunFolder
from fedveil.run.manifest import Manifest
from fedveil.run.records import RoundRecord
from fedveil.run.shown import Proxy

__all__ = [
    "Attacked",
    "Audit",
    "Checked",
    "ClientExposure",
    "Exposure",
    "Manifest",
    "Proxy",
    "RoundRecord",
    "RunFolder",
    "UpdateGuess",
]
