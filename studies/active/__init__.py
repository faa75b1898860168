"""Hostile clients that work through the engine and real bytes: what one of ten reads and breaks."""
