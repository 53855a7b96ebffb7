"""Overrides of ../config.py for the embedded tiny pipeline."""

DTYPE = "float32"
PROMPTS = "prompts/tiny_examples.txt"
HEIGHT = 64
WIDTH = 64
MAX_SEQUENCE_LENGTH = 40
MICRO_BATCH = 16
