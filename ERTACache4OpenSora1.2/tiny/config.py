"""Overrides of ../config.py for the embedded tiny pipeline."""

DTYPE = "float32"
PROMPTS = "prompts/tiny_examples.txt"
HEIGHT = 64
WIDTH = 64
RESOLUTION = None
ASPECT_RATIO = None
NUM_FRAMES = 17
AESTHETIC_SCORE = None  # its captions have no scores
MICRO_BATCH = 16
