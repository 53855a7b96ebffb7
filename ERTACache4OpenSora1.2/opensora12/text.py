"""Prompt rules of Open-Sora 1.2: trailing settings, prompts by loop, score suffixes, caption cleaning.

Their order for one prompt: `extract_json`, `split_prompt`, `append_scores` on every part, `clean_caption` on every
part, `merge_prompt`; `prompts_of_loop` then takes the part of a loop. `prepare_prompt` does all but the first.
"""

import json
from collections.abc import Sequence

from .text_cleaning import clean_caption

__all__ = [
    "append_scores",
    "clean_caption",
    "extract_json",
    "merge_prompt",
    "prepare_prompt",
    "prompts_of_loop",
    "split_prompt",
]

LOOP_START = "|0|"
JSON_KEYS = ("reference_path", "mask_strategy")


def extract_json(
    prompts: str | Sequence[str],
    references: Sequence[str] | None = None,
    mask_strategies: Sequence[str] | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Split off the JSON object that may end a prompt.

    Args:
        prompts: such as 'A sea.{"reference_path": "a.png;b.png", "mask_strategy": "0;0,1,0,-1,1"}'.
        references, mask_strategies: one a prompt; those in a prompt take their place.

    Returns:
        Prompts without it, reference paths, mask strategies; empty strings where there is none.

    Raises:
        ValueError: what follows the first "{" is no such object.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    found = {
        "reference_path": list(references or [""] * len(prompts)),
        "mask_strategy": list(mask_strategies or [""] * len(prompts)),
    }
    texts = []
    for i, prompt in enumerate(prompts):
        text, brace, rest = prompt.partition("{")
        texts.append(text)
        for key, value in _settings(brace + rest, prompt).items():
            found[key][i] = value
    return texts, found["reference_path"], found["mask_strategy"]


def _settings(text: str, prompt: str) -> dict[str, str]:
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"what follows '{{' is no JSON object ({error}) in the prompt {prompt!r}") from error
    unknown = [key for key in settings if key not in JSON_KEYS]
    if unknown:
        raise ValueError(f"the prompt's settings know {' and '.join(JSON_KEYS)}, not {unknown[0]!r}: {prompt!r}")
    return settings


def split_prompt(prompt: str) -> tuple[list[str], list[int] | None]:
    """The parts of "|0| text |2| text ..." and the loops at which they begin; any other prompt whole, and None.

    Raises:
        ValueError: a part begins at no number, or has no text.
    """
    if not prompt.startswith(LOOP_START):
        return [prompt], None
    fields = prompt.split("|")[1:]
    if len(fields) % 2 or not all(start.strip().isdigit() for start in fields[::2]):
        raise ValueError(f"a prompt by loops reads '|0|text|2|text', not {prompt!r}")
    return [text.strip() for text in fields[1::2]], [int(start) for start in fields[::2]]


def merge_prompt(texts: Sequence[str], starts: Sequence[int] | None = None) -> str:
    """Undo `split_prompt`."""
    if starts is None:
        return texts[0]
    return "".join(f"|{start}|{text}" for start, text in zip(starts, texts, strict=True))


def prompts_of_loop(prompts: Sequence[str], loop: int) -> list[str]:
    """The part of each prompt that is meant for a loop: the last one that begins at it or before."""
    chosen = []
    for prompt in prompts:
        texts, starts = split_prompt(prompt)
        if starts is None:
            chosen.append(prompt)
        else:
            chosen.append(texts[max(i for i, start in enumerate(starts) if start <= loop)])
    return chosen


def append_scores(
    prompts: str | Sequence[str],
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
) -> str | list[str]:
    """Append what the training captions said of a video's looks, where it is given and not said already.

    Args:
        prompts: one or several; as many come back.
        aes: aesthetic score, one decimal is kept; the released model likes 6.5.
        flow: motion score, one decimal.
        camera_motion: such as "pan left".
    """
    if isinstance(prompts, str):
        return append_scores([prompts], aes, flow, camera_motion)[0]
    suffixes = {
        "aesthetic score:": None if aes is None else f"{aes:.1f}",
        "motion score:": None if flow is None else f"{flow:.1f}",
        "camera motion:": camera_motion,
    }

    def said(prompt: str) -> str:
        missing = [(mark, value) for mark, value in suffixes.items() if value is not None and mark not in prompt]
        return prompt + "".join(f" {mark} {value}." for mark, value in missing)

    return [said(prompt) for prompt in prompts]


def prepare_prompt(
    prompt: str,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
    clean: bool = True,
) -> str:
    """A prompt with scores, cleaned; every part of it where it has several."""
    texts, starts = split_prompt(prompt)
    texts = append_scores(texts, aes, flow, camera_motion)
    return merge_prompt([clean_caption(text, 2 if clean else 0) for text in texts], starts)
