"""Layers in Depth: the course's small shared library."""
__version__ = "0.1.0"
