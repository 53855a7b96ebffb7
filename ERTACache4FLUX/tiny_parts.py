"""The parts of the tiny FLUX pipeline at their sizes."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tiny_training import text
from tiny_training.plan import MAX_TEXT_LENGTH, SIZE

LATENT_CHANNELS = 8
VAE_FACTOR = 4


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The times of FLUX.1-dev at its default of 1024 x 1024 pixels, a shift of 1.15, for pictures of any size."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_shift=1.15, max_shift=1.15)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text_encoders(vocabulary_size: int) -> tuple[T5EncoderModel, CLIPTextModel]:
    sequence = T5Config(**text.sequence_settings(vocabulary_size))
    pooled = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TEXT_LENGTH,
        projection_dim=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return T5EncoderModel(sequence), CLIPTextModel(pooled)


def build_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=LATENT_CHANNELS * 4,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text.SEQUENCE_WIDTH,
        pooled_projection_dim=64,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 14, 14),
    )
