"""Word-level tokenizer and the training of small CLIP and T5 text encoders.

The encoders learn to say which object stands at which place, so that their states hold what belongs together.
The heads that ask for it are thrown away.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tiny_training.captions import parse_caption, vocabulary
from tiny_training.loop import Stage
from tiny_training.scene import BACKGROUNDS, COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES, TEXTURES

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
PLACE_INDEX = {name: i for i, name in enumerate(PLACES)}
GROUPS = [list(SHAPES), list(COLOURS), list(SIZES), list(TEXTURES), list(DIRECTIONS)]
GROUP_SIZES = [len(group) + 1 for group in GROUPS]  # + 1: not said, or no object there

SEQUENCE_WIDTH = 96  # of the states that a transformer attends to


def sequence_settings(vocabulary_size: int) -> dict[str, Any]:
    """Settings of the small T5 or UMT5 encoder of a tiny pipeline, for its configuration class."""
    return {
        "vocab_size": vocabulary_size,
        "d_model": SEQUENCE_WIDTH,
        "d_kv": 24,
        "d_ff": 192,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a word of the caption grammar; anything else becomes the unknown token."""
    words = [PAD, EOS, UNKNOWN, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z]+"), " "), normalizers.Strip()]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=max_length
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str], max_length: int) -> Tensor:
    """Token ids (n, max_length), padded as the pipelines pad."""
    batch = tokenizer(texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return batch.input_ids


def attribute_targets(texts: list[str]) -> Tensor:
    """Class indices (n, places, groups) of what each caption says; 0 where it says nothing."""
    targets = torch.zeros(len(texts), len(PLACES), len(GROUPS), dtype=torch.long)
    for row, text in enumerate(texts):
        for obj in parse_caption(text)[0]:
            said = (obj.shape, obj.colour, obj.size, obj.texture, obj.direction)
            for column, (group, word) in enumerate(zip(GROUPS, said, strict=True)):
                targets[row, PLACE_INDEX[obj.place], column] = group.index(word) + 1 if word else 0
    return targets


def background_targets(texts: list[str]) -> Tensor:
    """Class index (n,) of the background that each caption names; 0 for none."""
    names = list(BACKGROUNDS)
    backgrounds = [parse_caption(text)[1] for text in texts]
    return torch.tensor([names.index(name) + 1 if name else 0 for name in backgrounds])


class _Reader(nn.Module):
    """Answers, from encoder states (B, T, D), what stands at each place and what the background is."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(PLACES) + 1, width) * 0.1)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answer = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, sum(GROUP_SIZES)))
        self.background = nn.Linear(width, len(BACKGROUNDS) + 1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        read, _ = self.attend(self.queries.expand(len(states), -1, -1), states, states, need_weights=False)
        return self.answer(read[:, :-1]), self.background(read[:, -1])


def reading_loss(answers: tuple[Tensor, Tensor], targets: Tensor, backgrounds: Tensor) -> Tensor:
    """Sum of the cross-entropies over attribute groups and the background."""
    objects, background = answers
    loss = F.cross_entropy(background, backgrounds)
    for column, logits in enumerate(objects.split(GROUP_SIZES, dim=-1)):
        # most places are empty: weigh the ones that are not, or "nothing there" wins for long
        each = F.cross_entropy(logits.flatten(0, 1), targets[..., column].flatten(), reduction="none")
        weight = 1 + 4 * (targets[..., 0].flatten() > 0)
        loss = loss + (each * weight).mean()
    return loss


def sequence_states(encoder: nn.Module, tokens: Tensor, masked: bool) -> Tensor:
    """States (B, T, D) of token ids (B, T); `masked`: padding is hidden and its states are zero."""
    if not masked:
        return encoder(tokens).last_hidden_state
    mask = tokens != encoder.config.pad_token_id
    return encoder(tokens, attention_mask=mask).last_hidden_state * mask[..., None]


def train_text_encoders(
    sequence: nn.Module,
    pooled: nn.Module | None,
    tokens: Tensor,
    texts: list[str],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    folder: Path,
    device: str = "cpu",
    masked: bool = False,
) -> None:
    """Train a T5-type encoder on its states and, if given, a CLIP-type one on its pooled output, in place.

    Args:
        masked: hide the padding from the T5-type encoder and zero its states there, as WanPipeline does.
    """
    modules = nn.ModuleDict({"sequence": sequence, "read_sequence": _Reader(sequence.config.d_model)})
    if pooled is not None:
        modules["pooled"] = pooled
        modules["read_pooled"] = _Reader(pooled.config.hidden_size)
    modules.to(device)
    targets, backgrounds = attribute_targets(texts).to(device), background_targets(texts).to(device)
    tokens = tokens.to(device)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(tokens), (batch_size,), generator=torch.Generator().manual_seed(step)).to(device)
        ids, target, background = tokens[chosen], targets[chosen], backgrounds[chosen]
        states = sequence_states(modules["sequence"], ids, masked)
        total = reading_loss(modules["read_sequence"](states), target, background)
        if pooled is not None:
            summary = modules["pooled"](ids).pooler_output.unsqueeze(1)
            total = total + reading_loss(modules["read_pooled"](summary), target, background)
        return total

    Stage("text", modules, loss, num_steps, learning_rate, folder).run()
