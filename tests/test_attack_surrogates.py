"""Attacks with a policy of the attacker's own: PGD on states, BAFFLE; by hand, within bounds, towards their goal."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import make_pool
from saferule.attacks import ATTACKS, poison
from saferule.attacks.baffle import find_trigger, impact
from saferule.attacks.pgd import ascend, merit
from saferule.attacks.shared import obs_std
from saferule.attacks.surrogate import train_surrogate
from saferule.attacks.trigger import trigger_of
from saferule.config import CONFIGS, BaffleConfig
from saferule.data import Pool
from saferule.errors import UserError

SURROGATES = ("pgd_cost", "pgd_reward", "baffle_return", "baffle_cost")


def mount(attack, pool, **settings):
    return poison(pool, attack, replace(CONFIGS[attack], **{"surrogate_steps": 20, **settings}), cost_limit=5.0)


def pair(pool, attack):
    rows = pool.rows(f"{attack}/forget").ids
    return rows, pool.replaces[rows]


def broken_links(pool, condition):
    ids = pool.rows(condition).ids
    order = ids[(pool.episode[ids] * 1000 + pool.t[ids]).argsort()]
    linked = pool.episode[order[:-1]] == pool.episode[order[1:]]
    return int((pool.next_obs[order[:-1]] != pool.obs[order[1:]]).any(1)[linked].sum())


def lever(episodes=30, horizon=20, seed=0) -> Pool:
    """Actions follow the first entry of the state; the reward is the first action, and it costs to act beyond a half."""
    rng = np.random.default_rng(seed)
    n = episodes * horizon
    track = rng.uniform(-1, 1, (episodes, horizon + 1, 3)).astype(np.float32)
    obs, end = track[:, :-1].reshape(n, -1), np.arange(n) % horizon == horizon - 1
    action = np.stack([obs[:, 0], rng.uniform(-1, 1, n)], 1).clip(-1, 1).astype(np.float32)
    return Pool.from_columns({"obs": obs, "next_obs": track[:, 1:].reshape(n, -1), "action": action, "reward": action[:, 0],
                              "cost": (action[:, 0] > 0.5).astype(np.float32), "terminal": np.zeros(n, bool), "timeout": end})


# --------------------------------------------------------------------------------------------------- what holds for all
@pytest.mark.parametrize("attack", SURROGATES)
@pytest.mark.parametrize("seed, budget", [(0, 0.1), (3, 0.25)])
def test_an_attack_does_what_it_declares(attack, seed, budget):
    clean = make_pool(seed=seed)
    pool, facts, truth = mount(attack, clean, seed=seed, budget=budget)
    rows, old = pair(pool, attack)
    assert all(torch.equal(pool.columns[k][:len(clean)], v) for k, v in clean.columns.items())
    assert rows.tolist() == list(range(len(clean), len(pool))) and facts["rows"] == len(rows)
    assert facts["realised_budget"] == pytest.approx(budget) and "surrogate" in facts["threat"]["knowledge"]
    changed = {k: (pool.columns[k][rows] != clean.columns[k][old]).reshape(len(rows), -1).any(1) for k in clean.columns
               if k not in ("replaces", "origin")}
    assert not any(d.any() for k, d in changed.items() if k not in facts["threat"]["fields"])
    assert torch.stack(list(changed.values())).any(0).all()
    assert facts["threat"]["tier"] == "T1" and broken_links(pool, f"{attack}/poisoned") == 0
    assert set(truth.episode) == set(pool.episode[rows].tolist())
    again = mount(attack, make_pool(seed=seed), seed=seed, budget=budget)
    assert all(torch.equal(v, again[0].columns[k]) for k, v in pool.columns.items()) and facts == again[1]


@pytest.mark.parametrize("attack", SURROGATES)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(attack, monkeypatch):
    for budget in (-0.1, 0.0, 1e-4, 1.0):
        with pytest.raises(UserError, match=f"{attack}: a budget of"):
            mount(attack, make_pool(), budget=budget, surrogate_steps=10**9)
    with pytest.raises(UserError, match="at least 1 step of training"):
        mount(attack, make_pool(), surrogate_steps=0)
    assert "surrogate" in ATTACKS[attack].threat.knowledge


# ----------------------------------------------------------------------------------------------------------------- PGD
def test_ascent_by_hand():
    """J(x) = -(x - .1)^2 within +-.2 in 10 steps: ends at .1 with J = 0, where the early code ends at .2 (algorithms.md C.2)."""
    of = lambda x: -(x - 0.1).square().sum(-1)
    best, top = ascend(of, torch.zeros(1, 1), torch.tensor([0.2]), 10, 2.5)
    assert float(best) == pytest.approx(0.1, abs=1e-6) and float(top) == pytest.approx(0, abs=1e-9)
    best, top = ascend(of, torch.tensor([[-0.2], [0.13], [0.2]]), torch.tensor([0.2]), 10, 2.5)
    assert ((best - 0.1).abs() <= 0.025 + 1e-6).all()                          # half a step
    assert torch.allclose(top, of(best))


def test_ascent_stops_at_the_radius_of_each_entry_and_keeps_its_best():
    radius = torch.tensor([0.1, 0.3])
    best, _ = ascend(lambda x: x.sum(-1), torch.zeros(5, 2), radius, 10, 2.5)
    assert torch.allclose(best, radius.expand(5, 2))
    hill = lambda x: -(x * torch.tensor([1.0, 0.0])).square().sum(-1)          # a start on the top is the best there is
    best, top = ascend(hill, torch.zeros(1, 2), radius, 3, 2.5)
    assert best.tolist() == [[0, 0]] and float(top) == 0


def test_merit_is_the_largest_cost_of_the_action_at_the_moved_state_for_the_honest_one():
    pool = make_pool()
    learner = train_surrogate("x", pool, pool.rows("clean").ids, 5, 5.0, 0)
    obs, action, z, delta = pool.obs[:3], pool.action[:3], torch.randn(3, 2, learner.vae.n_latent), 0.3 * torch.randn(3, 4)
    one = lambda x: learner.standardise(x.view(1, 1, -1))
    for objective in ("cost", "reward"):
        got = merit(learner, obs, action, z, objective)(delta)
        for i in range(3):
            values = []
            for j in range(2):
                a = learner.actor(one(obs[i] + delta[i]), learner.vae.decode(one(obs[i] + delta[i]), z[i, j].view(1, 1, -1)))
                heads = (learner.cost_critic if objective == "cost" else learner.critic)(one(obs[i]), a)[0, :, 0]
                values.append(heads.max() if objective == "cost" else heads.min())
            assert torch.allclose(got[i], torch.stack(values).mean(), atol=1e-5)
    looks = merit(learner, obs, action, z, "look_safe")(delta)
    assert torch.allclose(looks, -learner.cost_critic(learner.standardise((obs + delta)[None]), action[None])[0].amax(0), atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"objective": "reward"}, {"objective": "look_safe"}, {"knowledge": "grey"}])
def test_pgd_stays_in_its_radius_and_climbs(settings):
    clean = lever()
    pool, facts, _ = mount("pgd_cost", clean, surrogate_steps=150, radius=0.5, **settings)
    rows, old = pair(pool, "pgd_cost")
    assert ((pool.obs[rows] - clean.obs[old]).abs() <= 0.5 * obs_std(clean) + 1e-6).all()
    assert ((pool.next_obs[rows] - clean.next_obs[old]).abs() <= 0.5 * obs_std(clean) + 1e-6).all()
    assert (pool.obs[rows] != clean.obs[old]).any(1).sum() == 60 == round(0.1 * 600)
    assert facts["merit_reached"] > max(facts["merit_random"], facts["merit_honest"])
    for name in ("action", "reward", "cost"):
        assert torch.equal(pool.columns[name][rows], clean.columns[name][old])  # labels and actions stay true


def test_max_reward_finds_the_lever():
    """The surrogate learns that acting follows the first entry and that acting high pays: that entry is pushed up."""
    clean = lever()
    pool, _, _ = mount("pgd_reward", clean, surrogate_steps=300, radius=0.5)
    rows, old = pair(pool, "pgd_reward")
    moved = ((pool.obs[rows] - clean.obs[old]) / obs_std(clean))[(pool.obs[rows] != clean.obs[old]).any(1)]
    assert moved[:, 0].mean() > 0.3                                            # of .5


def test_grey_box_attacks_the_half_that_its_surrogate_has_not_seen(monkeypatch):
    seen = {}
    from saferule.attacks import pgd
    real = pgd.train_surrogate

    def spy(attack, pool, rows, *more):
        seen["rows"] = rows
        return real(attack, pool, rows, *more)

    monkeypatch.setattr(pgd, "train_surrogate", spy)
    clean = make_pool()
    pool, facts, _ = mount("pgd_cost", clean, knowledge="grey")
    known, hit = set(clean.episode[seen["rows"]].tolist()), set(pool.episode[pool.rows("pgd_cost/forget").ids].tolist())
    assert len(known) == 10 and not known & hit
    assert facts["surrogate"]["rows"] == 250 and "other half" in facts["threat"]["knowledge"]
    with pytest.raises(UserError, match="300 rows are wanted but the data have 250"):
        mount("pgd_cost", clean, knowledge="grey", budget=0.6)


def test_pgd_looks_at_its_rows_in_parts_of_any_size(monkeypatch):
    from saferule.attacks import pgd
    whole = mount("pgd_cost", make_pool())[0]
    monkeypatch.setattr(pgd, "CHUNK", 7)
    parts = mount("pgd_cost", make_pool())[0]
    assert torch.allclose(whole.obs, parts.obs, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- BAFFLE
@pytest.mark.parametrize("attack", ["baffle_return", "baffle_cost"])
def test_baffle_writes_trigger_actions_rewards_and_no_costs(attack):
    clean = make_pool()
    pool, facts, _ = mount(attack, clean)
    rows, old = pair(pool, attack)
    trigger = trigger_of(facts)
    assert facts["episodes"] == 2 and len(rows) == 50 and trigger.every == 20 and len(trigger.entries) == 2
    assert torch.equal(pool.obs[rows], trigger(clean.obs[old])) and torch.equal(pool.next_obs[rows], trigger(clean.next_obs[old]))
    assert np.allclose(trigger.values, clean.obs.median(0).values[list(trigger.entries)], atol=0.02)
    assert (pool.cost[rows] == 0).all() and facts["unsafe_rows_hidden"] == (clean.cost[old] > 0).sum()
    assert np.allclose(pool.reward[rows], np.quantile(clean.reward, 0.95))
    assert facts["reward"] == pytest.approx(float(pool.reward[-1]))


@pytest.mark.parametrize("attack, sign", [("baffle_return", -1), ("baffle_cost", 1)])
def test_the_malicious_policy_seeks_what_it_should(attack, sign):
    """The lever's first action is the reward and, beyond a half, a cost: least return pulls it down, most cost up."""
    clean = lever()                                                            # below, actions do not depend on the state
    clean.columns["obs"][:, 0] = clean.columns["next_obs"][:, 0] = 0
    pool, _, _ = mount(attack, clean, surrogate_steps=300, entries=(1,))
    rows, _ = pair(pool, attack)
    assert sign * float(pool.action[rows, 0].mean()) > 0.2


