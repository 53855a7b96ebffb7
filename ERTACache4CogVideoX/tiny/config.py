"""Overrides of ../config.py for the embedded tiny pipeline."""

DTYPE = "float32"
VAE_TILING = False
PROMPTS = "prompts/tiny_examples.txt"
HEIGHT = 64
WIDTH = 64
NUM_FRAMES = 17
MAX_SEQUENCE_LENGTH = 48
MICRO_BATCH = 16
