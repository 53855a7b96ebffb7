"""What the tables of docs/speed.md share: the words for a size and for what a result was measured on."""

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def ran_on(record: Record) -> str:
    """What a result was measured on, in a line."""
    versions = record["versions"]
    count = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    clock = ", processor time" if record.get("clock") == "processor" else ""
    threads = f", {count}{clock}" if record["device_kind"] == "cpu" else ""
    libraries = f"torch {versions['torch']}, diffusers {versions['diffusers']}"
    code = f", commit {record['commit']}" if "commit" in record else ""
    code += f", {record['date']}" if "date" in record else ""
    return f"{record['model']}: {record['device']}{threads}, {record['dtype']}, {libraries}{code}"


def size_of(record: Record) -> str:
    """Size, and how much of the real model it is."""
    size = record["size"]
    text = f"{size['width']}x{size['height']}" + (f"x{size['num_frames']}" if "num_frames" in size else "")
    if record["weights"] == "trained":
        return text
    parameters = f"{record['parameters'] / 1e6:.0f} M parameters"
    if record["full_size"]:
        return f"{text}, full size, {parameters}"
    fractions = f"{record['layers_fraction']:g} of the blocks, {record['scale']:g} of each side"
    return f"{text}, **reduced**: {fractions}, {parameters}"


def machines(records: Sequence[Record]) -> str:
    """Where each model was measured; those that were measured alike in one sentence."""
    alike: dict[str, list[str]] = {}
    for model, where in (ran_on(record).split(": ", 1) for record in records):
        if model not in alike.setdefault(where, []):
            alike[where].append(model)
    return "Measured on: " + "; ".join(f"{', '.join(models)}: {where}" for where, models in alike.items()) + "."
