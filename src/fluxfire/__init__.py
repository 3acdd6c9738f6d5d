"""fluxfire makes any diffusers FLUX pipeline fast, says what it did, and takes it back.

fluxfire.optimize_pipeline(pipe, cache_threshold=0.12, compile=True)
image = pipe(prompt="a lighthouse at dusk").images[0]
print(fluxfire.report(pipe))
fluxfire.restore_pipeline(pipe)
"""

from fluxfire.artifacts import prefetch
from fluxfire.attention import apply_attention, check_attention
from fluxfire.cache import apply_cache, cache_stats, check_cache, set_cache_threshold
from fluxfire.compile import apply_compile, check_compile
from fluxfire.errors import (
    ArgumentError,
    ArtifactError,
    CopyError,
    FluxfireError,
    NotFluxError,
    NotOptimizedError,
    StepError,
    UndoError,
)
from fluxfire.fuse import apply_fused_qkv, check_fused_qkv
from fluxfire.fused_kernels import apply_fused_kernels, check_fused_kernels
from fluxfire.memory import apply_memory_format, apply_vae_tiling, check_memory_format, check_vae_tiling
from fluxfire.modulation import apply_modulation_table, check_modulation_table
from fluxfire.offload import apply_offload, check_offload
from fluxfire.optimize import optimize_pipeline, plan_pipeline, report, restore_pipeline
from fluxfire.plan import Plan, Skip, Step
from fluxfire.prompts import apply_prompts, check_prompts
from fluxfire.quantize import apply_quantization, check_quantization, load_quantized, save_quantized
from fluxfire.schedule import find_schedule
from fluxfire.setting import Fingerprint, Setting
from fluxfire.share import load_megacache, save_megacache
from fluxfire.static_blocks import apply_static_blocks, check_static_blocks
from fluxfire.stats import ArtifactStats, CacheCall, CacheStats, CompileStats, Report, TorchCacheStats
from fluxfire.tuning import Trial, tune
from fluxfire.warm import warm

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArtifactError",
    "ArtifactStats",
    "CacheCall",
    "CacheStats",
    "CompileStats",
    "CopyError",
    "Fingerprint",
    "FluxfireError",
    "NotFluxError",
    "NotOptimizedError",
    "Plan",
    "Report",
    "Setting",
    "Skip",
    "Step",
    "StepError",
    "TorchCacheStats",
    "Trial",
    "UndoError",
    "__version__",
    "apply_attention",
    "apply_cache",
    "apply_compile",
    "apply_fused_kernels",
    "apply_fused_qkv",
    "apply_memory_format",
    "apply_modulation_table",
    "apply_offload",
    "apply_prompts",
    "apply_quantization",
    "apply_static_blocks",
    "apply_vae_tiling",
    "cache_stats",
    "check_attention",
    "check_cache",
    "check_compile",
    "check_fused_kernels",
    "check_fused_qkv",
    "check_memory_format",
    "check_modulation_table",
    "check_offload",
    "check_prompts",
    "check_quantization",
    "check_static_blocks",
    "check_vae_tiling",
    "find_schedule",
    "load_megacache",
    "load_quantized",
    "optimize_pipeline",
    "plan_pipeline",
    "prefetch",
    "report",
    "restore_pipeline",
    "save_megacache",
    "save_quantized",
    "set_cache_threshold",
    "tune",
    "warm",
]
