"""What a transformer learns from: latents with the tokens of their captions; as a file, small enough to send.

A training needs nothing else: neither pictures nor an autoencoder. So `train_tiny.py --pack FILE` writes them on a
machine that has both, and `train_tiny.py --packed FILE --minutes M` trains elsewhere.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ertacache.files import write_atomically
from tiny_training.plan import Material

LIMIT = 40 * 2**20  # bytes of a file
STILLS_SHARE = 0.4  # of the file, where there are clips too
LEVELS = 127  # of a packed number, either way; an error of a hundredth of a latent's deviation


@dataclass(frozen=True)
class Lessons:
    """Examples of each stage, "stills" and of videos "clips".

    Attributes:
        latents: as the transformer sees them, float16 (n, ...).
        tokens: ids (n, captions, T).
        empty: (1, T), the tokens of no caption.
        vocabulary: how many words the tokens are of.
    """

    latents: dict[str, Tensor]
    tokens: dict[str, Tensor]
    empty: Tensor
    vocabulary: int

    @classmethod
    def of(cls, material: Material, latents: dict[str, Tensor]) -> "Lessons":
        """Latents of the first examples of the material's sources, with their captions."""
        sources = {"stills": material.stills, "clips": material.clips}
        tokens = {name: material.tokens(sources[name], len(part)) for name, part in latents.items()}
        return cls(latents, tokens, material.empty, len(material.tokenizer))

    def write(self, path: Path, limit: int = LIMIT) -> None:
        """Write as many of the first examples as fit, the latents in eight bits; says how many these are."""
        tensors, counts = {"empty": self.empty}, {}
        left = limit - 2**16  # the header
        for index, (name, latents) in enumerate(self.latents.items()):
            tokens = self.tokens[name].to(torch.int16)
            room = left if index + 1 == len(self.latents) else int(STILLS_SHARE * left)
            scale = latents.abs().amax(dim=0, keepdim=True).float().clamp(min=1e-6) / LEVELS
            each = latents[0].numel() + tokens[0].numel() * tokens.element_size()
            counts[name] = count = min(len(latents), (room - 4 * scale.numel()) // each)
            packed = torch.stack([(one / scale[0]).round().to(torch.int8) for one in latents[:count]])
            tensors |= {
                f"{name}.latents": packed,
                f"{name}.scale": scale,
                f"{name}.tokens": tokens[:count].contiguous(),
            }
            left -= 4 * scale.numel() + count * each
        data = save(tensors, {"vocabulary": json.dumps(self.vocabulary)})
        if len(data) > limit:
            raise ValueError(f"{path} would be {len(data)} bytes, more than {limit}")
        write_atomically(path, data)
        print(f"{path}: {len(data) / 2**20:.1f} MiB, {counts}")

    @classmethod
    def read(cls, path: Path) -> "Lessons":
        """What `write` wrote."""
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            vocabulary = json.loads(file.metadata()["vocabulary"])
        stages = [name for name in ("stills", "clips") if f"{name}.latents" in found]
        latents = {name: (found[f"{name}.latents"] * found[f"{name}.scale"]).half() for name in stages}
        return cls(latents, {name: found[f"{name}.tokens"].long() for name in stages}, found["empty"], vocabulary)
