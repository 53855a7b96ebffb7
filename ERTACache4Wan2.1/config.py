"""Settings to edit. Every constant is also a flag of run.sh: NUM_INFERENCE_STEPS becomes --num-inference-steps.

Paths in this file start from its folder, paths in flags from where you give the command.
"""

# model
MODEL = "auto"  # auto, tiny, a hub id or a folder; auto: REAL_MODEL if a GPU and its weights are here, else tiny
REAL_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # 14B: Wan-AI/Wan2.1-T2V-14B-Diffusers
REAL_MODEL_GIB = 24  # GPU memory that auto asks for, in GiB: weights, and a guess of the activations
DTYPE = "bfloat16"  # float32, bfloat16 or float16; the VAE stays in float32
OFFLOAD = "none"  # none, model (parts wait in host memory) or sequential (layer by layer: least memory, slow)

# what to generate
PROMPTS = "prompts/examples.txt"  # file with one prompt per line; --prompt TEXT replaces it
# The official code's, which the pipeline alone leaves empty: colours too bright, overexposed, static, blurred details,
# subtitles, deformed limbs, cluttered background, walking backwards, ...
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
SEED = 0  # of the initial noise, the same for every prompt
HEIGHT = 480  # pixels, a multiple of 16; the 1.3B model knows 832x480 and 480x832
WIDTH = 832  # pixels, a multiple of 16
NUM_FRAMES = 81  # 4 n + 1
FPS = 16  # frames per second of the file; the model knows no other
VIDEO_QUALITY = 8.0  # H.264 quality, 0 to 10
NUM_INFERENCE_STEPS = 50  # scheduler steps, of two transformer calls each
GUIDANCE_SCALE = 5.0  # 6 advised for 1.3B; 1 or less: off, one call per step
MAX_SEQUENCE_LENGTH = 512  # text tokens

# sampler
SOLVER = "unipc"  # unipc, dpm++ or euler
FLOW_SHIFT = 5.0  # sigma' = s sigma / (1 + (s - 1) sigma); 8 to 12 advised for 1.3B
GRID = "official"  # official, or diffusers: other sigmas since its release 0.37

# how to accelerate: set exactly one of the four goals, leave the others None
METHOD = "ertacache"  # none, ertacache, auto (no prompts needed), paper (published) or teacache
SPEEDUP: float | None = 2.0  # N / K: steps per computed step
COMPUTED_STEPS: int | None = None  # K: steps at which the transformer runs
MIN_PSNR: float | None = None  # dB to the uncached video, as predicted
THRESHOLD: float | None = None  # lambda of paper (0.08 published for 1.3B) or teacache; not for ertacache
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
