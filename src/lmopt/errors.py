"""Every error that lmopt raises on purpose, in one tree.

Each error also subclasses the builtin that a caller would catch without knowing lmopt, so
`except ValueError` keeps working in code that predates it. A message says what was given, what was
expected and what to do about it.
"""


class LmoptError(Exception):
    """Root of the tree: `except lmopt.LmoptError` catches all that lmopt raises on purpose."""


# Plug-ins ---------------------------------------------------------------------------------------


class PluginError(LmoptError):
    """A backend, exporter or compressor could not be found or loaded."""


class UnknownPluginError(PluginError, LookupError):
    """No installed distribution offers a plug-in of this name."""


class AmbiguousPluginError(PluginError, LookupError):
    """Two distributions claim one name with different targets."""


class NotInstalledError(PluginError, ImportError):
    """A plug-in is known, but a module that it needs is not installed."""


class BrokenPluginError(PluginError, ImportError):
    """A plug-in is installed, but importing it failed; the original error is chained."""


# Requests that cannot be honoured ---------------------------------------------------------------


class UnsupportedError(LmoptError, NotImplementedError):
    """The request is well formed, but this engine, exporter or model cannot honour it."""


class DeviceError(LmoptError, RuntimeError):
    """The device that was asked for is absent or unusable; lmopt never falls back by itself."""


class UnsupportedOptionError(LmoptError, ValueError):
    """An option has a value, or a name, that lmopt does not implement."""


# Bad input --------------------------------------------------------------------------------------


class InputError(LmoptError, ValueError):
    """Input to a model is malformed."""


class ShapeError(InputError):
    """An array has the wrong number of axes or the wrong size."""


class DtypeError(InputError, TypeError):
    """An array has the wrong element type."""


class TokenIdError(InputError, IndexError):
    """A token id lies outside the vocabulary."""


class EmptyPromptError(InputError):
    """A prompt holds no token, and the model has no beginning-of-sequence token to start from."""


class ContextLengthError(InputError):
    """Prompt and requested tokens do not fit into the model's context."""


class TokenizerError(LmoptError, ValueError):
    """A tokenizer is absent, malformed, or failed on a text."""


class TemplateError(LmoptError, ValueError):
    """A chat template is absent, malformed, unsafe, or exceeded its budget."""


# Files ------------------------------------------------------------------------------------------


class ArtifactError(LmoptError, ValueError):
    """A model folder or file cannot be used."""


class CorruptArtifactError(ArtifactError):
    """A file is truncated, malformed, or differs from its recorded hash; the file is named."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """Nothing usable is at the path, or the artefact lacks a file or format that is needed."""


class ArtifactExistsError(ArtifactError, FileExistsError):
    """The target path already holds something that lmopt did not write, or must not replace."""


class UnsafeArtifactError(ArtifactError, PermissionError):
    """Reading would run code or leave the model folder; see the message for the explicit grant."""


class DownloadError(LmoptError, OSError):
    """A file could not be fetched; the message says how to do without it."""


class DiskFullError(LmoptError, OSError):
    """The disk cannot hold the artefact; nothing was left at the target path."""


class LockTimeoutError(LmoptError, TimeoutError):
    """Another process holds the lock of a cache entry for too long."""


# Work that failed -------------------------------------------------------------------------------


class ExportError(LmoptError, RuntimeError):
    """A model could not be written in the target format."""


class EngineError(LmoptError, RuntimeError):
    """An engine failed while loading or running a model; the engine's own words are kept."""


class EngineBuildError(EngineError):
    """A compiler refused a graph, or could not build what was asked for; its words are kept."""


class UnsupportedPrecisionError(UnsupportedError):
    """The hardware that was asked for cannot compute in a type that the graph uses; found before building."""


class InsufficientMemoryError(LmoptError, MemoryError):
    """What was asked for needs more memory than is free; refused before anything was allocated."""


class ClosedError(LmoptError, RuntimeError):
    """A runtime was used after `close()`."""


class ParityError(LmoptError, ArithmeticError):
    """A result differs from its reference by more than the tolerance; nothing was published.

    Attributes:
        report: The `lmopt.evaluation.ParityReport` with every measured number, or `None`.
    """

    def __init__(self, message: str, report: object | None = None) -> None:
        super().__init__(message)
        self.report = report


class ConformanceError(LmoptError, AssertionError):
    """A backend breaks a rule of `lmopt.contracts`; raised by `lmopt.testing`."""


# Work spread over processes -----------------------------------------------------------------------


class WorkerDiedError(EngineError):
    """A process that works for this one ended; it is named, with how it ended and what it was doing."""


class BatchError(LmoptError, RuntimeError):
    """A corpus job stopped before its end; what is committed stays, and the job can be resumed."""


class TooManyErrorsError(BatchError):
    """More rows of a corpus job failed than it allows; `errors.jsonl` says which and why."""


class JobMismatchError(ArtifactExistsError):
    """The output folder holds another job; the message says in what they differ."""


# Training ---------------------------------------------------------------------------------------


class TrainingError(LmoptError, RuntimeError):
    """A training could not go on."""


class VocabularyMismatchError(TokenizerError):
    """Teacher and student do not mean the same token by each id; found before a training begins."""


class DivergedError(TrainingError, ArithmeticError):
    """A loss or a gradient is not finite; the last checkpoint is from before it.

    Attributes:
        step: Optimiser step whose loss or gradient it is, from 1.
        checkpoint: Folder of the last good checkpoint, or `None`.
    """

    def __init__(self, message: str, step: int, checkpoint: object | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint
