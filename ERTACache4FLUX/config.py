"""What a user edits. Every constant is also a flag of run.sh: NUM_INFERENCE_STEPS -> --num-inference-steps.

Paths in this file start from its folder, those given as flags from where the command is given.
"""

# model
MODEL = "auto"  # "auto", "tiny", or a hub id or folder; auto: REAL_MODEL if a GPU and its weights are here, else tiny
REAL_MODEL = "black-forest-labs/FLUX.1-dev"  # gated: accept its licence on the hub first
REAL_MODEL_GIB = 34  # GPU memory that auto asks for, in GiB: 31 of weights, the rest for a guess of the activations
DTYPE = "bfloat16"  # float32, bfloat16 or float16
OFFLOAD = "none"  # none, model (parts wait in host memory), or sequential (layer by layer: slow, smallest)

# what to generate
PROMPTS = "prompts/examples.txt"  # file with a prompt a line; --prompt TEXT replaces it
SEED = 0  # of the initial noise, the same for every prompt
HEIGHT = 1024  # pixels, a multiple of 16
WIDTH = 1024  # pixels, a multiple of 16
NUM_INFERENCE_STEPS = 28  # scheduler steps
GUIDANCE_SCALE = 3.5  # given to the model as an embedding
MAX_SEQUENCE_LENGTH = 512  # text tokens

# how to accelerate: exactly one of the four goals is set, the others are None
METHOD = "ertacache"  # none, paper, teacache or ertacache
SPEEDUP: float | None = 2.0  # steps per computed step
COMPUTED_STEPS: int | None = None  # number of steps at which the transformer runs
MIN_PSNR: float | None = None  # dB to the uncached picture, as predicted by cross-validation
THRESHOLD: float | None = None  # the paper's lambda (0.6 for FLUX) or TeaCache's; not for ertacache
PHI_OVER = "output"  # of the paper: phi measures the error of reuse by |o_i| (output) or |o_i - o_(i+1)| (change)

# calibration
CALIBRATION: str | None = None  # a calibration file to use; None: the one in CALIBRATION_FOLDER, made if missing
CALIBRATION_FOLDER = "calibration"
CALIBRATION_PROMPTS = "prompts/calibration.txt"  # a prompt a line; never used to measure quality
NUM_CALIBRATION_PROMPTS = 8  # the first ones of that file
MICRO_BATCH = 1  # samples the transformer sees at a time in calibration and comparison
MEMORY_LIMIT_GIB: float | None = None  # recorded trajectories in host memory; above it in files under TMPDIR
EFFORT = "balanced"  # fast, balanced or best: 1.5, 3 or up to 12 uncached runs for each of 8 prompts at 2x

# where results go
OUT = "sample"  # folder, from where the command is given
