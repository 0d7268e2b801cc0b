"""Safe-RULE: joint suppression of the poison in reward critic, cost critic and, through them, the actor.

Paper       Jiang, Zhu & Kong 2026 (arXiv 2606.09559). Known of it: Bellman regression on clean data, softplus suppression on
            forget data, both critics and the actor together. Its equations could not be read: what follows is a reconstruction
Ours        1. cost values of forget rows go up (cost_sign=-1: down); reward values go down
            2. margins relative to the policy's own value at the forget state, from target networks, without gradient
            3. the weight falls to zero over `suppress_steps`; relearning on retain rows follows within the same budget
            4. both critics regress on a mixture of 1-step and n-step targets along retained trajectories while suppressing; the
               share of the latter, which are biased towards the data's own actions, falls with the weight
            5. a gate spares forget rows whose cost label agrees with what the retain rows say (forged costs only)
            6. temptation spares forget rows whose action is worse in the policy's eyes than its own, by the margin
            7. multiplier frozen and targets faster (tau) during the budget; critics and actor keep their Adam moments
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ..config import MARGINS, SUPPRESSIONS, SafeRULEConfig, one_of
from ..data import Batch, Sampler
from ..nets import MLP, generators
from ..train import Learner
from . import Memory, Phase
from .early_saferule import policy_values

NEEDS = "critic", "cost_critic"        # losses of the learner


def suppress(value: Tensor, margin: Tensor, weight: Tensor | float, sign: int) -> Tensor:
    """Bounded push of critic heads past a margin: down (sign -1) or up (sign +1).

    value [R, E, B], margin [R, B], weight [R, B] -> [R]: mean over B of weight times the sum over heads of
    softplus(-sign (value - margin)).
    Its slope in `value` lies in (-1, 1) and vanishes once the margin is passed, unlike a negative squared error's.
    """
    return (weight * softplus(-sign * (value - margin[:, None])).sum(1)).mean(-1)


def margins(source: Learner, obs: Tensor, cfg: SafeRULEConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reward values shall lie below V - margin; cost values above max(Vc + margin, cost_floor x limit): [R, B] each.

    V, Vc: of the policy's own action, by the target networks of `source`. With cost_sign = -1 the cost margin is Vc - margin.
    """
    return bounds(source, *source.value(obs, generator), cfg)


def bounds(source: Learner, v: Tensor, vc: Tensor, cfg: SafeRULEConfig) -> tuple[Tensor, Tensor]:
    if cfg.cost_sign < 0:
        return v - cfg.margin, vc - cfg.margin
    return v - cfg.margin, torch.maximum(vc + cfg.margin, cfg.cost_floor * source.qc_limit)


@torch.no_grad()
def temptation(learner: Learner, forget: Batch, v: Tensor, vc: Tensor, cfg: SafeRULEConfig) -> Tensor:
    """How far each forget action tempts the policy, in (0, 1): [R, B].

    sigmoid of its merit less that of the policy's own action (values v, vc [R, B]) plus the margin, over the temperature: 1/2 where
    it is worse by exactly the margin. Merit is what the policy climbs, such as Q - lam Qc.
    """
    q = learner.pessimistic(learner.critic(forget.obs, forget.action), cost=False)
    qc = learner.pessimistic(learner.cost_critic(forget.obs, forget.action), cost=True)
    return ((learner.merit(q, qc) - learner.merit(v, vc) + cfg.margin) / cfg.temptation).sigmoid()


def gate(learner: Learner, memory: Memory, steps: int, seed: int = 0, hidden: Sequence[int] = (64, 64),
         lr: float = 3e-3) -> list[Tensor]:
    """How far each forget row's cost label is from what the retain rows say: |c_hat(s') - 1[c > 0]|, [n_r] per replica.

    c_hat is a small classifier of P(c > 0 | s'), fitted to retain rows only: benign steps inside a poisoned episode get a
    gate near 0 and are left alone.
    """
    net = MLP(generators([seed + s for s in learner.seeds]), learner.n_obs, hidden, 1).to(learner.device)
    optim = torch.optim.Adam(net.parameters(), lr=lr)
    sampler = Sampler(memory.pool, memory.retain_rows, 256, learner.units)
    stream = torch.Generator(learner.device).manual_seed(seed)
    for _ in range(steps):
        batch = sampler.sample(stream)
        optim.zero_grad()
        loss = binary_cross_entropy_with_logits(net(batch.next_obs)[..., 0], (batch.cost > 0).float(), reduction="none")
        loss.mean(-1).sum().backward()
        optim.step()
    with torch.no_grad():
        width = max(len(r.ids) for r in memory.rows)
        ids = torch.stack([torch.nn.functional.pad(r.ids, (0, width - len(r.ids))) for r in memory.rows]).to(learner.device)
        p = net(learner.standardise(memory.pool.next_obs[ids]))[..., 0].sigmoid()                 # [R, width]
        out = (p - (memory.pool.cost[ids] > 0).float()).abs()
    return [line[:len(r.ids)] for line, r in zip(out, memory.rows)]


