"""What is known of the settings and the calls of an enabled pipeline, and how it is told."""

from dataclasses import dataclass, field
from typing import Any

from ertacache.attach import Run
from ertacache.auto.setting import Goal, Setting
from ertacache.auto.watch import RepeatableCall, SeenCallback, WatchedCall, Watching
from ertacache.calibration import Calibration


@dataclass(frozen=True)
class Options:
    """Arguments of `enable`."""

    samples: int
    effort: str
    strict: bool
    audit_every: int | None
    retry: bool
    memory_limit: int
    progress: bool


@dataclass
class Known:
    """What is known of one setting."""

    setting: Setting
    watched: list[WatchedCall] = field(default_factory=list)
    calibrations: dict[str, Calibration] = field(default_factory=dict)  # by the goal's label
    unsaved: set[Goal] = field(default_factory=set)
    refused: str | None = None
    failures: int = 0
    turns: int = 0  # runs that could have been accelerated
    accelerated: int = 0
    saved_calls: int = 0
    audits: list[float] = field(default_factory=list)  # dB
    warned_of: set[str | None] = field(default_factory=set)  # fingerprints of weights

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.watched)

    @property
    def samples(self) -> int:
        return sum(map(len, self.watched))

    def calibration(self, goal: Goal) -> Calibration | None:
        return self.calibrations.get(goal.label(self.setting.num_steps))


@dataclass(frozen=True)
class Facts:
    """What was read before a run: the facts of its setting, its scheduler and grid."""

    found: dict[str, Any]
    scheduler: Any
    grid: tuple[list[float], list[float]]


@dataclass
class Call:
    """One call of the pipeline under way."""

    pipe: Any
    goal: Goal
    again: RepeatableCall | None
    callback: SeenCallback | None
    unseen_callback: bool
    known: Known | None = None
    runs: list[Run] = field(default_factory=list)
    watching: Watching | None = None
    audited: bool = False
    calls: int = 0  # of the transformer in a step
    blanks: list[Any] | None = None
    first: int = 0  # step of the grid
    playing: Calibration | None = None
    weights: str | None = None  # fingerprint, with adapters


@dataclass(frozen=True)
class SettingStatus:
    """Where one setting stands.

    Attributes:
        name: model and number of steps.
        watched, samples: results that were watched, and how many are wanted.
        calibration: what accelerates it; None while there is none.
        accelerated: runs that were.
        saved_calls: transformer calls that these did not make.
        audits: measured PSNR in dB of the audited runs, newest last.
        refused: why it stays uncached; None if it does not.
    """

    name: str
    watched: int
    samples: int
    calibration: Calibration | None
    accelerated: int
    saved_calls: int
    audits: list[float]
    refused: str | None

    def __str__(self) -> str:
        if self.refused is not None:
            return f"{self.name}: uncached ({self.refused})"
        if self.calibration is None:
            return f"{self.name}: watching, {self.watched} of {self.samples}"
        c = self.calibration
        parts = [f"{len(c.computed_steps)} of {c.num_inference_steps} steps computed", promise(c)[1]]
        parts += [f"{self.accelerated} runs accelerated, {self.saved_calls} transformer calls saved"]
        if self.audits:
            parts.append(f"audited {len(self.audits)}: {sum(self.audits) / len(self.audits):.1f} dB")
        return f"{self.name}: {', '.join(parts)}"


class Status(tuple[SettingStatus, ...]):
    """The settings that were used, the last one first; as a text, a line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no run yet"


def promise(calibration: Calibration) -> tuple[float | None, str]:
    """PSNR in dB that a calibration predicts, or reaches on what it was fitted to, and how to say it."""
    if calibration.predicted:
        value = calibration.predicted["psnr"]
        return value, f"predicted {value:.1f} dB"
    fitted = calibration.settings.get("fitted_psnr")
    return fitted, f"{fitted:.1f} dB on the watched results" if fitted is not None else "quality not predicted"
