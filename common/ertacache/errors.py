"""Exceptions shared across the package; each says what is wrong and what to do."""


class ERTACacheError(Exception):
    """Base class of every error that this library raises."""


class UsageError(ERTACacheError, ValueError):
    """A flag or a constant of config.py has an impossible value; the command exits with code 2."""


class CalibrationError(ERTACacheError, ValueError):
    """A calibration cannot be made, read or written."""


class MismatchError(ERTACacheError, ValueError):
    """A calibration is for another pipeline or another run."""


class StateError(ERTACacheError, RuntimeError):
    """The pipeline's calls do not form a run that the cache can follow."""


class NumericsError(ERTACacheError, ArithmeticError):
    """A model output holds NaN or Inf; the message names the step."""


class MismatchWarning(UserWarning):
    """The run differs from the calibrated one in a way that costs quality, not correctness."""


class EnableWarning(UserWarning):
    """What `enable` cannot do: the run goes uncached, or its calibration is not stored."""
