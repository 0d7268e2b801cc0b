"""Offline safe RL learners, one file each; every one stacks R replicas."""
from .bcq_lag import BCQLag

LEARNERS = {"bcq_lag": BCQLag}
