"""The parts of the tiny Open-Sora pipeline at their sizes, and what fits them to the shared trainers."""

from types import SimpleNamespace

from opensora12 import OpenSoraVAE, STDiT3
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tiny_training import text
from tiny_training.plan import MAX_TEXT_LENGTH, NUM_FRAMES, SIZE

LATENT_CHANNELS = 16
PICTURE_CHANNELS = 8  # of a frame, before the temporal autoencoder
VAE_LEVELS = 3  # pixels are quartered


def build_vae() -> OpenSoraVAE:
    spatial = {  # the shape of the tiny FLUX pipeline's, whose weights it takes
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": PICTURE_CHANNELS,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * VAE_LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * VAE_LEVELS,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    temporal = {
        "in_out_channels": PICTURE_CHANNELS,
        "latent_embed_dim": LATENT_CHANNELS,
        "embed_dim": LATENT_CHANNELS,
        "filters": 24,
        "num_res_blocks": 1,
        "channel_multipliers": (1, 1, 1),
        "temporal_downsample": (True, True),
        "num_groups": 8,
    }
    plain = {"shift": (0.0,) * LATENT_CHANNELS, "scale": (1.0,) * LATENT_CHANNELS}
    return OpenSoraVAE(spatial, temporal, micro_frame_size=NUM_FRAMES, micro_batch_size=4 * NUM_FRAMES, **plain)


def build_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**text.sequence_settings(vocabulary_size)))


class StaticSTDiT3(STDiT3):
    """STDiT3 that hides the tokens that do not exist instead of cutting them off, which is the same attention.

    So every batch has one shape, and is compiled once.
    """

    def _captions(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.y_embedder(y).squeeze(1), mask.bool()[:, None, None]


def build_transformer() -> StaticSTDiT3:
    transformer = StaticSTDiT3(
        input_sq_size=SIZE,
        in_channels=LATENT_CHANNELS,
        hidden_size=128,
        depth=4,
        num_heads=4,
        caption_channels=text.SEQUENCE_WIDTH,
        model_max_length=MAX_TEXT_LENGTH,
    )
    nn.init.zeros_(transformer.final_layer.linear.weight)
    nn.init.zeros_(transformer.final_layer.linear.bias)
    return transformer


class Clips(nn.Module):
    """OpenSoraVAE with the calls of diffusers' video autoencoders, for clips of one chunk and latents unscaled."""

    def __init__(self, autoencoder: OpenSoraVAE):
        super().__init__()
        self.autoencoder = autoencoder
        self.num_frames = NUM_FRAMES

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        """(B, 3, F, H, W) in [-1, 1] -> `latent_dist`, the posterior of (B, C, f, h, w)."""
        self.num_frames = pixels.shape[2]  # four numbers of frames have as many latents
        frames = self.autoencoder.spatial_vae.encode(pixels, None, sample=False)
        return SimpleNamespace(latent_dist=self.autoencoder.temporal_vae.encode(frames))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """`sample`: pixels of as many frames as were encoded last."""
        frames = self.autoencoder.temporal_vae.decode(latents, self.num_frames)
        return SimpleNamespace(sample=self.autoencoder.spatial_vae.decode(frames))
