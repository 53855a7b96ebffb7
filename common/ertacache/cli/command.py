"""Run a command: whatever goes wrong becomes one line on stderr and an exit code."""

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from ertacache.errors import ERTACacheError, MismatchWarning, UsageError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Parser that raises UsageError for a wrong flag instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run(main: Callable[[], Any]) -> int:
    """Call `main` and return the exit code: 0, 1 for a failure, 2 for a wrong flag or value."""
    warnings.formatwarning = _one_line_warning
    try:
        main()
    except UsageError as error:
        return _say(error, EXIT_USAGE)
    except ERTACacheError as error:
        return _say(error, EXIT_FAILURE)
    except OSError as error:
        return _say(error, EXIT_FAILURE)
    except KeyboardInterrupt:
        return _say("interrupted; what was finished is kept", EXIT_INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        return _say(f"{type(error).__name__}: {error}", EXIT_FAILURE)
    return 0


def _say(message: object, code: int) -> int:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return code


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, MismatchWarning):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
