"""Overrides of ../config.py for the embedded tiny pipeline."""

DTYPE = "float32"
PROMPTS = "prompts/tiny_examples.txt"
NEGATIVE_PROMPT = ""  # trained with empty captions, not with the official text
HEIGHT = 64
WIDTH = 64
NUM_FRAMES = 17
MAX_SEQUENCE_LENGTH = 48
MICRO_BATCH = 16
FLOW_SHIFT = 14.0  # above the 8 to 12 advised for 1.3B: makes the steps harder to predict
