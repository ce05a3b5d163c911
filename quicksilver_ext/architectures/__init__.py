"""Models: what they are made of (`model`), and how each architecture's checkpoint becomes one (`gpt2`, `llama`)."""

from .loading import load_model
from .model import PRECISIONS, WEIGHT_BITS, Layer, Linear, Model, Norm, Spec
from .packed import save_packed

__all__ = ["PRECISIONS", "WEIGHT_BITS", "Layer", "Linear", "Model", "Norm", "Spec", "load_model", "save_packed"]
