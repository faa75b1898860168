"""The command line. Everything heavy is imported by the command that needs it."""

# Commands register themselves, in the order in which help lists them.
from fedveil.cli import running, models, audits, deploying, partner  # noqa: F401, I001
from fedveil.cli.app import app, main

__all__ = ["app", "main"]
