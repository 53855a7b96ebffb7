"""What the embedded tiny pipeline overrides in ../config.py."""

DTYPE = "float32"
PROMPTS = "prompts/tiny_examples.txt"
NEGATIVE_PROMPT = ""  # it was trained with empty captions, not with the official text
HEIGHT = 64
WIDTH = 64
NUM_FRAMES = 17
MAX_SEQUENCE_LENGTH = 48
NUM_CALIBRATION_PROMPTS = 16
MICRO_BATCH = 16
FLOW_SHIFT = 12.0  # in the range that the official README advises for 1.3B; the steps are harder to predict than at 5
REFINE = 4
