"""CDT: windows, network, losses and steps against cases worked out by hand, OSRL's numbers, acting with a memory."""
import json
import math
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest
import torch

from conftest import make_learner, make_pool, sampler_of
from saferule.attacks import poison
from saferule.config import CONFIGS, CDTConfig, InjectConfig
from saferule.data import Pool, Rows, Units, measure_units
from saferule.errors import UserError
from saferule.learners import CDT, built, stack
from saferule.nets import generators
from saferule.osrl.layout import views
from saferule.tasks import get_task
from saferule.train import Resume, fit
from saferule.transformer import Block, Dense, Table, clip_norm
from saferule.unlearning import unlearn
from saferule.windows import Windows, WindowSampler, track

RECORDED = json.loads((Path(__file__).parent / "data" / "osrl_cdt.json").read_text())
BLANK = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))


def pool_of(rewards, costs, tail=0, action=None) -> Pool:
    """Episodes from lists of rewards and costs per step; obs is the row's number; the last `tail` rows have no end."""
    n = sum(map(len, rewards))
    end = np.zeros(n)
    end[np.cumsum([len(r) for r in rewards]) - 1] = 1
    end[n - tail:] = 0
    obs = np.arange(n)[:, None]
    return Pool.from_columns({"obs": obs, "next_obs": obs + 1, "action": obs / 100 if action is None else action, "timeout": end,
                              "reward": np.concatenate(rewards), "cost": np.concatenate(costs), "terminal": np.zeros(n)})


SMALL = pool_of([[1, 2, 3, 4], [10, 20, 30], [7, 7]], [[0, 1, 0, 1], [2, 0, 0], [0, 0]], tail=2)


def rows(*ids, weight=None) -> Rows:
    return Rows(torch.tensor(ids), torch.ones(len(ids)) if weight is None else torch.tensor(weight))


def batch_of(R=1, B=2, K=3, n_obs=1, n_act=2, **more) -> Windows:
    """Random windows; the second of them has its last step padded."""
    gen = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(R, B, K, *shape, generator=gen)
    mask = torch.ones(R, B, K)
    mask[:, 1:, -1] = 0
    made = Windows(draw(n_obs), draw(n_act).tanh(), draw().abs(), draw().abs(), (draw() > 0).float(),
                   torch.arange(K).expand(R, B, K), mask)
    return made._replace(**more)


def one(mode="default", R=1, n_obs=1, n_act=2, horizon=20, **cfg) -> CDT:
    units = Units(torch.zeros(R, n_obs), torch.ones(R, n_obs), torch.ones(R))
    cfg = CDTConfig(**{"mode": mode, "context": 3, "width": 8, "warm_up": 1, **cfg})
    learner = CDT(cfg, units, torch.full((R,), 20.0), range(R), n_act, horizon).ready()
    learner.seed_noise(0)
    return learner


# ------------------------------------------------------------------------------------------------------------- windows
def test_to_go_by_hand():
    """Episode 0: rewards 1, 2, 3, 4, costs 0, 1, 0, 1. The tail without an end has no known future."""
    found = track(SMALL, rows(6, 2, 0, 1, 3, 5, 4, 7, 8))                      # in any order
    assert found.ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert found.ret.tolist() == [10, 9, 7, 4, 60, 50, 30]
    assert found.cost.tolist() == [2, 2, 1, 1, 2, 0, 0]
    assert found.left.tolist() == [4, 3, 2, 1, 3, 2, 1]
    assert found.of.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_removed_rows_count_as_the_mean_of_those_left_ahead():
    """Row 1 is gone: ahead of row 0 are rows 0, 2, 3 for 4 steps. Row 6, an end, is gone: episode 1 has no known future."""
    found = track(SMALL, rows(0, 2, 3, 4, 5))
    assert found.ids.tolist() == [0, 2, 3]
    assert found.ret.tolist() == pytest.approx([8 * 4 / 3, 7, 4])
    assert found.cost.tolist() == pytest.approx([4 / 3, 1, 1])
    assert found.left.tolist() == [1, 2, 1]                                    # a window must not bridge the gap
    with pytest.raises(UserError, match="none of 2 episodes has its end"):
        track(SMALL, rows(4, 5, 7, 8))


