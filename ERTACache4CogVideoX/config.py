"""What a user edits. Every constant is also a flag of run.sh: NUM_INFERENCE_STEPS -> --num-inference-steps.

Paths in this file start from its folder, those given as flags from where the command is given.
"""

# model
MODEL = "auto"  # "auto", "tiny", or a hub id or folder; auto: REAL_MODEL if a GPU and its weights are here, else tiny
REAL_MODEL = "THUDM/CogVideoX-2b"
REAL_MODEL_GIB = 24  # GPU memory that auto asks for, in GiB: 12 of weights, the rest for a guess of the activations
DTYPE = "float16"  # float32, bfloat16 or float16; CogVideoX-2B was trained in float16
OFFLOAD = "none"  # none, model (parts wait in host memory), or sequential (layer by layer: slow, smallest)
VAE_TILING = True  # decode in overlapping tiles: much less memory, slightly other pixels

# what to generate
PROMPTS = "prompts/examples.txt"  # file with a prompt a line; --prompt TEXT replaces it
SEED = 0  # of the initial noise, the same for every prompt
HEIGHT = 480  # pixels, a multiple of 16
WIDTH = 720  # pixels, a multiple of 16
NUM_FRAMES = 49  # 8 n + 1: the VAE decodes no other number
FPS = 8  # frames per second of the file
VIDEO_QUALITY = 8.0  # of the H.264 encoder, 0 to 10
NUM_INFERENCE_STEPS = 50  # scheduler steps
GUIDANCE_SCALE = 6.0  # both branches in one call a step; 1 and less: off, and half of the work
DYNAMIC_GUIDANCE = False  # let the guidance scale change with the timestep, as CogVideoX defines it
MAX_SEQUENCE_LENGTH = 226  # text tokens; the 2B model takes no other number

# sampler
SOLVER = "ddim"  # ddim, or dpm (second order, draws noise at every step)

# how to accelerate: exactly one of the four goals is set, the others are None
METHOD = "ertacache"  # none, paper, teacache or ertacache
SPEEDUP: float | None = 2.0  # steps per computed step
COMPUTED_STEPS: int | None = None  # number of steps at which the transformer runs
MIN_PSNR: float | None = None  # dB to the uncached video, as predicted by cross-validation
THRESHOLD: float | None = None  # the paper's lambda (0.3 for CogVideoX-2B) or TeaCache's; not for ertacache
PHI_OVER = "output"  # of the paper: phi measures the error of reuse by |o_i| (output) or |o_i - o_(i+1)| (change)

# calibration
CALIBRATION: str | None = None  # a calibration file to use; None: the one in CALIBRATION_FOLDER, made if missing
CALIBRATION_FOLDER = "calibration"
CALIBRATION_PROMPTS = "prompts/calibration.txt"  # a prompt a line; never used to measure quality
NUM_CALIBRATION_PROMPTS = 8  # the first ones of that file
MICRO_BATCH = 2  # samples the transformer sees at a time in calibration and comparison; with guidance a prompt is two
MEMORY_LIMIT_GIB: float | None = None  # recorded trajectories in host memory; above it in files under TMPDIR
EFFORT = "balanced"  # fast, balanced or best: 1.5, 3 or up to 12 uncached runs for each of 8 prompts at 2x

# where results go
OUT = "sample"  # folder, from where the command is given
