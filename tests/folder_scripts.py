"""The folders' scripts as a command line gives them, in this process: importing everything anew takes ten seconds."""

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

from tiny_pipelines import imports_from


def exit_code(script: Path, *argv: object) -> int:
    """What a script with these arguments ends with; it does not ask the hub."""
    given = patch.object(sys, "argv", [str(script), *map(str, argv)])
    offline = patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with imports_from(script.parent), given, offline:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            return end.code or 0
    return 0
