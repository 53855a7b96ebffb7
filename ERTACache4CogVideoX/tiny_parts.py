"""The parts of the tiny CogVideoX pipeline at their sizes."""

from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from tiny_training import text
from tiny_training.plan import MAX_TEXT_LENGTH, NUM_FRAMES, SIZE

LATENT_CHANNELS = 16
VAE_FACTOR = 4  # pixels per latent, both ways


def build_scheduler() -> CogVideoXDDIMScheduler:
    """The noise schedule of CogVideoX-2B: v-prediction, zero signal at the last timestep, shifted towards noise."""
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
    )


def build_vae() -> AutoencoderKLCogVideoX:
    levels = 3
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        block_out_channels=(8, 16, 32),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_height=SIZE,
        sample_width=SIZE,
        scaling_factor=1.0,
    )


def build_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**text.sequence_settings(vocabulary_size)))


def build_transformer() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=text.SEQUENCE_WIDTH,
        num_layers=9,
        sample_width=SIZE // VAE_FACTOR,
        sample_height=SIZE // VAE_FACTOR,
        sample_frames=NUM_FRAMES,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=MAX_TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
    )