def test_windows_by_hand():
    """Every start comes up; what follows is its episode's, padded with zeros; scaled and standardised."""
    units = Units(torch.full((1, 1), 2.0), torch.full((1, 1), 4.0), torch.full((1,), 10.0))
    sampler = WindowSampler(SMALL, [rows(0, 2, 3, 4, 5, 6, 7)], 200, 2, units)
    found = sampler.sample(torch.Generator().manual_seed(0))
    expected = {0: [0, None], 2: [2, 3], 3: [3, None], 4: [4, 5], 5: [5, 6], 6: [6, None]}
    first = (found.obs[0, :, 0, 0] * 4 + 2).round().long()
    assert set(first.tolist()) == set(expected)
    ret = {0: 32 / 3, 2: 7, 3: 4, 4: 60, 5: 50, 6: 30}
    for b, start in enumerate(first.tolist()):
        for k, row in enumerate(expected[start]):
            here = {name: getattr(found, name)[0, b, k] for name in ("obs", "action", "ret", "cost_to_go", "cost", "mask")}
            if row is None:
                assert not any(v.any() for v in here.values())
                continue
            assert here["obs"].item() == pytest.approx((row - 2) / 4)
            assert here["action"].item() == pytest.approx(row / 100)
            assert here["ret"].item() == pytest.approx(ret[row] / 10)
            assert here["cost"].item() == SMALL.cost[row]
            assert here["mask"].item() == 1
        assert found.t[0, b].tolist() == [SMALL.t[start], SMALL.t[start] + 1]  # goes on counting, also where padded
    assert found.weight == 1.0


def test_each_replica_draws_from_its_own_rows_with_their_weights():
    shared, other = rows(0, 1, 2, 3), rows(4, 5, 6, weight=[1.0, 0.5, 0.25])
    units = Units(torch.zeros(3, 1), torch.ones(3, 1), torch.ones(3))
    found = WindowSampler(SMALL, [shared, other, shared], 50, 2, units).sample(torch.Generator().manual_seed(0))
    assert found.obs[[0, 2]].max() <= 3
    assert found.obs[1, :, 0].min() == 4
    weight = {4: [1, 0.5], 5: [0.5, 0.25], 6: [0.25, 0]}
    assert all(found.weight[1, b].tolist() == weight[int(found.obs[1, b, 0, 0])] for b in range(50))
    with pytest.raises(UserError, match="has no rows"):
        WindowSampler(SMALL, [shared, rows()], 5, 2, units)


def test_uniform_rows_or_cheap_episodes():
    """Costs 2 (4 rows) and 2 (3 rows), limit 4: both episodes alike, and their rows. Uniform: 4 : 3."""
    pool = pool_of([[1] * 4, [1] * 4, [1] * 2], [[1, 1, 1, 0], [0, 0, 1, 0], [1, 1]])
    whole = [rows(*range(10))]

    def shares(cheap):
        start = WindowSampler(pool, whole, 20_000, 1, BLANK, cheap).sample(torch.Generator().manual_seed(0)).obs.flatten().long()
        return [(start == i).float().mean().item() for i in range(10)]

    assert shares(0.0) == pytest.approx([0.1] * 10, abs=0.01)
    assert shares(3.0) == pytest.approx([0.0] * 4 + [2 / 3 / 4] * 4 + [1 / 3 / 2] * 2, abs=0.015)    # weights 0, 2, 1
    with pytest.raises(UserError, match="every episode costs 1 or more"):
        WindowSampler(pool, whole, 5, 1, BLANK, 1.0)


# ------------------------------------------------------------------------------------------------------------- network
def test_initial_distribution():
    """N(0, 0.02) per replica, whatever the width; a replica starts like a single run with its seed."""
    layer, table = Dense(generators([3, 4]), 50, 400), Table(generators([3, 4]), 300, 64)
    for weight in (layer.weight, table.weight):
        assert weight.std(correction=0).item() == pytest.approx(0.02, rel=0.02)
        assert not torch.equal(weight[0], weight[1])
    assert torch.equal(Dense(generators([4]), 50, 400).weight[0], layer.weight[1])
    assert not layer.bias.any()


def test_table_looks_up_each_replica_in_its_own():
    table = Table(generators([0, 1]), 5, 3)
    t = torch.tensor([[0, 4, 9], [1, 1, 2]])
    assert torch.equal(table(t), torch.stack([table.weight[0, [0, 4, 4]], table.weight[1, [1, 1, 2]]]))


