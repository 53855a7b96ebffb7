"""Captions of different lengths as one padded tensor, so that a batch takes one attention call.

The original concatenates the real tokens of all samples and lets every sample attend to its own ones. Attention
does not depend on the order of its keys, so leaving the others out by a mask gives the same.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@torch.compiler.disable  # lengths are the host's business; a compiled graph would break here with warnings
def select_tokens(captions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keep the tokens with mask != 0.

    Args:
        captions: [B, L, C].
        mask: [Bm, L], Bm a divisor of B: repeated as a whole (m1, m2, m1, m2, ...). None keeps all tokens.
            On the host it costs no wait for a device.

    Returns:
        The tokens [B, longest, C], and a bool mask [B, 1, 1, longest] of those that exist; None if all do.

    Raises:
        ValueError: the mask's shape does not fit, or a caption has no token.
    """
    if mask is None:
        return captions, None
    batch, length = captions.shape[:2]
    if mask.ndim != 2 or mask.shape[1] != length or batch % mask.shape[0]:
        raise ValueError(f"mask is {list(mask.shape)}, it must be [rows, {length}] with rows a divisor of {batch}")
    keep = mask.detach().cpu().ne(0).repeat(batch // mask.shape[0], 1)
    lengths = keep.sum(dim=1)
    longest = int(lengths.max())
    order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :longest].to(captions.device)
    kept = captions.gather(1, order[..., None].expand(-1, -1, captions.shape[2]))
    return kept, _existing(lengths, longest, captions.device)


def unpack(packed: Tensor, lengths: Tensor | list[int]) -> tuple[Tensor, Tensor | None]:
    """Captions that are packed already, [1, sum of lengths, C], in the form of `select_tokens`."""
    lengths = torch.as_tensor(lengths).long().cpu().flatten()
    if packed.shape[:2] != (1, int(lengths.sum())):
        raise ValueError(f"packed captions are {list(packed.shape)}, the lengths add up to {int(lengths.sum())}")
    padded = pad_sequence(packed[0].split(lengths.tolist()), batch_first=True)
    return padded, _existing(lengths, int(lengths.max()), packed.device)


def _existing(lengths: Tensor, longest: int, device: torch.device) -> Tensor | None:
    if int(lengths.min()) == 0:
        raise ValueError("a caption has no token: every row of the mask needs at least one that is not 0")
    if int(lengths.min()) == longest:
        return None
    return (torch.arange(longest) < lengths[:, None])[:, None, None].to(device)
