"""The commands that look after stored calibrations: list, show, remove, export, import, push, pull."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ertacache import hub
from ertacache.auto.setting import stored_name
from ertacache.auto.store import HOME, Store
from ertacache.calibration import Bundle, Calibration
from ertacache.errors import CalibrationError, UsageError
from ertacache.schema import printable

ACTIONS = ("list", "show", "remove", "export", "import", "push", "pull")
HELP = {
    "list": "list the stored calibrations",
    "show": "print stored calibrations",
    "remove": "delete stored calibrations",
    "export": "write stored calibrations to one file, a bundle",
    "import": "store the calibrations of files",
    "push": "upload stored calibrations to a repository of the hub, as a bundle",
    "pull": "download a file of a repository of the hub, and store its calibrations",
}


def add_to(actions: Any) -> None:
    """Add the commands to a parser."""
    for action in ACTIONS:
        parser: argparse.ArgumentParser = actions.add_parser(action, help=HELP[action])
        parser.add_argument("--store", metavar="FOLDER", help=f"default: {HOME}, else the platform's cache folder")
        if action in ("export", "import"):
            parser.add_argument("file", metavar="FILE", nargs="+" if action == "import" else None)
        if action in ("push", "pull"):
            parser.add_argument("repository", metavar="USER/NAME")
            parser.add_argument("file", metavar="FILE.json")
        if action in ("show", "remove", "export", "push"):
            parser.add_argument("names", metavar="NAME", nargs="+" if action in ("show", "remove") else "*")


def run(chosen: argparse.Namespace, described: Any) -> None:
    """Run one of them; `described` makes a text of a calibration."""
    store, action = Store(chosen.store), chosen.action
    if action == "list":
        _list(store)
    elif action == "show":
        print("\n\n".join(f"{name}\n{described(one)}" for name, one in _named(store, chosen.names)))
    elif action == "remove":
        for name in _names(store, chosen.names):
            store.remove(name)
            print(f"removed {name}")
    elif action in ("export", "push"):
        found = _named(store, chosen.names or store.names())
        if not found:
            raise CalibrationError(f"{store.folder} holds no calibration")
        bundle = Bundle(one for _, one in found)
        where = bundle.save(chosen.file) if action == "export" else hub.push(bundle, chosen.repository, chosen.file)
        print(f"{len(bundle)} in {where}")
    else:
        files = chosen.file if action == "import" else [hub.fetch(chosen.repository, chosen.file)]
        for one in [one for file in files for one in Bundle.load(file)]:
            print(f"stored {store.save(stored_name(one), one).name}")


def _list(store: Store) -> None:
    rows = [("name", "steps", "speed-up", "dB", "date")]
    for name in store.names():
        try:
            c = Calibration.load(store.folder / name)
        except CalibrationError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        quality = c.predicted["psnr"] if c.predicted else c.settings.get("fitted_psnr")
        steps = f"{len(c.computed_steps)} of {c.num_inference_steps}"
        shown = f"{quality:.1f}" if isinstance(quality, (int, float)) else "-"
        rows.append((name.removesuffix(".json"), steps, f"{c.speedup:.2f}x", shown, printable(c.date)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if len(rows) > 1 else []:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows) - 1} in {store.folder}")


def _names(store: Store, asked: Sequence[str]) -> list[str]:
    """The files that are named, each by a part of its name that no other has."""
    found, present = [], store.names()
    for part in asked:
        exact = [name for name in present if part in (name, Path(name).stem)]
        matching = exact or [name for name in present if part in name]
        if len(matching) != 1:
            what = "no calibration" if not matching else f"{len(matching)} calibrations"
            raise UsageError(f"{part!r} names {what} of {store.folder}: see `ertacache list`")
        found += matching
    return list(dict.fromkeys(found))


def _named(store: Store, asked: Sequence[str]) -> list[tuple[str, Calibration]]:
    return [(name, Calibration.load(store.folder / name)) for name in _names(store, asked)]
