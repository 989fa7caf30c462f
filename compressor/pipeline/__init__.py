"""The verbs of the command line as functions: each takes a recipe or a run, returns its JSON."""

from vdcompress.pipeline.apply import compress

__all__ = ["compress"]
