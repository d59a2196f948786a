"""What is measured during a fit, and who stops and shows it."""

from dlnlab.callbacks.base import Measurement
from dlnlab.callbacks.completion import CompletionBaselines
from dlnlab.callbacks.gain import GainTracker
from dlnlab.callbacks.implicit_bias import ImplicitBias
from dlnlab.callbacks.interruption import Interruption
from dlnlab.callbacks.member_guard import MemberGuard
from dlnlab.callbacks.norms import PredictorNorm
from dlnlab.callbacks.progress import MemberProgress
from dlnlab.callbacks.rank import RankJumps, RankTracker
from dlnlab.callbacks.recovery import SupportRecovery
from dlnlab.callbacks.run_checkpoint import RunCheckpoint
from dlnlab.recorder import Recorder

__all__ = [
    "CompletionBaselines",
    "GainTracker",
    "ImplicitBias",
    "Interruption",
    "Measurement",
    "MemberGuard",
    "MemberProgress",
    "PredictorNorm",
    "RankJumps",
    "RankTracker",
    "Recorder",
    "RunCheckpoint",
    "SupportRecovery",
]
