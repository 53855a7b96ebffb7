"""What the embedded tiny pipeline overrides in ../config.py."""

DTYPE = "float32"
PROMPTS = "prompts/tiny_examples.txt"
HEIGHT = 64
WIDTH = 64
RESOLUTION = None
ASPECT_RATIO = None
NUM_FRAMES = 17
AESTHETIC_SCORE = None  # its captions have no scores: the words would be unknown ones
MICRO_BATCH = 16
