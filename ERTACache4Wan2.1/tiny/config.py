"""What the embedded tiny pipeline overrides in ../config.py."""

DTYPE = "float32"
PROMPTS = "prompts/tiny_examples.txt"
NEGATIVE_PROMPT = ""  # it was trained with empty captions, not with the official text
HEIGHT = 64
WIDTH = 64
NUM_FRAMES = 17
MAX_SEQUENCE_LENGTH = 48
MICRO_BATCH = 16
FLOW_SHIFT = 14.0  # the official README advises 8 to 12 for 1.3B; with 14, half the steps are below 40 dB
