"""Every error that hydra-vlm raises on purpose.

HydraError
├─ ConfigError         a key or value of the configuration
├─ BudgetError         a budget that no schedule of the requested form meets
├─ StageError          a partition into stages that cannot be
├─ GraphMismatchError  a profile, schedule or adapter of another model
├─ AdapterError        PEFT built something else than was asked
├─ CheckpointError     weights that are not what their configuration says
├─ FileError           a file that is no regular file, is too large or does not read (a ValueError, too)
│  └─ MissingFileError one that is not there (a FileNotFoundError, too)
├─ DataError           an instruction record, an image, a data folder
├─ RunFolderError      an output folder that holds something else, or a damaged file in it
│  └─ FolderInUseError an output folder that another command is at work in
├─ TrainingError       a loss or gradient that is no number
├─ OutOfMemoryError    a device or the machine has too little memory
└─ DiskFullError       a file that could not be written for want of room

Each message names the rule, the value, the place and the remedy.
"""


class HydraError(Exception):
    """Anything a user can put right; the command line prints it without a traceback and exits with `code`."""

    code = 2


class ConfigError(HydraError):
    """A key or a value of the configuration is wrong."""


class BudgetError(HydraError):
    """No schedule of the requested form meets the budget.

    `nearest` says in words which request would do; where known, `budget` is the smallest number of parameters
    with which the same request works, and `n_stages` the largest number of stages that the budget serves.
    """

    def __init__(self, message: str, nearest: str = "", budget: int | None = None, n_stages: int | None = None) -> None:
        super().__init__(f"{message} {nearest}".strip())
        self.nearest = nearest
        self.budget = budget
        self.n_stages = n_stages


class StageError(HydraError):
    """The layers cannot be partitioned as asked; `nearest` and `n_stages` (where known) say what can be."""

    def __init__(self, message: str, nearest: str = "", n_stages: int | None = None) -> None:
        super().__init__(f"{message} {nearest}".strip())
        self.nearest = nearest
        self.n_stages = n_stages


class GraphMismatchError(HydraError):
    """A profile, schedule or adapter belongs to another model."""


class AdapterError(HydraError):
    """The adapter built differs from the schedule asked for."""


class CheckpointError(HydraError):
    """Stored weights are missing, unknown, of another shape than their configuration says, or unreadable."""


class FileError(HydraError, ValueError):
    """A file is no regular file, too large for its kind, or does not read; the message begins with its path."""


class MissingFileError(FileError, FileNotFoundError):
    """There is no such file."""


class DataError(HydraError):
    """An instruction record, an image or a data folder is unusable."""


class RunFolderError(HydraError):
    """The output folder holds a run of another configuration, or a file of it is damaged."""


class FolderInUseError(RunFolderError):
    """Another living process works in the output folder."""

    code = 75  # sysexits' EX_TEMPFAIL: the same command may do later


class TrainingError(HydraError):
    """Training cannot go on: the loss or a gradient is not a finite number."""


class OutOfMemoryError(HydraError):
    """The work needs more memory than the device or the machine has."""


class DiskFullError(HydraError):
    """A file could not be written for want of room."""
