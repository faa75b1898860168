"""A federation over machines, made ready: folders with keys, settings, programs, instructions."""

from fedveil.deploy.init import Address, write_deployment

__all__ = ["Address", "write_deployment"]