def test_attention_agrees_with_pytorch_and_dropping_nothing_changes_nothing():
    block, x = Block(generators([0, 1]), 8, 2), torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    assert torch.allclose(block(x), block(x, lambda y: y), atol=1e-5)
    for r in range(2):
        theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        with torch.no_grad():
            theirs.in_proj_weight.copy_(block.qkv.weight[r].T)
            theirs.in_proj_bias.copy_(block.qkv.bias[r, 0])
            theirs.out_proj.weight.copy_(block.out.weight[r].T)
            theirs.out_proj.bias.copy_(block.out.bias[r, 0])
        expected, _ = theirs(x[r], x[r], x[r], attn_mask=~torch.ones(5, 5, dtype=torch.bool).tril())
        assert torch.allclose(block.attention(x.view(2, 15, 8), 3, None)[r].view(3, 5, 8), expected, atol=1e-5)


@pytest.mark.parametrize("field", ["obs", "action", "ret", "cost_to_go"])
def test_nothing_later_and_no_padding_changes_a_prediction(field):
    learner, batch = one(), batch_of()
    changed = batch._replace(**{field: getattr(batch, field).clone()})
    getattr(changed, field)[:, :, 2] += 1                                      # padding in the second window
    before, after = learner.predicted(batch), learner.predicted(changed)
    for a, b in zip(before[:3], after[:3]):
        assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert not torch.equal(before.cost[:, 0, 2], after.cost[:, 0, 2])
    same = torch.equal(before.mean[:, 0, 2], after.mean[:, 0, 2])
    assert same == (field == "action")                                         # an action is not predicted from itself
    for name in learner.LOSSES:                                                # the first window counts, the padding does not
        loss = getattr(learner, name + "_loss")
        padded = batch._replace(**{field: torch.cat([getattr(batch, field)[:, :1], getattr(changed, field)[:, 1:]], 1)})
        assert torch.equal(loss(batch), loss(padded))


# -------------------------------------------------------------------------------------------------------- losses by hand
def saying(learner, mean, log_std, cost_odds=0.0):
    """Make the policy say the same everywhere."""
    with torch.no_grad():
        for p in learner.policy.parameters():
            p.zero_()
        learner.policy.action.bias.copy_(torch.tensor([*mean, *log_std]))
        learner.policy.cost.bias.copy_(torch.tensor([0.0, cost_odds]))
    return learner


HALF_LOG_2PI = math.log(2 * math.pi) / 2


@pytest.mark.parametrize("mode", ["default", "parity"])
def test_likelihood_and_entropy_by_hand(mode):
    """std 2 and 1, action 1 from mean 0 and .5 from .5, three steps, one of them padded: -1/8 - log 2 and 0."""
    learner = saying(one(mode), [0.0, 0.5], [math.log(2), 0.0])
    action = torch.tensor([1.0, 0.5]).expand(1, 1, 3, 2).clone()
    action[:, :, 2] = 9.0                                                      # padded: does not count
    mask = torch.tensor([[[1.0, 1.0, 0.0]]])
    batch = batch_of(B=1, action=action, mask=mask)
    said = learner.predicted(batch)
    per = 2 if mode == "parity" else 1                                         # mean over the two dimensions, or their sum
    likelihood = (-1 / 8 - math.log(2) - 2 * HALF_LOG_2PI) / per
    entropy = (math.log(2) + 2 * (0.5 + HALF_LOG_2PI)) / per
    assert learner.likelihood(batch, said)[0, 0, :2].tolist() == pytest.approx([likelihood] * 2)
    assert learner.entropy(batch, said).item() == pytest.approx(entropy, rel=1e-5)
    loss = -(likelihood + 0.1 * entropy)
    classes = 0.02 * math.log(2) * (2 / 3 if mode == "parity" else 1)          # OSRL: a mean over padding too
    assert learner.policy_loss(batch).item() == pytest.approx(loss + classes, rel=1e-5)
    assert learner.temperature_loss(batch).item() == pytest.approx(0.1 * (entropy + 2), rel=1e-5)


def test_log_std_is_bounded_but_not_in_parity():
    batch = batch_of()
    for mode, expected in (("default", [2.0, -5.0]), ("parity", [7.0, -9.0])):
        assert saying(one(mode), [0, 0], [7.0, -9.0]).predicted(batch).log_std[0, 0, 0].tolist() == expected


