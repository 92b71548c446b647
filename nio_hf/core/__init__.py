"""The method, on torch alone: GradCosine, its curvature, and the loop that learns the scales."""

from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.initializer import grad_cosine, initialize
from nio_hf.core.layerwise import GradientInspection, LayerGradient, inspect_gradients
from nio_hf.core.result import GradCosine, InitResult, IterationRecord, NIOResult, TensorScale
from nio_hf.core.scales import LayerScales, register_gradient_module
from nio_hf.core.second_moment import squared_gradients
from nio_hf.core.state import NIOState, Resumption

__all__ = [
    "Collective",
    "GradCosine",
    "GradientInspection",
    "InitResult",
    "IterationRecord",
    "LayerGradient",
    "LayerScales",
    "NIOConfig",
    "NIOResult",
    "NIOState",
    "Resumption",
    "TensorScale",
    "grad_cosine",
    "initialize",
    "inspect_gradients",
    "register_gradient_module",
    "squared_gradients",
]
