"""The word-level tokenizer and the settings of the small text encoders, which are trained with their transformer."""

from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tiny_training.captions import vocabulary

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
UNKNOWN_ID = 2  # of the unknown word; ids of known ones are greater

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


def build_tokenizer(max_length: int, words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One token for each of `words`, or of those of drawn scenes; anything else becomes the unknown token."""
    words = [PAD, EOS, UNKNOWN, *(vocabulary() if words is None else words)]
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


def sequence_states(encoder: nn.Module, tokens: Tensor, masked: bool) -> Tensor:
    """States (B, T, D) of token ids (B, T); `masked`: padding is hidden and its states are zero."""
    if not masked:
        return encoder(tokens).last_hidden_state
    mask = tokens != encoder.config.pad_token_id
    return encoder(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
