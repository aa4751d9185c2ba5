"""Layers in Depth: the small library behind the lessons. Each module is one idea; see the lesson table in README.md."""

COURSE = "layers-in-depth"  # lets the setup cell tell this `lib` from any other folder of that name
__version__ = "0.1.0"
