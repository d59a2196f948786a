"""What is measured during a fit, and who stops and shows it."""

from dlnlab.callbacks.base import Measurement
from dlnlab.callbacks.completion import CompletionBaselines
from dlnlab.callbacks.deep_theory import DeepTheory
from dlnlab.callbacks.flow_sharpness import FlowSharpness
from dlnlab.callbacks.gain import GainTracker
from dlnlab.callbacks.gain_bounds import GainBounds
from dlnlab.callbacks.gain_forecast import GainForecast
from dlnlab.callbacks.gain_formula import GainFormula
from dlnlab.callbacks.gradient_statistics import GradientStatistics
from dlnlab.callbacks.implicit_bias import ImplicitBias
from dlnlab.callbacks.interruption import Interruption
from dlnlab.callbacks.lasso_distance import LassoDistance
from dlnlab.callbacks.leading_gain import LeadingGain
from dlnlab.callbacks.member_guard import MemberGuard
from dlnlab.callbacks.norms import PredictorNorm
from dlnlab.callbacks.perturbation import Perturbation
from dlnlab.callbacks.progress import MemberProgress
from dlnlab.callbacks.rank import RankJumps, RankTracker
from dlnlab.callbacks.recovery import SupportRecovery
from dlnlab.callbacks.run_checkpoint import RunCheckpoint
from dlnlab.callbacks.sgd_noise import SgdNoise
from dlnlab.callbacks.shallow_theory import LyapunovExponent, ShallowTheory
from dlnlab.callbacks.sharpness import Sharpness
from dlnlab.callbacks.thresholds import Thresholds
from dlnlab.recorder import Recorder

__all__ = [
    "CompletionBaselines",
    "DeepTheory",
    "FlowSharpness",
    "GainBounds",
    "GainForecast",
    "GainFormula",
    "GainTracker",
    "GradientStatistics",
    "ImplicitBias",
    "Interruption",
    "LassoDistance",
    "LeadingGain",
    "LyapunovExponent",
    "Measurement",
    "MemberGuard",
    "MemberProgress",
    "Perturbation",
    "PredictorNorm",
    "RankJumps",
    "RankTracker",
    "Recorder",
    "RunCheckpoint",
    "SgdNoise",
    "ShallowTheory",
    "Sharpness",
    "SupportRecovery",
    "Thresholds",
]