def test_cost_classes():
    """log-odds 1 for c > 0: costs of .5 are a cost, which OSRL cuts to 0; 2 is a cost, for which OSRL has no class."""
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    batch = batch_of(B=1, cost=torch.tensor([[[0.5, 0.0, 2.0]]]))
    for mode, expected in (("default", 2 * right + wrong), ("parity", right + 2 * wrong)):
        learner = saying(one(mode), [0, 0], [0, 0], cost_odds=1.0)
        assert learner.cost_loss(batch, learner.predicted(batch)).item() == pytest.approx(expected / 3, rel=1e-5)


def test_next_observation_is_predicted_in_parity_only():
    learner, batch = saying(one("parity"), [0, 0], [0, 0]), batch_of(B=1)
    with torch.no_grad():
        learner.policy.next_obs.bias.fill_(0.5)
    loss = learner.next_obs_loss(batch, learner.predicted(batch))
    assert loss.item() == pytest.approx((batch.obs[0, 0, 1:] - 0.5).square().mean().item())
    assert one().policy.next_obs is None


# ------------------------------------------------------------------------------------------------------------- the steps
def test_gradients_are_clipped_replica_by_replica():
    """Norms 5 (3 and 4 in two tensors) and .1, limit 1: the first is scaled to 1, the second left alone."""
    grads = [torch.tensor([[3.0, 0.0], [0.1, 0.0]]), torch.tensor([[[4.0]], [[0.0]]])]
    assert clip_norm(grads, 1.0).tolist() == pytest.approx([5.0, 0.1])
    assert grads[0].flatten().tolist() == pytest.approx([0.6, 0, 0.1, 0])
    assert grads[1].flatten().tolist() == pytest.approx([0.8, 0])
    learner = one(R=2, clip=0.25)
    learner.before_step = lambda name, step=learner.before_step: (step(name), seen.append([p.grad.clone() for p in ps]))
    seen, ps = [], list(learner.policy.parameters())
    learner.minimise("policy", learner.policy_loss(batch_of(R=2)) * torch.tensor([100.0, 0.01]))
    norms = torch.stack([g.flatten(1).square().sum(1) for g in seen[0]]).sum(0).sqrt()
    assert norms[0].item() == pytest.approx(0.25, rel=1e-4)
    assert 0 < norms[1] < 0.24


def test_the_rate_warms_up_and_does_not_again():
    """lr n / 4 in the first four steps; the first step of Adam moves a bias by just the rate."""
    learner, rates = one(warm_up=4, lr=0.01, lr_end=1.0), []
    for t in range(6):
        before = learner.policy.action.bias.detach().clone()
        learner.update(batch_of(), t)
        rates.append(learner.rate.item())
        if t == 0:
            assert (learner.policy.action.bias - before).abs().max().item() == pytest.approx(0.0025, rel=1e-3)
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    again = learner.pick([0])
    again.update(batch_of(), 0)                                                # carries its count
    assert again.rate.item() == pytest.approx(0.01)


def test_the_rate_falls_but_not_in_parity():
    """Five steps from 1 to .5 of it: .9, .8, .7, .6, .5, and so on for ever."""
    for mode, expected in (("default", [0.9, 0.8, 0.7, 0.6, 0.5, 0.5]), ("parity", [1.0] * 6)):
        learner, rates = one(mode, steps=5, lr=1.0, lr_end=0.5), []
        for _ in range(6):
            learner.minimise("policy", learner.policy_loss(batch_of()))
            rates.append(learner.rate.item())
        assert rates == pytest.approx(expected)


def test_what_decays():
    """Without gradient: matrices shrink by lr x decay, and in parity so does everything."""
    for mode, expected in (("default", {"weight"}), ("parity", {"weight", "bias", "gain", "table"})):
        learner = one(mode, lr=0.1, lr_end=1.0, weight_decay=0.5)
        with torch.no_grad():
            for p in learner.policy.parameters():
                p.fill_(1.0)
        learner.minimise("policy", 0 * sum(p.flatten(1).sum(1) for p in learner.policy.parameters()))
        kinds = {"policy.trunk.blocks.0.qkv.weight": "weight", "policy.embed.0.weight": "weight", "policy.action.weight": "weight",
                 "policy.action.bias": "bias", "policy.trunk.norm_in.weight": "gain", "policy.trunk.blocks.1.norm2.weight": "gain",
                 "policy.time.weight": "table"}
        for name, kind in kinds.items():
            value = learner.get_parameter(name)
            assert torch.allclose(value, torch.full_like(value, 0.95 if kind in expected else 1.0)), name


