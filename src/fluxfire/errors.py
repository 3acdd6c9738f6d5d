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
    """The root: catch this to catch everything that fluxfire raises itself.

    Examples:
        >>> try:
        ...     fluxfire.apply_cache(pipe, -1)
        ... except fluxfire.FluxfireError as error:
        ...     print(error)
        threshold: found -1, needed a number of 0 (never hits) or more, ...
    """


class NotFluxError(FluxfireError, TypeError):
    """The object is not a FLUX pipeline with a denoiser.

    Examples:
        >>> fluxfire.optimize_pipeline("FLUX")
        Traceback (most recent call last):
        fluxfire.errors.NotFluxError: found a str without a transformer; needed a diffusers pipeline ...
    """


class ArgumentError(FluxfireError, ValueError):
    """An argument that no pipeline could take, such as a threshold below 0, or a setting found on another model.

    Examples:
        >>> fluxfire.apply_compile(pipe, mode="fast")
        Traceback (most recent call last):
        fluxfire.errors.ArgumentError: mode: found 'fast', needed one of torch's 'default', ...
    """


class StepError(FluxfireError, RuntimeError):
    """A step cannot be applied to this pipeline now. Nothing was changed.

    Examples:
        >>> fluxfire.apply_cache(fluxfire.apply_cache(pipe))
        Traceback (most recent call last):
        fluxfire.errors.StepError: cache: it is applied already: ...
    """


class UndoError(FluxfireError, RuntimeError):
    """Somebody else's wrapper holds what we would put back. Nothing was changed.

    Examples:
        >>> forward = fluxfire.apply_cache(pipe).transformer.forward
        >>> pipe.transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        >>> fluxfire.restore_pipeline(pipe)
        Traceback (most recent call last):
        fluxfire.errors.UndoError: FluxTransformer2DModel.forward was replaced by ...
    """


class ArtifactError(FluxfireError, RuntimeError):
    """Compiled code could not be carried: not signed by a trusted key, damaged, or a place out of reach.

    Examples:
        >>> fluxfire.save_megacache("compiled.pack")
        Traceback (most recent call last):
        fluxfire.errors.ArtifactError: found nothing in ..., needed compiled code: make a picture first
    """


class NotOptimizedError(FluxfireError, RuntimeError):
    """Asked about a pipeline, or a step of it, that fluxfire has not touched.

    Examples:
        >>> fluxfire.report(pipe)
        Traceback (most recent call last):
        fluxfire.errors.NotOptimizedError: found no step of fluxfire on this pipeline: ...
    """


class CopyError(FluxfireError, TypeError):
    """A patched module was copied or pickled: the copy would run the original's weights.

    Examples:
        >>> copy.deepcopy(fluxfire.apply_cache(pipe).transformer)
        Traceback (most recent call last):
        fluxfire.errors.CopyError: a module that fluxfire has patched cannot be copied or pickled: ...
    """
