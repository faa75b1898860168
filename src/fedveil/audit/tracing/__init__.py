"""Whose proxy is this? Traces a published model file to the clients whose masks it bears.

    from fedveil.audit import Evidence
    from fedveil.audit.tracing import read_model, trace

    print(trace(Evidence("runs/first"), read_model("found.safetensors")).sentence)

How it works, and what a p-value means, is in docs/tracing.md.
"""

from fedveil.audit.tracing.leaked import fit, read_model
from fedveil.audit.tracing.tracer import Match, Trace, trace

__all__ = ["Match", "Trace", "fit", "read_model", "trace"]