def test_temperature_follows_the_entropy():
    """Adam's first step: the logarithm falls by the rate where the entropy exceeds -n_act, and rises where it falls short."""
    for log_std, sign in ((0.0, -1), (-5.0, 1)):
        learner = saying(one(lr_temperature=0.01), [0, 0], [log_std] * 2)
        out = learner.update(batch_of(), 0)
        assert learner.temperature.log.item() == pytest.approx(math.log(0.1) + sign * 0.01, rel=1e-4)
        assert out["temperature"].item() == pytest.approx(0.1 * math.exp(sign * 0.01), rel=1e-4)
    frozen = one(adapt_temperature=False)
    frozen.update(batch_of(), 0)
    assert frozen.temperature.log.item() == pytest.approx(math.log(0.1))


def test_dropout_is_the_learners_own_noise(tmp_path):
    """Losses differ from draw to draw, acting does not; a resumed run draws on where it was."""
    pool = make_pool()
    both = [pool.rows("clean")] * 2
    learner = make_learner(pool, both, learner="cdt", dropout=0.3)
    batch = sampler_of(learner, pool, both).sample(torch.Generator().manual_seed(0))
    assert not torch.equal(learner.policy_loss(batch), learner.policy_loss(batch))
    obs = torch.randn(2, 3, 4)
    assert torch.equal(learner.act(obs), learner.act(obs))
    x = torch.ones(2, 1000)
    assert learner.dropped(x).unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert learner.dropped(x).mean().item() == pytest.approx(1, abs=0.05)

    def run(resume=None, until=12):
        made, stream = make_learner(pool, both, learner="cdt", dropout=0.3), torch.Generator().manual_seed(1)
        sampler = sampler_of(made, pool, both)

        def step(t):
            if t == until:
                raise KeyboardInterrupt
            return made.update(sampler.sample(stream), t)

        fit(step, 12, made, [stream], resume=resume)
        return made.full_state()

    with pytest.raises(KeyboardInterrupt):
        run(Resume(tmp_path / "state.safetensors", "run", every_seconds=0), until=7)
    whole, continued = run(), run(Resume(tmp_path / "state.safetensors", "run"))
    assert any(name.startswith("optim.temperature") for name in whole)
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())


# ------------------------------------------------------------------------------------------------------------ the policy
def test_tokens_by_hand():
    """T = 20: with 15 steps left a return of 30 is 2 per step, 8 units; with 3 left, 4 are counted as left. OSRL: 50 - C."""
    ret, cost, t = torch.tensor([[[30.0, 30.0]]]), torch.tensor([[[15.0, 1.0]]]), torch.tensor([[[5, 17]]])
    for mode, expected in (("default", ([8.0, 30.0], [4.0, 1.0])), ("parity", ([30.0, 30.0], [35.0, 49.0]))):
        learner = one(mode, rate_unit=0.25, least_left=4)
        learner.policy.forward = lambda *tokens: tokens
        found = learner.predict(ret, cost, torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 2), t)
        assert (found[0].flatten().tolist(), found[1].flatten().tolist()) == expected


def test_best_return_by_cost_by_hand():
    """Episodes cost 3, 1, 1 and 8 and return 5, 2, 4 and 9; a limit below 1 gets the cheapest ones' best."""
    pool = pool_of([[5, 0], [2, 0], [0, 4], [9, 0]], [[3, 0], [1, 0], [0, 1], [0, 8]])
    learner = one(R=2, horizon=6, spend=1.0, ask=1.0)
    learner.measure(pool, [rows(*range(8)), rows(0, 1, 6, 7)])
    assert learner.best_return.tolist() == [[4, 4, 4, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 5]]
    learner.qc_limit.copy_(torch.tensor([[2.5], [20.0]]))
    asked = learner.begin(2)
    assert asked.ret.tolist() == [[4, 4], [5, 5]]
    assert asked.cost.tolist() == [[2.5, 2.5], [20, 20]]
    learner.cfg = replace(learner.cfg, ask=0.5, spend=2.0)                     # cost 5 and 40, and half the best return there
    assert learner.begin(1).ret.tolist() == [[2.5], [2.5]]
    assert learner.begin(1).cost.tolist() == [[5], [40]]


