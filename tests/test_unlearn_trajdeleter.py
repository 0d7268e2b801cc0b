"""TrajDeleter: worthless labels, far rows and the anchored minimiser by hand; blocks, signs, and what the anchor does."""
import pytest
import torch
from test_unlearning import each_learner, poisoned, small

from saferule.data import Pool, Rows, Sampler, Units
from saferule.errors import UserError
from saferule.learners.shared import Targets
from saferule.unlearning import Memory, unlearn
from saferule.unlearning.trajdeleter import far, worthless


def row_pool(obs):
    n = len(obs)
    return Pool.from_columns({
        "obs": torch.tensor(obs)[:, None], "next_obs": torch.zeros(n, 1), "action": torch.zeros(n, 1), "cost": torch.zeros(n),
        "reward": torch.arange(1.0, n + 1), "terminal": torch.zeros(n), "timeout": torch.ones(n)})


def test_worthless_by_hand():
    pool = row_pool([0.0, 0.0])
    pool.columns["cost"] = torch.tensor([0.0, 1.0])
    units = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([2.0]))
    batch = Sampler(pool, [Rows(torch.arange(2), torch.ones(2))], 8, units).sample(torch.Generator().manual_seed(0))
    first = batch.cost[0] == 0
    assert first.any() and not first.all()
    out = worthless(batch, torch.tensor([[3.0]]))
    assert torch.equal(out.reward[0], torch.where(first, -0.5, -1.0))              # -1 / 2 and -2 / 2
    assert torch.equal(out.cost[0], torch.where(first, 3.0, 2.0))
    assert torch.equal(worthless(batch, None).cost, batch.cost)
    assert torch.equal(out.next_obs, batch.next_obs) and torch.equal(out.action, batch.action)


def test_far_rows_by_hand():
    """Forget row at 0 (and one of weight 0 at 9), retain rows at 1, 3, 5, 10: the median distance is 3, so 5 and 10 are far."""
    pool = row_pool([0.0, 9.0, 1.0, 3.0, 5.0, 10.0])
    retain, forget = Rows(torch.tensor([2, 3, 4, 5]), torch.ones(4)), Rows(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    memory = Memory.__new__(Memory)
    memory.pool, memory.retain_rows, memory.rows = pool, [retain, retain], [forget, forget]
    found = far(None, memory)
    assert found[0].ids.tolist() == [4, 5]
    assert found[1] is found[0]
    memory.rows = [forget._replace(weight=torch.zeros(2))] * 2
    with pytest.raises(UserError, match="every row of a forget set has weight 0"):
        far(None, memory)


def test_the_anchored_loss_is_smallest_in_between():
    """Targets 1 of its own and 5 of the original, anchor 0.1: no slope at (1 + 0.1 x 5) / 1.1 (algorithms.md D.5)."""
    learner, pool, retain, _ = poisoned(steps=0)
    batch = learner.sampler(pool, retain).sample(torch.Generator().manual_seed(0))
    *rest, bias = learner.critic.parameters()
    for p in rest:
        p.data.zero_()
    y = lambda value: Targets(*[torch.full_like(batch.reward, value)] * 3)
    for value, slope in ((1.5 / 1.1, 0.0), (1.5 / 1.1 + 1, 2.2)):
        bias.data.fill_(value)
        loss = learner.critic_loss(batch, y(1.0)) + 0.1 * learner.critic_loss(batch, y(5.0))
        (grad,) = torch.autograd.grad(loss.sum(), [bias])
        assert grad.flatten().tolist() == pytest.approx([slope] * bias.numel(), abs=1e-5)


def test_blocks_take_turns_and_fill_the_budget():
    learner, pool, retain, forget = poisoned(steps=5)
    done = unlearn(learner, pool, retain, forget, "trajdeleter", small("trajdeleter"))
    assert done.phases == (("retain 1", 4), ("remove 1", 4), ("retain 2", 4), ("remove 2", 4), ("converge", 4), ("later", 0))
    with pytest.raises(UserError, match="3 rounds of 2 x 4 steps do not fit into 20; shorten 'block'"):
        unlearn(learner, pool, retain, forget, "trajdeleter", small("trajdeleter", rounds=3))


@each_learner
def test_signs_forget_values_fall_and_forget_costs_rise(kind):
    learner, pool, retain, forget = poisoned(learner=kind, steps=200, gamma=0.5, tau=0.1, lr=3e-3)
    ids = forget[0].ids
    obs, act = learner.standardise(pool.obs[ids][None].expand(2, -1, -1)), pool.action[ids][None].expand(2, -1, -1)
    before = learner.critic(obs, act).mean(), learner.cost_critic(obs, act).mean()
    unlearn(learner, pool, retain, forget, "trajdeleter", small("trajdeleter", steps=160, block=40))
    assert learner.critic(obs, act).mean() < before[0]
    assert learner.cost_critic(obs, act).mean() > before[1]


def test_costs_are_left_alone_on_request():
    ends = []
    for flip in (True, False):
        learner, pool, retain, forget = poisoned(steps=100, gamma=0.5, lr=3e-3)
        ids = forget[0].ids
        obs, act = learner.standardise(pool.obs[ids][None].expand(2, -1, -1)), pool.action[ids][None].expand(2, -1, -1)
        unlearn(learner, pool, retain, forget, "trajdeleter", small("trajdeleter", steps=80, block=20, flip_costs=flip))
        ends.append(learner.cost_critic(obs, act).mean().item())
    assert ends[0] > ends[1] + 0.1


def test_the_anchor_holds_values_where_the_original_had_them():
    """An original that values everything 5 higher: with a strong anchor values stay higher than without one."""
    ends = {}
    for anchor in ("original", "far", "off"):
        learner, pool, retain, forget = poisoned(steps=5, gamma=0.5, lr=0.03, tau=0.5)
        for critic in (learner.critic, learner.critic_target):
            list(critic.parameters())[-1].data.add_(5.0)
        cfg = small("trajdeleter", steps=60, rounds=0, anchor=anchor, anchor_weight=20.0)
        batch = learner.sampler(pool, retain).sample(torch.Generator().manual_seed(0))
        unlearn(learner, pool, retain, forget, "trajdeleter", cfg)
        ends[anchor] = learner.critic(batch.obs, batch.action).mean().item()
    assert min(ends["original"], ends["far"]) > ends["off"] + 1
