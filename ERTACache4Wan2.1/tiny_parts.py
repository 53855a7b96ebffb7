"""The parts of the tiny Wan pipeline at their sizes."""

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tiny_training import text

LATENT_CHANNELS = 16
VAE_FACTOR = 4  # pixels per latent, both ways; the textures of the scenes have periods of 4 to 6 pixels


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=VAE_FACTOR,
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**text.sequence_settings(vocabulary_size)))


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text.SEQUENCE_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