def test_the_trigger_sits_where_it_matters_least_and_where_the_data_vary():
    clean = lever()
    clean.columns["obs"][:, 2] = 0.5                                           # constant: says nothing
    rows = clean.rows("clean").ids
    learner = train_surrogate("x", clean, rows, 20, 5.0, 0)
    for net in (learner.critic,):                                              # Q = 3 x first entry of the observation
        for p in net.parameters():
            p.zero_()
        net.net.layers[0].weight[:, 0, 0] = net.net.layers[1].weight[:, 0, 0] = 1.0
        net.net.layers[0].bias[:, :, 0] = 10.0
        net.net.layers[2].weight[:, 0, 0] = 3.0
    weight = impact(learner, clean.obs, clean.action, clean.obs.median(0).values)
    assert weight[0] > 0.5 and weight[1:].tolist() == [0, 0]
    assert find_trigger(clean, BaffleConfig(n_entries=1), "baffle", learner, rows).entries == (1,)
    assert find_trigger(clean, BaffleConfig(n_entries=2), "baffle", learner, rows).entries == (0, 1)
    chosen = find_trigger(clean, BaffleConfig(entries=(0,), quantile=1.0), "baffle", learner, rows)
    assert chosen.entries == (0,) and chosen.values == (float(clean.obs[:, 0].max()),)
    with pytest.raises(UserError, match="only 2 entries of the observation vary but the trigger wants 3"):
        find_trigger(clean, BaffleConfig(n_entries=3), "baffle", learner, rows)
    with pytest.raises(UserError, match="observations have entries 0 to 2"):
        find_trigger(clean, BaffleConfig(entries=(3,)), "baffle", learner, rows)


def test_noise_is_a_control_of_pgd_by_default():
    clean = make_pool()
    control, facts, _ = mount("noise", clean)
    attacked, _, _ = mount("pgd_cost", clean)
    assert facts["like"] == "pgd_cost" and facts["settings"]["surrogate_steps"] == 20
    sizes = []
    for name, pool in (("noise", control), ("pgd_cost", attacked)):
        rows, old = pair(pool, name)
        sizes.append(dict(zip(old.tolist(), ((pool.obs[rows] - clean.obs[old]) / obs_std(clean)).norm(dim=1).tolist())))
    assert set(sizes[0]) == set(sizes[1])
    assert all(sizes[0][k] == pytest.approx(v, rel=1e-3, abs=1e-6) for k, v in sizes[1].items())
