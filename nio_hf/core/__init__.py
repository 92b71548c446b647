"""The method, on torch alone: scales that are computed or learned, GradCosine and its curvature."""

from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.initializer import expected_cost, grad_cosine, initialize
from nio_hf.core.layerwise import GradientInspection, LayerGradient, inspect_gradients
from nio_hf.core.method import Method
from nio_hf.core.nio import NIO
from nio_hf.core.result import GradCosine, GroupScale, InitResult, IterationRecord, NIOResult, TensorScale
from nio_hf.core.second_moment import squared_gradients
from nio_hf.core.tensors import find_tensors

__all__ = [
    "NIO",
    "Collective",
    "GradCosine",
    "GradientInspection",
    "GroupScale",
    "InitResult",
    "IterationRecord",
    "LayerGradient",
    "Method",
    "NIOConfig",
    "NIOResult",
    "TensorScale",
    "expected_cost",
    "find_tensors",
    "grad_cosine",
    "initialize",
    "inspect_gradients",
    "squared_gradients",
]
