"""Settings to edit. Every constant is also a flag of run.sh: NUM_INFERENCE_STEPS becomes --num-inference-steps.

Paths in this file start from its folder, paths in flags from where you give the command.
"""

# model
MODEL = "auto"  # auto, tiny, a hub id or a folder; auto: REAL_MODEL if a GPU and its weights are here, else tiny
REAL_MODEL = "hpcai-tech/OpenSora-STDiT-v3"  # the denoiser; --model also takes a pipeline saved by save_pretrained
VAE_MODEL = "hpcai-tech/OpenSora-VAE-v1.2"  # hub id or folder; unused if the model is a whole pipeline
TEXT_MODEL = "DeepFloyd/t5-v1_1-xxl"  # the same; runs in float32, as the original does
REAL_MODEL_GIB = 36  # GPU memory that auto asks for, in GiB; the published peak is 31 GB at the size below
DTYPE = "bfloat16"  # float32, bfloat16 or float16; bfloat16 also rounds sizes, and so timesteps
OFFLOAD = "none"  # none, model (parts wait in host memory) or sequential (layer by layer: least memory, slow)

# what to generate
PROMPTS = "prompts/examples.txt"  # file with one prompt per line; --prompt TEXT replaces it
SEED = 0  # of the initial noise, the same for every prompt
HEIGHT = 480  # pixels; 480 x 854 is the official "480p" at "9:16"
WIDTH = 854  # pixels; the VAE decodes multiples of 8, so this comes out as 848
RESOLUTION: str | None = None  # 144p, 240p, 360p, 480p, 720p, ...: a size by name, in place of HEIGHT and WIDTH
ASPECT_RATIO: str | None = None  # height to width: 9:16 is landscape, and the default if only RESOLUTION is set
NUM_FRAMES: str | int = 51  # 1 (a picture), 17 and more, or a name: 2s (51 frames), 4s, 8s, 16s
FPS = 24.0  # frames per second, of the file and as the network is told
VIDEO_QUALITY = 8.0  # H.264 quality, 0 to 10
NUM_INFERENCE_STEPS = 30  # Euler steps
GUIDANCE_SCALE = 7.0  # both branches in one call per step; 1: off, half the work
AESTHETIC_SCORE: float | None = 6.5  # appended to the prompt, as in the captions of the training set
MOTION_SCORE: float | None = None  # the same
CAMERA_MOTION: str | None = None  # the same: "pan right", "zoom in", ...

# how to accelerate: set exactly one of the four goals, leave the others None
METHOD = "ertacache"  # none, ertacache, auto (no prompts needed), paper (published) or teacache
SPEEDUP: float | None = 2.0  # N / K: steps per computed step
COMPUTED_STEPS: int | None = None  # K: steps at which the transformer runs
MIN_PSNR: float | None = None  # dB to the uncached video, as predicted
THRESHOLD: str | float | None = None  # lambda of paper: slow (0.1), fast (0.18) or a number; or of teacache
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
