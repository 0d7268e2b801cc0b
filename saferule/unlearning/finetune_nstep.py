"""Fine-tuning with n-step targets: all of Safe-RULE but the suppression (ours; the fair baseline for it).

Whatever Safe-RULE does better than this is due to suppressing the forget rows, not to faster value propagation.
"""
from .saferule import NEEDS, phases

__all__ = ["NEEDS", "phases"]
