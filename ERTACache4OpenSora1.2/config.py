"""What a user edits. Every constant is also a flag of run.sh: NUM_INFERENCE_STEPS -> --num-inference-steps.

Paths in this file start from its folder, those given as flags from where the command is given.
"""

# model
MODEL = "auto"  # "auto", "tiny", or a hub id or folder; auto: REAL_MODEL if a GPU and its weights are here, else tiny
REAL_MODEL = "hpcai-tech/OpenSora-STDiT-v3"  # the denoiser; --model also takes a pipeline saved in diffusers' format
VAE_MODEL = "hpcai-tech/OpenSora-VAE-v1.2"  # hub id or folder; unused where the model is a whole pipeline
TEXT_MODEL = "DeepFloyd/t5-v1_1-xxl"  # the same; runs in float32, as in the original
REAL_MODEL_GIB = 36  # GPU memory that auto asks for, in GiB; the published peak at the size below is 31 GB
DTYPE = "bfloat16"  # float32, bfloat16 or float16; bfloat16 also rounds the sizes that the times depend on
OFFLOAD = "none"  # none, model (parts wait in host memory), or sequential (layer by layer: slow, smallest)

# what to generate
PROMPTS = "prompts/examples.txt"  # file with a prompt a line; --prompt TEXT replaces it
SEED = 0  # of the initial noise, the same for every prompt
HEIGHT = 480  # pixels; 480 x 854 is the official "480p" at "9:16"
WIDTH = 854  # pixels; the VAE decodes multiples of 8, so official sizes such as this one come out cut, to 848
RESOLUTION: str | None = None  # 144p, 240p, 360p, 480p, 720p, ...: a size by name, in place of HEIGHT and WIDTH
ASPECT_RATIO: str | None = None  # height to width, so 9:16 is landscape; 9:16 where only RESOLUTION is set
NUM_FRAMES: str | int = 51  # 1 (a picture), 17 and more, or a name: 2s (51 frames), 4s, 8s, 16s
FPS = 24.0  # frames per second, of the file and as the network is told
VIDEO_QUALITY = 8.0  # of the H.264 encoder, 0 to 10
NUM_INFERENCE_STEPS = 30  # Euler steps
GUIDANCE_SCALE = 7.0  # both branches in one call a step; 1: off, and half of the work
AESTHETIC_SCORE: float | None = 6.5  # appended to the prompt, as in the captions that it was trained on
MOTION_SCORE: float | None = None  # the same
CAMERA_MOTION: str | None = None  # the same: "pan right", "zoom in", ...

# how to accelerate: exactly one of the four goals is set, the others are None
METHOD = "ertacache"  # none, paper, teacache or ertacache
SPEEDUP: float | None = 2.0  # steps per computed step
COMPUTED_STEPS: int | None = None  # number of steps at which the transformer runs
MIN_PSNR: float | None = None  # dB to the uncached video, as predicted by cross-validation
THRESHOLD: str | float | None = None  # the paper's: "slow" (0.1), "fast" (0.18) or a number; or TeaCache's number
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
