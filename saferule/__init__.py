"""Safe-RULE, reproduced: unlearn poison from offline safe RL policies, without retraining and without the environment.

The names below, in reading order, are the public interface; each is imported when first used.
"""
from importlib import import_module

_WHERE = {
    "get_task": "tasks", "Pool": "data", "Rows": "data", "Sampler": "data",                     # tasks and data
    "read_hdf5": "hdf5", "write_hdf5": "hdf5", "collect": "collect",
    "LEARNERS": "learners", "fit": "train",                                                     # training
    "ATTACKS": "attacks", "poison": "attacks",                                                  # attacks
    "UNLEARNERS": "unlearning", "unlearn": "unlearning",                                        # unlearning
    "evaluate": "evaluate",                                                                     # rollouts, for reporting
    "remediation_verdict": "verdict",                                                           # did the repair work?
    "save": "artifacts", "load": "artifacts", "UserError": "errors",                            # files
}
__all__ = list(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'saferule' has no attribute '{name}'")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
