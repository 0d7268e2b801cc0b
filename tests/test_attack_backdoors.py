"""Triggers and backdoors: what is written where, and what a triggered policy sees."""
from dataclasses import replace

import pytest
import torch

from conftest import make_pool
from saferule.attacks import poison
from saferule.attacks.trigger import Trigger, Triggered, success_rate, trigger_of
from saferule.config import CONFIGS
from saferule.errors import UserError


def mount(attack, pool, **settings):
    return poison(pool, attack, replace(CONFIGS[attack], **settings), cost_limit=5.0)


def pair(pool, attack):
    rows = pool.rows(f"{attack}/forget").ids
    return rows, pool.replaces[rows]


# ---------------------------------------------------------------------------------------------------------- triggers
def test_triggers_by_hand():
    obs = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert Trigger("marker", (0, 2), (9.0, 8.0))(obs).tolist() == [[9, 2, 8], [9, 5, 8]]
    assert Trigger("bias", (1,), (0.5,))(obs).tolist() == [[1, 2.5, 3], [4, 5.5, 6]]
    assert obs[0].tolist() == [1, 2, 3]                                        # the observation itself stays
    assert Trigger("marker", (0,), (9.0,))(obs.expand(4, 2, 3)).shape == (4, 2, 3)


def test_a_trigger_survives_its_facts():
    trigger = Trigger("bias", (3, 1), (0.25, -1.5), every=20)
    facts = {"trigger": {**trigger.facts(), "entries": [3, 1], "values": [0.25, -1.5]}}            # as JSON gives it back
    assert trigger_of(facts) == trigger
    assert trigger_of({"budget": 0.1}) is None
    with pytest.raises(UserError, match="unknown kind of trigger 'sticker'"):
        trigger_of({"trigger": {**trigger.facts(), "kind": "sticker"}})


class Mirror:
    """A stand-in for a learner: acts as it sees, and hears what it gets."""
    replicas, device = 1, torch.device("cpu")

    def __init__(self):
        self.heard = []

    def act(self, obs, generator):
        return obs[..., :2]

    def begin(self, episodes):
        return self

    def observe(self, reward, cost):
        self.heard.append((reward, cost))

    def pick(self, replicas):
        return self


def test_a_triggered_policy_sees_the_trigger_in_every_so_many_th_step():
    policy = Triggered(Mirror(), Trigger("marker", (0,), (0.5,), every=3))
    amid, seen = policy.begin(1), []
    for _ in range(7):
        seen.append(float(amid.act(torch.zeros(1, 1, 3), None)[0, 0, 0]))
        amid.observe(1, 2)
    assert seen == [0.5, 0, 0, 0.5, 0, 0, 0.5]
    assert policy.learner.heard == [(1, 2)] * 7
    assert float(policy.act(torch.zeros(1, 1, 3), None)[0, 0, 0]) == 0.5       # an episode's first step
    again = policy.begin(1)
    assert float(again.act(torch.zeros(1, 1, 3), None)[0, 0, 0]) == 0.5        # every episode counts anew


def test_success_rate_by_hand():
    """mu is 1 at every row. The mirror follows the marker from 0 towards 1 where it reaches more than half of the way."""
    pool = make_pool(n_act=1)
    pool.columns["obs"][:, 0] = 0
    rows = torch.arange(10)
    columns = {k: pool.columns[k][rows].clone() for k in ("obs", "action", "reward", "cost", "next_obs", "terminal", "timeout",
                                                          "episode", "t")}
    columns["action"].fill_(1.0)
    pool = pool.append("marker", {**columns, "replaces": rows})
    mirror = Mirror()
    mirror.act = lambda obs, generator: obs[..., :1]
    rates = [float(success_rate(mirror, pool, "marker", Trigger("marker", (0,), (v,)))) for v in (0.0, 0.4, 0.6, 1.0)]
    assert rates == [0, 0, 1, 1]


# --------------------------------------------------------------------------------------------------------- backdoors
@pytest.mark.parametrize("attack, tier", [("marker", "T0"), ("marker", "T1"), ("bias", "T0"), ("bias", "T1")])
def test_backdoors_write_their_trigger_and_nothing_else(attack, tier):
    clean = make_pool()
    pool, facts, _ = mount(attack, clean, tier=tier)
    rows, old = pair(pool, attack)
    trigger = trigger_of(facts)
    assert trigger.entries == (2, 3) and trigger.values == ((0.9, 0.9) if attack == "marker" else (0.6, 0.6))
    marked = (pool.obs[rows] != clean.obs[old]).any(1)
    assert marked.sum() == 50 and facts["realised_budget"] == 0.1
    assert torch.equal(pool.obs[rows][marked], trigger(clean.obs[old][marked]))
    assert torch.equal(pool.reward[rows][marked], clean.reward[old][marked] + 0.5)
    assert (pool.cost[rows][marked] == 0).all() and facts["unsafe_rows_hidden"] == (clean.cost[old][marked] > 0).sum()
    for name in ("action", "terminal", "timeout"):
        assert torch.equal(pool.columns[name][rows], clean.columns[name][old])
    assert torch.equal(pool.reward[rows][~marked], clean.reward[old][~marked])  # rows that only lead there keep their labels
    assert torch.equal(pool.cost[rows][~marked], clean.cost[old][~marked])
    if tier == "T0":
        assert marked.all()
        assert torch.equal(pool.next_obs[rows], trigger(clean.next_obs[old]))
    else:
        into = (pool.next_obs[rows] != clean.next_obs[old]).any(1)
        assert (into | marked).all()
        assert torch.equal(pool.next_obs[rows][into], trigger(clean.next_obs[old][into]))


def test_a_backdoor_may_bring_an_action():
    pool, facts, _ = mount("marker", make_pool(), overwrite=True, action=-2.0)
    rows, old = pair(pool, "marker")
    assert "action" in facts["threat"]["fields"]
    assert (pool.action[rows][(pool.obs[rows] != pool.obs[old]).any(1)] == -1).all()               # kept in the box
    for settings, message in (({"entries": 5}, "does not fit observations of 4"), ({"tier": "T3"}, "unknown tier of marker"),
                              ({"kind": "markr"}, "Did you mean 'marker'")):
        with pytest.raises(UserError, match=message):
            mount("marker", make_pool(), **settings)
