"""What may happen to an update on its way up: encode on the client, decode on the server."""

from fedveil.updates.codec import SMALL, UpdateCodec, Updates, check_bits
from fedveil.updates.feedback import ErrorFeedback, check_error_feedback

__all__ = [
    "SMALL",
    "ErrorFeedback",
    "UpdateCodec",
    "Updates",
    "check_bits",
    "check_error_feedback",
]
