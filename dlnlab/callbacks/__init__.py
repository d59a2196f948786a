"""What is measured during a fit, and who stops and shows it."""

from dlnlab.callbacks.base import Measurement
from dlnlab.callbacks.gain import GainTracker
from dlnlab.callbacks.gain_bounds import GainBounds
from dlnlab.callbacks.interruption import Interruption
from dlnlab.callbacks.member_guard import MemberGuard
from dlnlab.callbacks.norms import PredictorNorm
from dlnlab.callbacks.progress import MemberProgress
from dlnlab.callbacks.recovery import SupportRecovery
from dlnlab.callbacks.run_checkpoint import RunCheckpoint
from dlnlab.callbacks.sharpness import Sharpness
from dlnlab.callbacks.thresholds import Thresholds
from dlnlab.recorder import Recorder

__all__ = [
    "GainBounds",
    "GainTracker",
    "Interruption",
    "Measurement",
    "MemberGuard",
    "MemberProgress",
    "PredictorNorm",
    "Recorder",
    "RunCheckpoint",
    "Sharpness",
    "SupportRecovery",
    "Thresholds",
]
