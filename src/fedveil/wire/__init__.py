"""Messages between server and clients: typed sections to bytes and back.

    data = Message("proxy", "fedqsn", 3, "clinic-2", {"layer.weight": packed}, {}).to_bytes()
    message = Message.from_bytes(data)

The container is a safetensors file with one versioned, checksummed header, written down in
`docs/wire-format.md`. Whatever bytes arrive, the answer is a `Message` or a
`fedveil.errors.WireError`, and nothing is ever unpickled.

What it does NOT protect: a message is neither encrypted nor signed, and its checksum catches
accidents only. Secrecy and the sender's identity are the transport's work (TLS, Flower's
authentication).
"""

from fedveil.wire.limits import Limits
from fedveil.wire.message import Message
from fedveil.wire.reply import reply_limits
from fedveil.wire.sections import Dense, Gathered, Section, Sections, Statistics, UnitIndex

__all__ = [
    "Dense",
    "Gathered",
    "Limits",
    "Message",
    "Section",
    "Sections",
    "Statistics",
    "UnitIndex",
    "reply_limits",
]
