"""What makes a built model faster or smaller, applied from outside. The model is the same function without it."""

from .checkpoint import checkpoint_blocks
from .compile import COMPILE_MODES, compile_model
from .depthwise import fast_depthwise_gradients
from .fold import fold_batch_norms
from .memory import keep_freed_memory
from .precision import PRECISIONS, use_precision
from .ready import inference_model, training_model
from .top_two import top_two_on_gpu

__all__ = [
    "COMPILE_MODES",
    "PRECISIONS",
    "checkpoint_blocks",
    "compile_model",
    "fast_depthwise_gradients",
    "fold_batch_norms",
    "inference_model",
    "keep_freed_memory",
    "top_two_on_gpu",
    "training_model",
    "use_precision",
]
