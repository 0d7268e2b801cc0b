"""Random relabelling: labels by hand, the union of rows, and what training on it does to forget values."""
import pytest
import torch
from test_unlearning import each_learner, poisoned, small

from conftest import make_pool
from saferule.data import Pool, Rows
from saferule.errors import UserError
from saferule.unlearning import Memory, unlearn
from saferule.unlearning.random_relabel import ramp, relabelled, union


def test_ramp_by_hand():
    """Rewards 3, 1, 2 in one episode become 1, 2, 3 in the order of time; an episode of one row keeps its own."""
    n = 4
    pool = Pool.from_columns({
        "obs": torch.zeros(n, 1), "action": torch.zeros(n, 1), "next_obs": torch.zeros(n, 1), "cost": torch.zeros(n),
        "reward": torch.tensor([3.0, 1.0, 2.0, 7.0]), "terminal": torch.zeros(n), "timeout": torch.tensor([0, 0, 1, 1])})
    assert ramp(pool, torch.arange(4)).tolist() == [1, 2, 3, 7]
    assert ramp(pool, torch.tensor([2, 3, 0])).tolist() == [3, 7, 2]               # whatever the order of the ids
    assert ramp(pool, torch.tensor([1, 2])).tolist() == [1, 2]


def test_labels_come_from_the_retain_rows_and_depend_on_the_seed_alone():
    pool = make_pool()
    retain, forget = Rows(torch.arange(100, 500), torch.ones(400)), Rows(torch.arange(100), torch.ones(100))
    pool.columns["reward"][:100] = 50.0
    reward, cost = relabelled(pool, retain, forget, "uniform", seed=1)
    low, high = pool.reward[100:].min(), pool.reward[100:].max()
    assert low <= reward.min() < low + 0.1 * (high - low)
    assert high >= reward.max() > high - 0.1 * (high - low)
    assert set(cost.tolist()) <= set(pool.cost[100:].tolist())
    assert cost.mean().item() == pytest.approx(pool.cost[100:].mean().item(), abs=0.15)
    again = relabelled(pool, retain, forget, "uniform", seed=1)
    assert torch.equal(reward, again[0]) and torch.equal(cost, again[1])
    assert not torch.equal(reward, relabelled(pool, retain, forget, "uniform", seed=2)[0])


def test_everything_but_the_labels_stays_and_the_rows_are_told_apart_by_weight():
    learner, pool, retain, forget = poisoned(steps=0)
    soft = Rows(forget[0].ids, torch.linspace(0, 1, len(forget[0].ids)))
    larger, rows = union(Memory(learner, pool, retain, [soft] * 2, 0), "uniform")
    n, k = len(pool.reward), len(soft.ids)
    assert rows[0] is rows[1]
    assert torch.equal(rows[0].ids, torch.cat([retain[0].ids, torch.arange(n, n + k)]))
    assert torch.equal(rows[0].weight, torch.cat([torch.ones(len(retain[0].ids)), soft.weight]))
    for column in ("obs", "action", "next_obs", "terminal", "timeout", "episode", "t"):
        assert torch.equal(larger.columns[column][n:], pool.columns[column][soft.ids])
        assert torch.equal(larger.columns[column][:n], pool.columns[column])


@each_learner
def test_forged_values_are_forgotten(kind):
    """Forget rewards far above all others lose their value; those who stay are the retain rows' own."""
    learner, pool, retain, forget = poisoned(learner=kind, steps=0, gamma=0.5, lr=3e-3)
    ids = forget[0].ids
    obs, action = learner.standardise(pool.obs[ids][None].expand(2, -1, -1)), pool.action[ids][None].expand(2, -1, -1)
    for p in list(learner.critic.parameters())[-1:]:
        p.data.add_(10.0)
    before = learner.critic(obs, action).mean()
    unlearn(learner, pool, retain, forget, "random_relabel", small("random_relabel", steps=100))
    assert learner.critic(obs, action).mean() < before - 3


def test_an_unknown_way_of_relabelling_in_one_line():
    with pytest.raises(UserError, match="unknown way of relabelling rewards 'ramps'. Did you mean 'ramp'"):
        unlearn(*poisoned(steps=0), "random_relabel", small("random_relabel", rewards="ramps"))
