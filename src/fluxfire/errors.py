"""What fluxfire raises. Every message says what was found, what is needed, and what to type.

FluxfireError
├── NotFluxError      (TypeError)     the object is not a FLUX pipeline with a denoiser
├── ArgumentError     (ValueError)    an argument that no pipeline could take, or a setting of another model
├── StepError         (RuntimeError)  this step cannot be applied to this pipeline now; nothing was changed
├── UndoError         (RuntimeError)  somebody else holds what we would put back; nothing was changed
├── ArtifactError     (RuntimeError)  compiled code could not be carried: not signed by a trusted key, damaged
├── NotOptimizedError (RuntimeError)  asked about a pipeline, or a step, that fluxfire has not touched
└── CopyError         (TypeError)     a patched module was copied or pickled
"""


class FluxfireError(Exception):
    """The root: catch this to catch everything that fluxfire raises itself."""


class NotFluxError(FluxfireError, TypeError):
    """The object is not a FLUX pipeline with a denoiser."""


class ArgumentError(FluxfireError, ValueError):
    """An argument that no pipeline could take, such as a threshold below 0, or a setting found on another model."""


class StepError(FluxfireError, RuntimeError):
    """A step cannot be applied to this pipeline now. Nothing was changed."""


class UndoError(FluxfireError, RuntimeError):
    """Somebody else's wrapper holds what we would put back. Nothing was changed."""


class ArtifactError(FluxfireError, RuntimeError):
    """Compiled code could not be carried: not signed by a trusted key, damaged, or a place out of reach."""


class NotOptimizedError(FluxfireError, RuntimeError):
    """Asked about a pipeline, or a step of it, that fluxfire has not touched."""


class CopyError(FluxfireError, TypeError):
    """A patched module was copied or pickled: the copy would run the original's weights."""
