"""Checkpoints of other engines from a folder that `quantize` wrote: one file per format, `command.py` is the verb."""
