"""One file per system; base.py holds the contract they fulfil."""

from fedveil.schemes.base import ClientSide, Scheme, ServerSide, ServerState, with_aggregation
from fedveil.schemes.client import examples_of
from fedveil.schemes.facts import EXACT, Bits, Facts
from fedveil.schemes.fedavg import FedAvg
from fedveil.schemes.fedlpp import FedLPP
from fedveil.schemes.fedqsn import FedQSN
from fedveil.schemes.registry import register_scheme, scheme_class, scheme_names
from fedveil.schemes.transfer import Transfer, check_public

__all__ = [
    "EXACT",
    "Bits",
    "ClientSide",
    "Facts",
    "FedAvg",
    "FedLPP",
    "FedQSN",
    "Scheme",
    "ServerSide",
    "ServerState",
    "Transfer",
    "check_public",
    "examples_of",
    "register_scheme",
    "scheme_class",
    "scheme_names",
    "with_aggregation",
]
