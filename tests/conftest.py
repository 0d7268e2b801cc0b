"""Small pools and learners shared by the tests; one torch thread, as everywhere."""
import os
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch

from saferule.config import CONFIGS
from saferule.data import Pool, measure_units
from saferule.learners import LEARNERS

torch.set_num_threads(1)


def make_pool(episodes=20, horizon=25, n_obs=4, n_act=2, seed=0) -> Pool:
    """Random but chained transitions: next_obs[t] is obs[t + 1]; every third episode is risky (cost on most steps)."""
    rng = np.random.default_rng(seed)
    n = episodes * horizon
    track = rng.normal(size=(episodes, horizon + 1, n_obs)).astype(np.float32)
    risky = np.repeat(np.arange(episodes) % 3 == 0, horizon)
    timeout = np.arange(n) % horizon == horizon - 1
    return Pool.from_columns({
        "obs": track[:, :-1].reshape(n, -1), "next_obs": track[:, 1:].reshape(n, -1),
        "action": rng.uniform(-1, 1, (n, n_act)).astype(np.float32),
        "reward": (rng.uniform(0, 1, n) + risky).astype(np.float32), "cost": (risky & (rng.random(n) < 0.9)).astype(np.float32),
        "terminal": np.zeros(n, bool), "timeout": timeout})


KINDS = [name for name in LEARNERS if name not in ("bc_all", "bc_risky", "bc_frontier", "bc_boundary")]    # as 'bc_safe'


def make_learner(pool, rows, seeds=None, qc_limit=2.0, learner="bcq_lag", **cfg):
    """A small learner of any kind with seeded noise; settings that the kind does not have are left out."""
    small = {"vae_steps": 0, "actor_start": 0, "batch": 32, "hidden": (16, 16), "vae_hidden": 16, "context": 3, "width": 8, **cfg}
    cfg = replace(CONFIGS[learner], **{k: v for k, v in small.items() if k in CONFIGS[learner].__dataclass_fields__})
    seeds = list(range(len(rows))) if seeds is None else seeds
    made = LEARNERS[learner](cfg, measure_units(pool, rows), torch.full((len(rows),), qc_limit), seeds,
                             n_act=pool.action.shape[1]).ready()
    made.measure(pool, rows)
    made.seed_noise(0)
    return made


def sampler_of(learner, pool, rows):
    """The learner's own minibatches, from those of the rows that it learns from."""
    return learner.sampler(pool, learner.select_rows(pool, rows, learner.cfg, learner.qc_limit[:, 0].tolist()))


@pytest.fixture
def pool():
    return make_pool()
