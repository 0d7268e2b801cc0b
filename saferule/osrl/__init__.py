"""OSRL's checkpoints in and out: learners of its making act and unlearn here, learners in parity mode go back.

What was found in OSRL (revision 03a4586) and in FSRL's logger, which writes its files: a run's folder holds config.yaml and
checkpoint/model.pt (model_best.pt: the best by rollouts). model.pt is torch.save of one dictionary with the key 'model_state',
the model's state_dict(). config.yaml is the training script's settings by yaml.dump, in which tuples carry the tag
!!python/tuple; which learner it was is not among them, and is told here from the names of the weights. Nor is the bound of the
actions: it is the environment's (1 in every task here). Its evaluation scripts build the model from the settings and the
environment, then load the weights. Not saved, so fresh after an import: Adam's moments, the state of the PID, log-alphas.
"""
from .exchange import export_checkpoint, import_checkpoints

__all__ = ["export_checkpoint", "import_checkpoints"]
