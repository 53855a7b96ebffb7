"""What the Open-Sora tests share: golden vectors, and a pipeline with random weights. Holds no test.

The vectors were made by running the original (hpcaitech/Open-Sora, tag v1.2.0) on a CPU, and lie here xz-compressed.
OPENSORA_VECTORS names a folder with others of the same format, compressed or not, to test instead.
"""

import json
import lzma
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

FOLDER = Path(__file__).parents[1] / "ERTACache4OpenSora1.2"
sys.path.insert(0, str(FOLDER))

from opensora12 import OpenSoraPipeline, OpenSoraVAE, RFlowScheduler, STDiT3  # noqa: E402

VECTORS = Path(os.environ.get("OPENSORA_VECTORS", Path(__file__).parent / "vectors" / "opensora"))
SIDE, FRAMES, CAPTION_TOKENS, CAPTION_CHANNELS = 16, 17, 10, 12
LATENT = (5, 8, 8)  # of FRAMES x SIDE x SIDE with a VAE that halves the sides


@dataclass
class Vector:
    info: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.info.get("input_dtype", "torch.float32").removeprefix("torch."))

    def assert_close(self, made: Tensor, name: str) -> None:
        """Within the tolerance that the vector states."""
        wanted, tolerance = self.outputs[name], self.info["tolerance"]
        assert made.shape == wanted.shape
        if "exact" in tolerance:
            assert torch.equal(made, wanted)
        elif "rel_fro" in tolerance:
            error = (made.float() - wanted.float()).norm() / wanted.float().norm()
            assert error <= tolerance["rel_fro"], f"relative error {error:.2e}"
        else:
            torch.testing.assert_close(made, wanted, atol=tolerance["atol"], rtol=tolerance["rtol"])


def names_of(kind: str) -> list[str]:
    """Names of the vectors of a kind."""
    return sorted(path.stem for path in VECTORS.glob("*.json") if json.loads(path.read_text()).get("kind") == kind)


def info_of(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"{name}.json").read_text())


def load_vector(name: str) -> Vector:
    packed, plain = VECTORS / f"{name}.safetensors.xz", VECTORS / f"{name}.safetensors"
    tensors = load(lzma.decompress(packed.read_bytes())) if packed.exists() else load_file(plain)

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Vector(info_of(name), part("sd."), part("in."), part("out."), {**part("mid."), **part("extra.")})


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that leave nothing zero, so that every part of a network shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "freqs" in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            noise = noise / parameter[0].numel() ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise = 0.1 * noise
        parameter.data.copy_(noise)
    return module.eval()


def tiny_transformer(seed: int = 0, **config: Any) -> STDiT3:
    shape = {
        "hidden_size": 24,
        "num_heads": 2,
        "depth": 2,
        "caption_channels": CAPTION_CHANNELS,
        "model_max_length": CAPTION_TOKENS,
    }
    return randomised(STDiT3(**{**shape, **config}), seed)


def tiny_vae(seed: int = 0, **config: Any) -> OpenSoraVAE:
    """Halves the sides: two spatial levels."""
    spatial = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    temporal = {"filters": 4, "num_res_blocks": 1, "num_groups": 2}
    return randomised(OpenSoraVAE(spatial, temporal, **config), seed)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *["a", "red", "blue", "cat", "dog", "runs", "jumps", "aesthetic", "score"]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_pipeline(seed: int = 0) -> OpenSoraPipeline:
    torch.manual_seed(seed)
    text = T5Config(vocab_size=16, d_model=CAPTION_CHANNELS, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = OpenSoraPipeline(
        transformer=tiny_transformer(seed),
        vae=tiny_vae(seed),
        scheduler=RFlowScheduler(),
        text_encoder=T5EncoderModel(text).eval(),
        tokenizer=tiny_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
