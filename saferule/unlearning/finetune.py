"""Fine-tuning: ordinary training on the retain rows, nothing else (algorithms.md D.2)."""
from collections.abc import Iterator, Sequence

from ..config import FinetuneConfig
from ..train import Learner
from . import Memory, Phase


def phases(learner: Learner, memory: Memory, cfg: FinetuneConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    yield Phase("relearn", cfg.steps, memory.ordinary)
