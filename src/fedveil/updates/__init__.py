"""What may happen to an update on its way up: encode on the client, decode on the server."""

from fedveil.updates.codec import SMALL, UpdateCodec, Updates, check_bits

__all__ = ["SMALL", "UpdateCodec", "Updates", "check_bits"]
