"""Errors that several parts raise; one of a single part stands beside it. Each says what is wrong and what to do."""


class ERTACacheError(Exception):
    """Base class of the errors raised by this library."""


class UsageError(ERTACacheError, ValueError):
    """A flag or a constant has a value that cannot be; the command ends with exit code 2."""


class ResultsError(ERTACacheError, ValueError):
    """Results cannot be read, or a page or figure is not what they make."""


class CalibrationError(ERTACacheError, ValueError):
    """A calibration cannot be made, read or written."""


class MismatchError(ERTACacheError, ValueError):
    """A calibration does not belong to the pipeline, or to the run, that it is used on."""


class StateError(ERTACacheError, RuntimeError):
    """The pipeline's calls do not form a run that the cache can follow."""


class NumericsError(ERTACacheError, ArithmeticError):
    """A model output holds NaN or Inf; says at which step."""


class MismatchWarning(UserWarning):
    """The run differs from the calibrated one in something that costs quality but not correctness."""
