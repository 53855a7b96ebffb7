"""The parts of the tiny Wan pipeline at their sizes."""

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tiny_training import text

LATENT_CHANNELS = 32
PIXEL_BLOCK = 2  # pixels, both ways, that the autoencoder takes for one place; a quarter of what a latent stands for


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=3 * PIXEL_BLOCK**2,
        out_channels=3 * PIXEL_BLOCK**2,
        patch_size=PIXEL_BLOCK,
        scale_factor_spatial=4 * PIXEL_BLOCK,
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**text.sequence_settings(vocabulary_size)))


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text.SEQUENCE_WIDTH,
        freq_dim=64,
        ffn_dim=480,
        num_layers=7,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
