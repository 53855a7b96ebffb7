"""Settings to edit. Every constant is also a flag of run.sh: NUM_INFERENCE_STEPS becomes --num-inference-steps.

Paths in this file start from its folder, paths in flags from where you give the command.
"""

# model
MODEL = "auto"  # auto, tiny, a hub id or a folder; auto: REAL_MODEL if a GPU and its weights are here, else tiny
REAL_MODEL = "THUDM/CogVideoX-2b"
REAL_MODEL_GIB = 24  # GPU memory that auto asks for, in GiB: weights, and a guess of the activations
DTYPE = "float16"  # float32, bfloat16 or float16; CogVideoX-2B was trained in float16
OFFLOAD = "none"  # none, model (parts wait in host memory) or sequential (layer by layer: least memory, slow)
VAE_TILING = True  # decode in overlapping tiles: much less memory, slightly other pixels

# what to generate
PROMPTS = "prompts/examples.txt"  # file with one prompt per line; --prompt TEXT replaces it
SEED = 0  # of the initial noise, the same for every prompt
HEIGHT = 480  # pixels, a multiple of 16
WIDTH = 720  # pixels, a multiple of 16
NUM_FRAMES = 49  # 8 n + 1: the VAE decodes no other number
FPS = 8  # frames per second of the file
VIDEO_QUALITY = 8.0  # H.264 quality, 0 to 10
NUM_INFERENCE_STEPS = 50  # scheduler steps
GUIDANCE_SCALE = 6.0  # both branches in one call per step; 1 or less: off, half the work
DYNAMIC_GUIDANCE = False  # let the guidance scale change with the timestep, as CogVideoX defines it
MAX_SEQUENCE_LENGTH = 226  # text tokens; the 2B model takes no other number

# sampler
SOLVER = "ddim"  # ddim, or dpm (second order, draws noise at every step)

# how to accelerate: set exactly one of the four goals, leave the others None
METHOD = "ertacache"  # none, ertacache, auto (no prompts needed), paper (published) or teacache
SPEEDUP: float | None = 2.0  # N / K: steps per computed step
COMPUTED_STEPS: int | None = None  # K: steps at which the transformer runs
MIN_PSNR: float | None = None  # dB to the uncached video, as predicted
THRESHOLD: float | None = None  # lambda of paper (0.3 published for 2B) or teacache; not for ertacache
PHI_OVER = "output"  # paper: phi divides the error of reuse by |o_i| (output) or |o_i - o_(i+1)| (change)

# calibration
CALIBRATION: str | None = None  # a calibration file; None: the one in CALIBRATION_FOLDER, made if missing
CALIBRATION_FOLDER = "calibration"
CALIBRATION_PROMPTS = "prompts/calibration.txt"  # one prompt per line; never used to measure quality
NUM_CALIBRATION_PROMPTS = 8  # the first ones of that file
MICRO_BATCH = 2  # samples per transformer call in calibration and comparison; with guidance a prompt is two
MEMORY_LIMIT_GIB: float | None = None  # recorded trajectories in host memory; above it, all go to files under TMPDIR
EFFORT = "balanced"  # fast, balanced or best: 1.5 P, 2.5 P or 100 uncached runs of calibration at 2x, for P prompts

# where results go
OUT = "sample"  # output folder, from where you give the command