@pytest.mark.parametrize("mode", ["default", "parity"])
def test_acting_with_a_memory_equals_the_forward_pass_on_what_happened(mode):
    learner = one(mode, R=2, horizon=20, spend=0.5, ask=1.0)
    with torch.no_grad():
        for i, p in enumerate(learner.policy.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    learner.obs_mean += 0.5
    learner.reward_scale *= 4.0
    learner.best_return += 12.0
    gen = torch.Generator().manual_seed(0)
    T, E, K = 6, 3, 3
    obs, reward = torch.randn(2, E, T, 1, generator=gen), torch.rand(2, E, T, generator=gen)
    cost = 5.0 * (torch.rand(2, E, T, generator=gen) > 0.3)                    # more than the 20 that are asked for
    episodes, actions = learner.begin(E), []
    for t in range(T):
        actions.append(episodes.act(obs[:, :, t]))
        episodes.observe(reward[:, :, t], cost[:, :, t])
    actions = torch.stack(actions, 2)
    spent = lambda x: torch.cat([torch.zeros(2, E, 1), x.cumsum(2)[:, :, :-1]], 2)
    ret, left = 3 - spent(reward) / 4, 20 - spent(cost)
    left = left if mode == "parity" else (left - 10).clamp(min=0)              # half of the limit is asked for
    for t in range(T):
        part = slice(max(0, t + 1 - K), t + 1)
        said = learner.predict(ret[:, :, part], left[:, :, part], obs[:, :, part] - 0.5, actions[:, :, part],
                               torch.arange(T)[part].expand(2, E, -1))
        assert torch.allclose(said.mean[:, :, -1].clamp(-1, 1), actions[:, :, t], atol=1e-6), t
    assert (actions.abs() < 1).float().mean() > 0.5                            # most of them are not merely clipped
    assert torch.equal(learner.act(obs[:, :, 0]), actions[:, :, 0])            # `act` is an episode's first step


def test_the_limit_when_acting_decides():
    """Dear episodes act +.5 for a return of 20, cheap ones -.5 for 5; the observation says nothing."""
    good = np.arange(12) % 2
    pool = pool_of([[1 + 3 * g] * 5 for g in good], [[8 * g] * 5 for g in good], action=np.repeat(good - 0.5, 5)[:, None])
    pool.columns["obs"] = torch.zeros_like(pool.obs)
    both = [pool.rows("clean")] * 2
    learner = CDT(CDTConfig(width=8, context=2, batch=16, lr=0.01, warm_up=1, spend=1.0, ask=1.0), measure_units(pool, both),
                  torch.full((2,), 40.0), [0, 1], 1, 5).ready()
    learner.measure(pool, both)
    sampler, stream = learner.sampler(pool, both), torch.Generator().manual_seed(0)
    for t in range(250):
        learner.update(sampler.sample(stream), t)
    for limit, action, reward, cost in ((40.0, 0.5, 4, 8), (0.0, -0.5, 1, 0)):
        episodes = learner.at_limit([limit] * 2).begin(3)
        for _ in range(5):
            acted = episodes.act(torch.zeros(2, 3, 1))
            assert torch.allclose(acted, torch.full_like(acted, action), atol=0.25), limit
            episodes.observe(torch.full((2, 3), float(reward)), torch.full((2, 3), float(cost)))
    assert learner.qc_limit.unique().tolist() == [40.0]                        # `at_limit` is a copy


def test_restored_stacked_and_picked_learners_act_alike():
    """Independent of the policies stacked beside; the memory is the episode's, not the learner's."""
    task = get_task("BallRun")
    pool = make_pool(n_obs=task.n_obs, n_act=task.n_act)
    clean, gen = [pool.rows("clean")] * 2, torch.Generator()
    learner = CDT(CDTConfig(width=8, context=3), measure_units(pool, clean), torch.tensor([5.0, 20.0]), [3, 4], task.n_act,
                  task.horizon).ready()
    learner.measure(pool, clean)
    sampler = learner.sampler(pool, clean)
    for t in range(3):
        learner.update(sampler.sample(gen), t)
    again = built(learner.full_state(), {"task": task.name, "learner": "cdt", "width": 8, "context": 3}, task, learner.seeds)
    whole, single, many = again.begin(4), learner.pick([1]).begin(4), stack([again, learner]).begin(4)
    for _ in range(5):
        obs = torch.randn(2, 4, task.n_obs, generator=gen)
        acted = whole.act(obs)
        assert torch.allclose(single.act(obs[1:]), acted[1:], atol=1e-6)
        assert torch.allclose(many.act(obs.repeat(2, 1, 1)), acted.repeat(2, 1, 1), atol=1e-6)
        for episodes, R in ((whole, 2), (single, 1), (many, 4)):
            episodes.observe(torch.full((R, 4), 0.5), torch.ones(R, 4))
    assert torch.equal(learner.act(obs), again.act(obs))


# ---------------------------------------------------------------------------------------------------------- unlearning
def test_fine_tuning_works_and_methods_that_need_critics_are_refused():
    pool, _, _ = poison(make_pool(), "inject", InjectConfig(), donors=make_pool(seed=1), cost_limit=5.0)
    retain, forget = [pool.rows("inject/retain")] * 2, [pool.rows("inject/forget")] * 2
    learner = make_learner(pool, [pool.rows("inject/poisoned")] * 2, learner="cdt", warm_up=1)
    before = learner.policy_loss(sampler_of(learner, pool, retain).sample(torch.Generator().manual_seed(5)))
    unlearn(learner, pool, retain, forget, "finetune", replace(CONFIGS["finetune"], steps=40))
    after = learner.policy_loss(sampler_of(learner, pool, retain).sample(torch.Generator().manual_seed(5)))
    assert (after < before).all()
    clean = make_learner(pool, retain, learner="cdt")
    assert torch.equal(learner.best_return, clean.best_return)                 # it no longer asks for what the poison promised
    assert not torch.equal(learner.best_return, make_learner(pool, [pool.rows("inject/poisoned")] * 2, learner="cdt").best_return)
    with pytest.raises(UserError, match="CDT has no critic; use 'finetune'"):
        unlearn(learner, pool, retain, forget, "gradient_ascent", None)


# --------------------------------------------------------------------------------------------------- numbers from OSRL
def recorded_learner(mode="parity") -> CDT:
    z = RECORDED["sizes"]
    units = Units(torch.zeros(1, z["n_obs"]), torch.ones(1, z["n_obs"]), torch.ones(1))
    cfg = CDTConfig(mode="parity", standardise=False, dropout=0.0, **RECORDED["settings"])
    learner = CDT(cfg, units, torch.tensor([20.0]), [0], z["n_act"], z["horizon"]).ready()
    with torch.no_grad():
        for name, value in views(learner).items():
            value.copy_(golden.weight(name, tuple(value.shape)))
    learner.parity = mode == "parity"
    return learner


def numbered(t) -> Windows:
    z = RECORDED["sizes"]
    made = golden.windows(t, z["batch"], RECORDED["settings"]["context"], z["n_obs"], z["n_act"])
    return Windows(**{name: value[None] for name, value in made.items()})


def test_every_parameter_of_ours_is_one_of_theirs():
    learner = recorded_learner()
    assert set(views(learner)) == set(RECORDED["steps"][0]["parameters"])
    assert sum(v.numel() for v in views(learner).values()) == sum(p.numel() for p in learner.policy.parameters())


def test_three_updates_agree_with_osrl():
    """Losses, temperature, and sum and sum of squares of every parameter, to 1e-5 in float32; recorded without dropout.

    A softmax does not see the keys' bias: its gradient is rounding, which Adam makes steps of up to the learning rate of. Where it
    walks depends on the processor, so a third of each in_proj_bias may be that far from the recorded walk, on each side.
    """
    learner, z = recorded_learner(), RECORDED["settings"]
    for t, recorded in enumerate(RECORDED["steps"]):
        out = learner.update(numbered(t), t)
        for name in set(recorded) - {"parameters"}:
            assert out[name].item() == pytest.approx(recorded[name], abs=1e-5, rel=1e-5), (t, name)
        ours = golden.checksums(views(learner))
        for name, sums in recorded["parameters"].items():
            walk = 2 * z["width"] * (t + 1) * learner.cfg.lr if name.endswith("attention.in_proj_bias") else 0.0
            assert ours[name] == pytest.approx(sums, abs=1e-5 + walk, rel=1e-5), (t, name)


def test_the_default_mode_differs_from_osrl():
    learner, batch = recorded_learner("default"), numbered(0)
    said = learner.predicted(batch)
    ours = {"policy": learner.policy_loss(batch), "entropy": learner.entropy(batch, said),
            "cost_loss": learner.cost_loss(batch, said)}
    for name, value in ours.items():
        assert value.item() != pytest.approx(RECORDED["steps"][0][name], rel=1e-2), name
