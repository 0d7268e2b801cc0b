"""Safe-RULE: joint suppression of the poison in reward critic, cost critic and, through them, the actor.

Paper       Jiang, Zhu & Kong 2026 (arXiv 2606.09559). Known of it: Bellman regression on clean data, softplus suppression on
            forget data, both critics and the actor together. Its equations could not be read: what follows is a reconstruction
Ours        1. cost values of forget rows go up (cost_sign=-1: down); reward values go down
            2. margins relative to the policy's own value at the forget state, from target networks, without gradient
            3. the weight falls to zero over `suppress_steps`; relearning on retain rows follows within the same budget
            4. both critics regress on a mixture of 1-step and n-step targets along retained trajectories while suppressing
            5. a gate spares forget rows whose cost label agrees with what the retain rows say (forged costs only)
            6. multiplier frozen and targets faster (tau) during the budget; critics and actor keep their Adam moments
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ..config import SafeRULEConfig
from ..data import Sampler
from ..nets import MLP, generators
from ..train import Learner
from . import Memory, Phase

NEEDS = "critic", "cost_critic"        # losses of the learner


def suppress(value: Tensor, margin: Tensor, weight: Tensor | float, sign: int) -> Tensor:
    """Bounded push of critic heads past a margin: down (sign -1) or up (sign +1).

    value [R, E, B], margin [R, B], weight [R, B] -> [R]: mean over B of weight times the sum over heads of
    softplus(-sign (value - margin)).
    Its slope in `value` lies in (-1, 1) and vanishes once the margin is passed, unlike a negative squared error's.
    """
    return (weight * softplus(-sign * (value - margin[:, None])).sum(1)).mean(-1)


def margins(learner: Learner, obs: Tensor, cfg: SafeRULEConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reward values shall lie below V - margin; cost values above max(Vc + margin, cost_floor x limit): [R, B] each.

    With cost_sign = -1 the cost margin is Vc - margin instead.
    """
    v, vc = learner.value(obs, generator)
    if cfg.cost_sign < 0:
        return v - cfg.margin, vc - cfg.margin
    return v - cfg.margin, torch.maximum(vc + cfg.margin, cfg.cost_floor * learner.qc_limit)


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


def phases(learner: Learner, memory: Memory, cfg: SafeRULEConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    gated = [cfg.gate == "on" or (cfg.gate == "auto" and forged) for forged in forged_costs]
    if any(gated) and cfg.weight:
        gates = gate(learner, memory, cfg.gate_steps)
        memory.weigh_forget([g if use else torch.ones_like(g) for g, use in zip(gates, gated)])
    start = torch.tensor([[cfg.weight if use else cfg.weight_ungated] for use in gated], device=learner.device)    # [R, 1]
    learner.reset_optimiser("vae")

    def step(t: int):
        w = start * (1 - learner.clock / cfg.suppress_steps).clamp(min=0)                          # annealed, on the device
        if not cfg.n_step_mix:
            retain, target = memory.retain(), None
        else:
            retain, long = memory.retain_pair()
            one = learner.targets(retain)
            target = type(one)(*(torch.lerp(a, b, cfg.n_step_mix) for a, b in zip(one, learner.targets(long))))
        if not (cfg.weight or cfg.weight_ungated):
            return learner.update(retain, learner.cfg.steps + t, target)
        forget = memory.forget()
        low, high = margins(learner, forget.obs, cfg, memory.forget_stream)
        push = {"critic": lambda: suppress(learner.critic(forget.obs, forget.action), low, cfg.alpha * w * forget.weight, -1)}
        if cfg.cost_sign:
            push["cost_critic"] = lambda: suppress(learner.cost_critic(forget.obs, forget.action), high,
                                                   cfg.beta * w * forget.weight, cfg.cost_sign)
        return learner.update(retain, learner.cfg.steps + t, target, push)

    settings = {"tau": cfg.tau, "adapt_lam": not cfg.freeze_lam}
    yield Phase("suppress", cfg.suppress_steps, step, settings)
    yield Phase("relearn", cfg.steps - cfg.suppress_steps, memory.ordinary, settings)
