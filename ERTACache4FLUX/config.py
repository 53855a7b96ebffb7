"""Settings to edit. Every constant is also a flag of run.sh: NUM_INFERENCE_STEPS becomes --num-inference-steps.

Paths in this file start from its folder, paths in flags from where you give the command.
"""

# model
MODEL = "auto"  # auto, tiny, a hub id or a folder; auto: REAL_MODEL if a GPU and its weights are here, else tiny
REAL_MODEL = "black-forest-labs/FLUX.1-dev"  # gated: accept its licence on the hub first
REAL_MODEL_GIB = 34  # GPU memory that auto asks for, in GiB: weights, and a guess of the activations
DTYPE = "bfloat16"  # float32, bfloat16 or float16
OFFLOAD = "none"  # none, model (parts wait in host memory) or sequential (layer by layer: least memory, slow)

# what to generate
PROMPTS = "prompts/examples.txt"  # file with one prompt per line; --prompt TEXT replaces it
SEED = 0  # of the initial noise, the same for every prompt
HEIGHT = 1024  # pixels, a multiple of 16
WIDTH = 1024  # pixels, a multiple of 16
NUM_INFERENCE_STEPS = 28  # scheduler steps
GUIDANCE_SCALE = 3.5  # an embedding of the distilled model: one call per step
MAX_SEQUENCE_LENGTH = 512  # text tokens

# how to accelerate: set exactly one of the four goals, leave the others None
METHOD = "ertacache"  # none, ertacache, auto (no prompts needed), paper (published) or teacache
SPEEDUP: float | None = 2.0  # N / K: steps per computed step
COMPUTED_STEPS: int | None = None  # K: steps at which the transformer runs
MIN_PSNR: float | None = None  # dB to the uncached picture, as predicted
THRESHOLD: float | None = None  # lambda of paper (0.6 published for FLUX) or teacache; not for ertacache
PHI_OVER = "output"  # paper: phi divides the error of reuse by |o_i| (output) or |o_i - o_(i+1)| (change)

# calibration
CALIBRATION: str | None = None  # a calibration file; None: the one in CALIBRATION_FOLDER, made if missing
CALIBRATION_FOLDER = "calibration"
CALIBRATION_PROMPTS = "prompts/calibration.txt"  # one prompt per line; never used to measure quality
NUM_CALIBRATION_PROMPTS = 8  # the first ones of that file
MICRO_BATCH = 1  # samples per transformer call in calibration and comparison
MEMORY_LIMIT_GIB: float | None = None  # recorded trajectories in host memory; above it, all go to files under TMPDIR
EFFORT = "balanced"  # fast, balanced or best: 1.5 P, 2.5 P or 100 uncached runs of calibration at 2x, for P prompts

# where results go
OUT = "sample"  # output folder, from where you give the command
