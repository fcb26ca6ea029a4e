"""The errors a user can cause, and how each one is reported.

Every error carries a message (what is wrong, where, what was found) and a hint (what is allowed, or the next command).
The command line prints both and exits with `exit_code`; nothing else in the package calls `sys.exit` or prints.
"""


class GemmaTuneError(Exception):
    """A problem that the user can fix. `exit_code` is 2 unless a subclass says otherwise."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(GemmaTuneError):
    """The recipe file, or an override given on the command line, is wrong."""


class ModelError(GemmaTuneError):
    """The model is unknown, is not a Gemma, is gated, or its files are incomplete."""


class DataError(GemmaTuneError):
    """The rows or the data template are wrong."""


class EngineError(GemmaTuneError):
    """The engine cannot do what the recipe asks on this machine."""


class RunError(GemmaTuneError):
    """The run directory is missing, in use, incomplete or not writable."""


class ExportError(GemmaTuneError):
    """A merge or an export cannot be made, or its result did not pass its check."""


class CheckFailed(ExportError):
    """An export was written and kept, but does not compare as it should with what was trained."""

    exit_code = 1


class TrainingStopped(GemmaTuneError):
    """Training stopped by itself because continuing would lose the run (non-finite loss, no supervised token)."""

    exit_code = 3


class ProcessLost(GemmaTuneError):
    """A process that trains together with others has gone, and the others end with it."""

    exit_code = 1


class LaunchError(GemmaTuneError):
    """A job cannot be written as asked, or was not taken by its scheduler."""


class HubError(GemmaTuneError):
    """The hub did not take an upload: not logged in, no right to write, or not reachable. The files are still here."""

    exit_code = 4


class TrainingInterrupted(GemmaTuneError):
    """The user, the system or `training.max_minutes` asked the run to stop; what was trained is saved.

    75 is EX_TEMPFAIL of sysexits.h, "try again": a batch script can tell it from 130, which saved nothing.
    """

    exit_code = 75