def pushes(learner: Learner, source: Learner, memory: Memory, cfg: SafeRULEConfig, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The terms that are added to the losses of both critics (and, with `gap`, of the actor), on one forget batch; w [R, 1]."""
    forget = memory.forget()
    w = w * forget.weight                                                                          # [R, 1] or [R, B]
    if cfg.form == "ascent":
        target = learner.targets(forget)
        error = lambda q, y: (w * (q - y[:, None]).square().sum(1)).mean(-1)
        push = {"critic": lambda: -cfg.alpha * error(learner.critic(forget.obs, forget.action), target.reward),
                "cost_critic": lambda: -cfg.beta * error(learner.cost_critic(forget.obs, forget.action), target.cost)}
    else:
        v, vc = source.value(forget.obs, memory.forget_stream)
        low, high = bounds(source, v, vc, cfg)
        if cfg.temptation:
            w = w * temptation(learner, forget, v, vc, cfg)
        push = {"critic": lambda: suppress(learner.critic(forget.obs, forget.action), low, cfg.alpha * w, -1),
                "cost_critic": lambda: suppress(learner.cost_critic(forget.obs, forget.action), high, cfg.beta * w, cfg.cost_sign)}
    if not cfg.cost_sign:
        del push["cost_critic"]
    if cfg.gap:
        def actor() -> Tensor:                         # what the policy climbs, at forget states; their labels are not used
            q, qc = policy_values(learner, forget.obs, 1)
            price = getattr(learner, "lam", 1.0)       # CPQ has no multiplier
            return cfg.gap * (w * (-q + price * (qc - learner.qc_limit))).mean(-1)
        push["actor"] = actor
    return push


def phases(learner: Learner, memory: Memory, cfg: SafeRULEConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    one_of("form of the suppression", cfg.form, SUPPRESSIONS)
    one_of("source of the margins", cfg.margins, MARGINS)
    gated = [cfg.gate == "on" or (cfg.gate == "auto" and forged) for forged in forged_costs]
    if any(gated) and cfg.weight:
        gates = gate(learner, memory, cfg.gate_steps)
        memory.weigh_forget([g if use else torch.ones_like(g) for g, use in zip(gates, gated)])
    start = torch.tensor([[cfg.weight if use else cfg.weight_ungated] for use in gated], device=learner.device)    # [R, 1]
    source = learner.pick(range(learner.replicas)) if cfg.margins == "frozen" else learner
    learner.reset_optimiser("vae")

    def step(t: int):
        fall = (1 - learner.clock / cfg.suppress_steps).clamp(min=0)                               # on the device
        if not cfg.n_step_mix:
            retain, target = memory.retain(), None
        else:
            retain, long = memory.retain_pair()
            one, far = learner.targets(retain), learner.targets(long)
            share = cfg.n_step_mix * (fall if cfg.anneal_mix else torch.ones_like(fall))
            target = type(one)(*(torch.lerp(a, b, share) for a, b in zip(one, far)))
        w = start * (fall if cfg.anneal else torch.ones_like(fall))
        push = pushes(learner, source, memory, cfg, w) if cfg.weight or cfg.weight_ungated else None
        return learner.update(retain, learner.cfg.steps + t, target, push)

    settings = {"tau": cfg.tau, "adapt_lam": not cfg.freeze_lam}
    frozen = frozenset() if cfg.fit_vae else frozenset({"vae"})
    yield Phase("suppress", cfg.suppress_steps, step, settings, frozen)
    yield Phase("relearn", cfg.steps - cfg.suppress_steps, memory.ordinary, settings, frozen)
