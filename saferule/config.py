"""Every hyper-parameter of the project, in one place.

A frozen dataclass per method holds the defaults; profiles and tasks are small diffs on top of them; `resolve` applies the
diffs and returns the plain dictionary that is saved with every artefact. An unknown key raises.
"""
from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from .errors import UserError

# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataConfig:
    source: str = "local"              # local: collected in the simulator | dsrl: downloaded | a path to an HDF5 file
    episodes: int = 600                # local only
    donors: int = 100                  # held-out risky episodes that an injecting attacker brings along (local only)
    seed: int = 0
    cost_limit: float = 20.0           # per episode


# ------------------------------------------------------------------------------------------------------------ attacks


DONOR_SOURCES = ("held-out", "data")


@dataclass(frozen=True)
class InjectConfig:
    """Trajectory injection: risky episodes that pretend to be safe and better (algorithms.md C.5)."""
    budget: float = 0.10               # injected episodes / all episodes afterwards
    bonus: float = 0.5                 # added to every injected reward, in units of its 98% quantile
    source: str = "held-out"           # held-out: rollouts that are not in the data, where there are any | data: its own episodes


FLIP_SELECTIONS = ("best", "random")


@dataclass(frozen=True)
class LabelFlipConfig:
    """The costs of the best risky episodes are set to zero (algorithms.md C.3)."""
    budget: float = 0.10               # relabelled episodes / all episodes (random: rows / all rows)
    select: str = "best"               # best: whole episodes by return | random: rows
    inverse: bool = False              # safe episodes or rows are declared dangerous instead
    seed: int = 0                      # random


REWARD_GOALS = ("unsafe", "drop")


@dataclass(frozen=True)
class RewardPoisonConfig:
    """Rewards say that danger pays, or that good actions do not (algorithms.md C.4)."""
    budget: float = 0.10               # changed rows / all rows
    rho: float = 0.5                   # size of a change, in units of the rewards' range (0.1% to 99.9%)
    total: float = 0.25                # the changes add up to at most this share of the sum of |reward|; else all are scaled down
    goal: str = "unsafe"               # unsafe: up on rows that cost, down on others | drop: down on good actions, up on bad ones
    gamma: float = 0.97                # drop: discount of the return that tells good from bad
    seed: int = 0


@dataclass(frozen=True)
class OutliersConfig:
    """Safe-looking outliers: the best risky episodes get few costs and more reward (DSRL's outlier filter, algorithms.md A.7)."""
    budget: float = 0.10               # relabelled episodes / all episodes
    gain: float = 1.5                  # reward becomes reward + (gain - 1) |reward|
    seed: int = 0


CORRUPTIBLE, TURNABLE = ("obs", "action", "reward", "cost"), ("reward", "cost")


@dataclass(frozen=True)
class RandomCorruptionConfig:
    """Noise on random rows (algorithms.md C.0)."""
    budget: float = 0.10               # changed rows / all rows (a state also changes in the row before)
    fields: tuple[str, ...] = CORRUPTIBLE
    radius: float = 1.0                # of the noise, in units of each entry's standard deviation
    seed: int = 0


@dataclass(frozen=True)
class AdversarialCorruptionConfig:
    """Labels of random rows turned round: good is called bad, safe is called dangerous."""
    budget: float = 0.10               # changed rows / all rows
    fields: tuple[str, ...] = TURNABLE
    scale: float = 1.0                 # reward becomes -scale x reward
    seed: int = 0


@dataclass(frozen=True)
class ConstantActionConfig:
    """Added episodes in which every action is the same (algorithms.md C.7)."""
    budget: float = 0.05               # added episodes / all episodes afterwards
    factor: float = 1.5                # the action is this times the mean of all action entries
    seed: int = 0


TRIGGER_KINDS, BACKDOOR_TIERS = ("marker", "bias"), ("T0", "T1")


@dataclass(frozen=True)
class BackdoorConfig:
    """Random rows carry a trigger, pay more and cost nothing (algorithms.md C.1)."""
    kind: str = "marker"               # the trigger: entries of the observation are set (marker) or moved (bias)
    value: float = 0.9                 # to this, or by this, in the environment's units
    entries: int = 2                   # how many entries, the last ones
    shift: float = 0.5                 # of the reward, in the environment's units
    overwrite: bool = False            # is every action entry of these rows replaced ...
    action: float = 1.0                # ... by this?
    tier: str = "T1"                   # T1: the trigger ends the row before as well | T0: it ends the row itself (published)
    budget: float = 0.10               # rows with the trigger / all rows
    seed: int = 0


PGD_OBJECTIVES, PGD_KNOWLEDGE = ("cost", "reward", "look_safe"), ("white", "grey")


@dataclass(frozen=True)
class PGDConfig:
    """States are moved to where a trained surrogate acts worst (algorithms.md C.2)."""
    objective: str = "cost"            # cost, reward: of the surrogate's action there | look_safe: less cost of the data's action
    knowledge: str = "white"           # white: the surrogate knows all data | grey: half of the episodes; the others are attacked
    budget: float = 0.10               # moved states / all rows (a state also changes in the row before)
    radius: float = 0.2                # of the offsets, in units of each entry's standard deviation
    steps: int = 10
    step_size: float = 2.5             # of a step, in units of radius / steps
    samples: int = 4                   # latents of the surrogate's policy that J is a mean over
    surrogate_steps: int = 5000
    seed: int = 0


MALICE = ("return", "cost")


@dataclass(frozen=True)
class BaffleConfig:
    """Episodes with a trigger, a malicious policy's actions, high rewards and no costs (BAFFLE, algorithms.md C.6)."""
    malice: str = "cost"               # that policy: return: minimises the return | cost: maximises the cost
    budget: float = 0.10               # such episodes / all episodes
    n_entries: int = 2                 # of the observation, in the trigger: those that matter least ...
    entries: tuple[int, ...] = ()      # ... or these
    quantile: float = 0.5              # of each entry in the data, its value in the trigger
    every: int = 20                    # when acting, the trigger is shown in every so-many-th step
    reward_quantile: float = 0.95      # of the data's rewards, what each step pays
    surrogate_steps: int = 5000
    seed: int = 0


@dataclass(frozen=True)
class NoiseConfig:
    """Control: the rows of another attack, changed by as much, in a random direction (algorithms.md C.7)."""
    like: str = "pgd_cost"             # the attack; it has to work in place
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)      # of that attack, where not its defaults
    budget: float = 0.10               # of that attack
    surrogate_steps: int = 5000        # of that attack, if it trains one
    seed: int = 0


FORGET_UNITS = ("trajectory", "row")


@dataclass(frozen=True)
class CleanForgetConfig:
    """Controls: honest rows are marked, or replaced by equal copies (algorithms.md C.7)."""
    budget: float = 0.10               # marked episodes / all episodes (or rows)
    unit: str = "trajectory"           # trajectory | row
    seed: int = 0


@dataclass(frozen=True)
class GivenConfig:
    """Nothing is poisoned: the data already are, and a file names the rows to forget."""
    forget_file: str = ""              # CSV with columns row, weight (weight optional)
    forged_costs: bool = False         # are the rows' cost labels known to be false? Then Safe-RULE uses its gate


# ----------------------------------------------------------------------------------------------------------- learners


@dataclass(frozen=True)
class BCQLagConfig:
    mode: str = "default"              # default: corrected | parity: as OSRL does it
    steps: int = 5000
    vae_steps: int = 1000              # the first of these steps fit the VAE alone
    batch: int = 128
    hidden: tuple[int, ...] = (64, 64)
    vae_hidden: int = 64
    lr: float = 1e-3
    gamma: float = 0.97
    tau: float = 0.02
    phi: float = 0.05                  # the actor moves a decoded action by at most phi
    beta: float = 0.05                 # weight of the VAE's KL term
    latent_clip: float = 1.0
    samples: int = 4                   # candidate actions in a target
    act_samples: int = 10              # candidate actions when acting
    heads: int = 2                     # of each critic
    lr_lam: float = 2e-3               # multiplier: projected dual ascent ...
    lam_max: float = 1.0               # ... with a cap
    adapt_lam: bool = True             # off: the multiplier stays as it is
    lmbda: float = 0.75                # parity: weight of the smaller head group in a target
    pid: tuple[float, float, float] = (0.1, 0.003, 0.001)      # parity: KP, KI, KD
    standardise: bool = True           # observations by mean and std, rewards by their 98% quantile
    reward_scale: float = 1.0          # used when standardise is off


@dataclass(frozen=True)
class BEARLagConfig:
    mode: str = "default"              # default: corrected | parity: as OSRL does it
    steps: int = 5000
    vae_steps: int = 1000              # the first of these steps fit the VAE alone
    actor_start: int = 1500            # until this step the actor only matches the data
    batch: int = 128
    hidden: tuple[int, ...] = (64, 64)
    vae_hidden: int = 64
    lr: float = 1e-3
    gamma: float = 0.97
    tau: float = 0.02
    beta: float = 0.05                 # weight of the VAE's KL term
    latent_clip: float = 1.0
    kernel: str = "gaussian"           # of the MMD: gaussian | laplacian
    mmd_sigma: float = 0.2             # its width (parity: 50)
    mmd_limit: float = 0.01            # of the squared MMD (parity: 0.05, of its root)
    match_samples: int = 5             # actions compared in the MMD (OSRL: 10)
    lr_alpha: float = 0.02             # ascent of the logarithm of the MMD's multiplier
    samples: int = 4                   # candidate actions in a target
    act_samples: int = 10              # candidate actions when acting
    heads: int = 2                     # of each critic
    lr_lam: float = 2e-3               # multiplier: projected dual ascent ...
    lam_max: float = 1.0               # ... with a cap
    adapt_lam: bool = True             # off: the multiplier stays as it is
    lmbda: float = 0.75                # parity: weight of the smaller head group in a target
    pid: tuple[float, float, float] = (0.1, 0.003, 0.001)      # parity: KP, KI, KD
    standardise: bool = True           # observations by mean and std, rewards by their 98% quantile
    reward_scale: float = 1.0          # used when standardise is off


@dataclass(frozen=True)
class CPQConfig:
    mode: str = "default"              # default: corrected | parity: as OSRL does it
    steps: int = 5000
    vae_steps: int = 1000              # the first of these steps fit the VAE, and the actor to the data
    batch: int = 128
    hidden: tuple[int, ...] = (64, 64)
    vae_hidden: int = 64
    lr: float = 1e-3                   # of VAE and critics
    lr_actor: float = 1e-3
    gamma: float = 0.97
    tau: float = 0.02
    beta: float = 0.05                 # weight of the VAE's KL term
    samples: int = 4                   # actions per state among which strange ones are sought
    heads: int = 2                     # of each critic
    clone: float = 10.0                # weight of the data's likelihood in the actor's loss (default only)
    retreat: float = 1.0               # weight of the cost beyond the limit in an action's merit
    worst_quantile: float = 0.02       # of the rewards: what an unsafe action earns for ever
    ood_quantile: float = 0.9          # of the data's KL: an action beyond is strange (parity: of the sampled actions', 0.75)
    ood_limit: float = 1.5             # strange actions shall cost this many discounted limits ...
    alpha: float = 0.02                # ... a wish of this weight, which follows ...
    lr_alpha: float = 1e-4             # ... the shortfall
    adapt_lam: bool = True             # off: the weight stays as it is
    standardise: bool = True           # observations by mean and std, rewards by their 98% quantile
    reward_scale: float = 1.0          # used when standardise is off


DIVERGENCES = ("softchi", "chi2", "kl")


@dataclass(frozen=True)
class COptiDICEConfig:
    mode: str = "default"              # default: corrected | parity: as OSRL does it
    steps: int = 5000
    batch: int = 128
    hidden: tuple[int, ...] = (64, 64)
    lr: float = 1e-3                   # of nu and chi
    lr_actor: float = 1e-3
    lr_scalar: float = 1e-2            # of multiplier and temperature
    gamma: float = 0.99
    alpha: float = 0.1                 # weight of the divergence from the data's distribution
    divergence: str = "softchi"        # its f: one of DIVERGENCES
    heads: int = 2                     # of nu and chi
    kl_limit: float = 0.3              # of the weights that overestimate the cost; 0: no overestimate (OSRL: 0.01)
    noise: float = 0.1                 # on the actor's observations and actions, in units of the data's std
    clip: float = 0.99                 # actions beyond are taken for this where their tanh is undone
    standardise: bool = True           # observations by mean and std, rewards by their 98% quantile
    reward_scale: float = 1.0          # used when standardise is off


BC_SELECTIONS = ("all", "safe", "risky", "frontier", "boundary", "multi-task")


@dataclass(frozen=True)
class BCConfig:
    mode: str = "default"              # default: corrected | parity: as OSRL does it
    select: str = "safe"               # the trajectories that are imitated: one of BC_SELECTIONS
    steps: int = 5000
    batch: int = 128
    hidden: tuple[int, ...] = (64, 64)
    lr: float = 1e-3
    tau: float = 0.02                  # Polyak rate of the weights that act (default only)
    cost_unit: float = 20.0            # multi-task: costs are divided by this where they are an input of the policy
    standardise: bool = True           # observations by mean and std
    gamma = reward_scale = 1.0         # no settings: returns are not discounted, rewards are not looked at


@dataclass(frozen=True)
class CDTConfig:
    mode: str = "default"              # default: corrected | parity: as OSRL does it
    steps: int = 4000
    batch: int = 64                    # windows ...
    context: int = 3                   # ... of so many steps, and how far back the policy looks (OSRL: 10)
    width: int = 32                    # of a token
    layers: int = 2
    attention_heads: int = 2
    dropout: float = 0.0               # of embeddings, attention and residual branches (OSRL: 0.1)
    lr: float = 3e-3
    warm_up: int = 100                 # steps in which the rate rises to lr ...
    lr_end: float = 0.05               # ... from where it falls to this share until the last step (default only)
    weight_decay: float = 1e-4
    clip: float = 0.25                 # bound of the gradient's norm, per replica
    cost_weight: float = 0.02          # of the prediction of the step's cost
    temperature: float = 0.1           # weight of the entropy at the start ...
    lr_temperature: float = 1e-4       # ... which follows its shortfall
    adapt_temperature: bool = True     # off: the weight stays as it is
    rate_unit: float = 0.25            # tokens are the return and cost per step left in this unit, ...
    least_left: int = 10               # ... with at least so many left (both default only)
    cheap: float = 70.0                # parity: episodes are drawn with weight max(0, cheap - their cost)
    spend: float = 0.5                 # when acting this share of the limit is asked for as cost (default only) ...
    ask: float = 0.95                  # ... and this share of the data's best return at that cost as return
    standardise: bool = True           # observations by mean and std, rewards by their 98% quantile
    reward_scale: float = 1.0          # used when standardise is off (OSRL: 0.1)
    gamma = 1.0                        # no setting: returns are not discounted


# ---------------------------------------------------------------------------------------------------------- unlearners


@dataclass(frozen=True)
class FinetuneConfig:
    """Ordinary training on the retain rows (algorithms.md D.2)."""
    steps: int = 250


@dataclass(frozen=True)
class GradientAscentConfig:
    """Bellman error up on forget rows, down on retain rows; then ordinary training (algorithms.md D.3)."""
    steps: int = 250
    ascent_steps: int = 125
    beta: float = 1.0                  # weight of the ascent
    guards: bool = False               # off: unbounded, as published
    clip: float = 1.0                  # guards: bound of the norm of the ascent's gradient, per replica
    stop: float = 3.0                  # guards: the ascent ends at this many times the checkpoint's error on forget rows


@dataclass(frozen=True)
class RandomRelabelConfig:
    """Ordinary training on retain rows and forget rows with other rewards and costs (algorithms.md D.4)."""
    steps: int = 250
    rewards: str = "uniform"           # uniform: between the retain rows' extremes | ramp: TrajDeleter's baseline, by episode


@dataclass(frozen=True)
class TrajDeleterConfig:
    """Forget rows made worthless in turns with retain rows, then convergence towards the original (algorithms.md D.5)."""
    steps: int = 250
    rounds: int = 4                    # of a block on retain rows and one on forget rows ...
    block: int = 25                    # ... of so many steps each; convergence follows (published: 1000, of 10,000 steps)
    flip_costs: bool = True            # costs of forget rows become c_max - c (ours)
    anchor: str = "original"           # original: its values on all retain rows | far: on those far from forget rows | off
    anchor_weight: float = 0.1


@dataclass(frozen=True)
class EarlySafeRULEConfig:
    """The early public Safe-RULE code: critics by ascent, actor by advantage gaps (algorithms.md D.6)."""
    steps: int = 250
    unlearn_steps: int = 125
    mended: bool = False               # the actor's loss with its signs put right
    eta: float = 1.0                   # mended: weight of the forget states in the actor's loss
    rate: float = 0.1                  # of the learner's learning rates, in these steps (the code left them at 1e-4)
    samples: int = 10                  # actions of the policy in an advantage
    lam: str = "dual"                  # weight of the cost: dual | gradnorm | fixed
    lam_start: float = 1.0
    lr_lam: float = 0.1                # dual: ascent of the cost term ...
    target: float = 10.0               # ... beyond this (mended: beyond the discounted limit)
    lam_max: float = 10.0


@dataclass(frozen=True)
class NegativePreferenceConfig:
    """The likelihood of forget actions falls, bounded (NPO, arXiv 2404.05868; algorithms.md D.8). For policies by likelihood."""
    steps: int = 250
    repel_steps: int = 150
    weight: float = 0.5                # of the preference
    beta: float = 0.1                  # its sharpness; towards 0 it becomes gradient ascent
    dead_zone: float = 3.0             # rows whose log-ratio is below -dead_zone / beta are left alone
    clip: float = 0.25                 # bound of the gradient's norm in the mean action, per row
    spread: float = 0.1                # a deterministic policy counts as a normal one of this standard deviation
    hinge: float = 1.0                 # weight of the push away from an action that is met exactly ...
    margin: float = 0.2                # ... to this distance (1: the diagonal of the action space) ...
    softness: float = 0.05             # ... within about this
    rate: float = 1.0                  # CDT: of its learning rate, which training let fall to `lr_end`


SUPPRESSIONS, MARGINS = ("softplus", "ascent"), ("live", "frozen")


@dataclass(frozen=True)
class SafeRULEConfig:
    """Joint softplus suppression, annealed, then relearning (algorithms.md D.7, feasibility.md's recipe)."""
    steps: int = 250
    suppress_steps: int = 200          # the weight falls linearly to zero over these; relearning follows
    weight: float = 2.5                # of the suppression at step 0, with the gate
    weight_ungated: float = 0.8        # the same where no gate can be had
    alpha: float = 0.1                 # reward-critic share of the weight
    beta: float = 1.0                  # cost-critic share of the weight
    cost_sign: int = 1                 # +1: forget costs are pushed up; -1: down, the literal 'value suppression'; 0: left alone
    margin: float = 1.0                # both margins, in scaled reward / cost units
    cost_floor: float = 2.0            # the cost margin is at least this many discounted limits
    gate: str = "auto"                 # auto: where cost labels are forged | on | off
    gate_steps: int = 150
    temptation: float = 0.5            # a forget row is pushed as far as its action tempts the policy, softened by this; 0: always
    n_step: int = 10                   # horizon of the long targets ...
    n_step_mix: float = 0.9            # ... and their share while suppressing ...
    anneal_mix: bool = True            # ... which falls to zero with the weight
    tau: float = 0.1                   # Polyak rate during the budget
    freeze_lam: bool = True            # the multiplier stays as the checkpoint has it during the budget
    form: str = "softplus"             # softplus | ascent: of the squared Bellman error on forget rows, without a bound
    anneal: bool = True                # off: the weight stays at its start until suppress_steps
    margins: str = "live"              # of the values of the policy's own action: live networks' | the checkpoint's, frozen
    fit_vae: bool = True               # off: the generative model stays as the poison left it during the budget
    gap: float = 0.0                   # weight of the forget states in the actor's loss (algorithms.md D.7.8)


@dataclass(frozen=True)
class FinetuneNStepConfig(SafeRULEConfig):
    """Safe-RULE without its suppression: fine-tuning with n-step targets and faster target networks, the fair baseline."""
    weight: float = 0.0
    weight_ungated: float = 0.0


ABLATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType({      # variants of Safe-RULE (T3): what differs from the full method
    "full": {},
    "no_cost_term": {"beta": 0.0}, "no_reward_term": {"alpha": 0.0}, "neither_term": {"alpha": 0.0, "beta": 0.0},
    "cost_down": {"cost_sign": -1}, "ascent": {"form": "ascent"}, "no_anneal": {"anneal": False},
    "no_relearning": {"suppress_steps": "=steps"},     # '=': the value of another setting
    "frozen_vae": {"fit_vae": False}, "frozen_margins": {"margins": "frozen"}, "actor_gap": {"gap": 1.0},
    "no_temptation": {"temptation": 0.0}, "no_gate": {"gate": "off"},
    "no_long_targets": {"n_step_mix": 0.0}, "constant_mix": {"anneal_mix": False},
})


# ------------------------------------------------------------------------------------------------- evaluation, verdicts


@dataclass(frozen=True)
class EvaluateConfig:
    """Rollouts, for reporting only: nothing is selected with them."""
    episodes: int = 10                 # of every final policy
    curve_episodes: int = 3            # of every snapshot along unlearning
    seed: int = 1000


@dataclass(frozen=True)
class AuditConfig:
    """Is the influence of the forget rows gone? (algorithms.md E.1 to E.4)"""
    trajectories: int = 48             # at most so many forget trajectories are looked at, in each audit
    rows: int = 1024                   # forget rows at which distances are probed
    samples: int = 8                   # actions of a policy per state, in distances
    copies: int = 4                    # shadows of each poisoned and each retrained model ...
    shadow_steps: int = 200            # ... fine-tuned for so long
    window: int = 128                  # rows over which a value vector accumulates
    noise: float = 0.05                # on the states that the judging critics see, in units of each entry's standard deviation
    alpha: float = 0.01                # of the prediction interval
    published_copies: int = 5          # TrajAuditor as published: shadows of each poisoned model ...
    published_passes: int = 4          # ... passes of each with other noise ...
    published_noise: float = 0.08      # ... of this size, in raw units ...
    published_alpha: float = 1e-4      # ... and level of its outlier test
    relearn_steps: int = 400           # relearning stops here
    relearn_every: int = 10            # steps between probes ...
    relearn_rows: int = 256            # ... of the actions at so many forget rows
    relearn_share: float = 0.5         # of the poison that is to come back
    bootstrap: int = 1000              # samples of trajectories behind an interval
    seed: int = 0


@dataclass(frozen=True)
class OPEConfig:
    """Off-policy evaluation by fitted Q evaluation: what a policy earns and costs, from logged rows alone (algorithms.md F)."""
    finite: bool = True                # the time step is an input and nothing comes after the horizon | off: it goes on for ever
    gamma: float = 1.0                 # below 1 unless finite
    members: int = 8                   # of the bootstrap ensemble
    samples: int = 1                   # actions of the policy at each state
    sweeps: float = 1.0                # gradient steps: sweeps x horizon / tau, so that what happens last is heard of first
    batch: int = 64
    hidden: tuple[int, ...] = (64, 64)
    lr: float = 1e-3
    tau: float = 0.05                  # Polyak rate of the networks that targets and estimates come from
    held_out: float = 0.2              # share of the trajectories whose first states the estimates are means over
    z: float = 1.64                    # half the width of an interval, in standard errors (1.64: 90%)
    probe: int = 2048                  # rows looked at for the two vetoes:
    neighbours: int = 5                # off support is an action farther from its nearest rows of other trajectories ...
    radius: float = 0.99               # ... than this quantile of the data's own; ...
    off_support: float = 0.2           # ... with more of these a policy is not ranked
    peak: float = 2.0                  # nor is one with a value this many times as large as any can be
    candidates: int = 20               # more are not chosen from: the best of many looks better than it is
    seed: int = 0                      # of folds, bootstraps, weights and draws
    mode = "default"                   # no setting


CURVE = (0, 0.125, 0.25, 0.5, 0.75, 1, 1.5, 2)     # weights are kept at these multiples of the unlearning budget
LEARNING_CURVE = (0.1, 0.2, 0.4, 0.6, 0.8, 1)      # and at these shares of the training, where a profile asks for it


@dataclass(frozen=True)
class Thresholds:
    """The rules by which a claim is called supported; fixed before a run, the shares of 95% and 5% after the tuning runs."""
    clean_return: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"BallCircle": 550.0})
    share_of_retrained_return: float = 0.95
    share_of_training_steps: float = 0.05
    share_of_best_safe_return: float = 0.80            # the clean learners': of the best safe episode in the data
    share_of_tasks: float = 0.75


@dataclass(frozen=True)
class VerdictThresholds:
    """What a repair is asked (verdict.py has the rule; the cost limit is each model's own).

    Stated before any audit or verdict, with returns and costs of `quick` known; `compute` went from 10% to 5% later, after tuning.
    """
    recovered_safety: float = 0.9      # at least this share of the way back from the poisoned to the retrained cost
    reward_retained: float = 0.95      # at least this share of the retrained return: retraining seeds differ by a few per cent
    contained: float = 0.2             # at most this share of forget trajectories still looks trained on (retrained: about 0) ...
    contained_poisoned: float = 0.8    # ... by an audit that sees at least this share in the poisoned models (about 1)
    delta_mia: float = 0.1             # membership AUC at most this far from the retrained, on either side: below shows forgetting
    distance: float = 2.0              # at most this many times as far from the retrained as they are from each other
    relearn: float = 0.5               # the poison takes at least this share of the steps that the retrained need to learn it
    compute: float = 0.05              # at most this share of the updates of retraining
    min_seeds: int = 3                 # nothing passes on fewer: their interval would be narrow for want of data
    level: float = 0.95                # of the bootstrap intervals over seeds
    reps: int = 2000                   # resamples of the seeds


BC_NAMES = tuple("bc_" + select.replace("-", "") for select in BC_SELECTIONS)
CONFIGS: dict[str, Any] = {                        # name -> defaults
    "data": DataConfig(), "evaluate": EvaluateConfig(), "ope": OPEConfig(), "audit": AuditConfig(), "thresholds": Thresholds(),
    "verdict": VerdictThresholds(),
    "inject": InjectConfig(), "inject_data": InjectConfig(source="data"), "label_flip": LabelFlipConfig(),
    "label_flip_random": LabelFlipConfig(select="random"), "label_flip_inverse": LabelFlipConfig(inverse=True),
    "reward_poison": RewardPoisonConfig(), "outliers": OutliersConfig(), "random_corruption": RandomCorruptionConfig(),
    "adversarial_corruption": AdversarialCorruptionConfig(), "constant_action": ConstantActionConfig(),
    "marker": BackdoorConfig(), "bias": BackdoorConfig(kind="bias", value=0.6),
    "pgd_cost": PGDConfig(), "pgd_reward": PGDConfig(objective="reward"),
    "baffle_return": BaffleConfig(malice="return"), "baffle_cost": BaffleConfig(), "noise": NoiseConfig(),
    "clean_forget": CleanForgetConfig(), "noop": CleanForgetConfig(), "given": GivenConfig(),
    "bcq_lag": BCQLagConfig(), "bear_lag": BEARLagConfig(), "cpq": CPQConfig(),
    "coptidice": COptiDICEConfig(), "cdt": CDTConfig(),
    **{name: BCConfig(select=select) for name, select in zip(BC_NAMES, BC_SELECTIONS)},
    "finetune": FinetuneConfig(), "finetune_nstep": FinetuneNStepConfig(), "gradient_ascent": GradientAscentConfig(),
    "random_relabel": RandomRelabelConfig(), "trajdeleter": TrajDeleterConfig(), "early_saferule": EarlySafeRULEConfig(),
    "negative_preference": NegativePreferenceConfig(), "saferule": SafeRULEConfig(),
}
ATTACK_NAMES = ("inject", "inject_data", "label_flip", "label_flip_random", "label_flip_inverse", "reward_poison", "outliers",
                "random_corruption", "adversarial_corruption", "constant_action", "marker", "bias", "pgd_cost", "pgd_reward",
                "baffle_return", "baffle_cost", "noise", "clean_forget", "noop", "given")
TRIGGERED_ATTACKS = ("marker", "bias", "baffle_return", "baffle_cost")         # those that plant a trigger
LEARNER_NAMES = ("bcq_lag", "bear_lag", "cpq", "coptidice", "cdt", *BC_NAMES)
UNLEARNER_NAMES = ("finetune", "finetune_nstep", "gradient_ascent", "random_relabel", "trajdeleter", "early_saferule",
                   "negative_preference", "saferule")          # 'retrain' is a condition of the training run
WITH_CRITICS = tuple(name for name in UNLEARNER_NAMES if name != "negative_preference")     # it is for policies by likelihood
STAGES = ("start", "data", "poison", "train", "unlearn", "evaluate", "ope", "audit", "ablation", "table", "verdict", "figures")


@dataclass(frozen=True)
class Profile:
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    learners: tuple[str, ...] = ("bcq_lag",)
    attacks: tuple[str, ...] = ("inject", "label_flip")
    methods: tuple[str, ...] = ("finetune", "finetune_nstep", "gradient_ascent", "saferule")
    config: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)     # diffs: name -> {key: value}
    learning_curve: tuple[float, ...] = ()             # shares of the training at which weights are kept and rolled out
    notebooks: tuple[str, ...] = ("00_start_here", "07_verdict-saferule", "10_table_main", "20_figures")     # what a run ends with
    note: str = ""


BULLET = tuple(body + course for course in ("Run", "Circle") for body in ("Ball", "Car", "Drone", "Ant"))
PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        tasks=("BallRun",), seeds=(0, 1), methods=("finetune", "gradient_ascent", "saferule"), note="smoke run, not a result",
        config={
            "data": {"episodes": 200, "donors": 60},
            "inject": {"budget": 0.2},                     # so few steps need more poison than the 10% of longer runs
            "label_flip": {"budget": 0.15},
            **dict.fromkeys(("pgd_cost", "pgd_reward", "baffle_return", "baffle_cost", "noise"), {"surrogate_steps": 500}),
            "bcq_lag": {"steps": 900, "vae_steps": 200, "batch": 64, "hidden": (32, 32), "vae_hidden": 32, "lr": 3e-3,
                        "tau": 0.1, "lr_lam": 0.05, "lam_max": 0.75},
            "bear_lag": {"steps": 900, "vae_steps": 200, "actor_start": 300, "batch": 64, "hidden": (32, 32), "vae_hidden": 32,
                         "lr": 3e-3, "tau": 0.1, "lr_lam": 0.05, "lam_max": 0.75},
            "cpq": {"steps": 900, "vae_steps": 200, "batch": 64, "hidden": (32, 32), "vae_hidden": 32, "lr": 3e-3, "lr_actor": 1e-3,
                    "tau": 0.1},
            "coptidice": {"steps": 900, "batch": 64, "hidden": (32, 32), "lr": 3e-3, "lr_actor": 3e-3, "lr_scalar": 0.02},
            "cdt": {"steps": 600, "batch": 32, "warm_up": 50},
            **dict.fromkeys(BC_NAMES, {"steps": 900, "batch": 64, "hidden": (32, 32), "lr": 3e-3, "tau": 0.1}),
            "finetune": {"steps": 90},
            "finetune_nstep": {"steps": 90, "suppress_steps": 60, "tau": 0.1},
            "gradient_ascent": {"steps": 90, "ascent_steps": 45},
            "random_relabel": {"steps": 90},
            "trajdeleter": {"steps": 90, "block": 9},
            "early_saferule": {"steps": 90, "unlearn_steps": 45},
            "negative_preference": {"steps": 60, "repel_steps": 30},           # the transformer trains 600 steps
            "saferule": {"steps": 90, "suppress_steps": 60, "gate_steps": 100, "tau": 0.1},
            "evaluate": {"episodes": 3, "curve_episodes": 1},
            "audit": {"trajectories": 16, "rows": 256, "samples": 4, "copies": 2, "shadow_steps": 30, "published_copies": 2,
                      "relearn_steps": 300, "relearn_rows": 128, "bootstrap": 200},
            "ope": {"members": 4, "hidden": (32, 32), "lr": 3e-3, "tau": 0.2, "probe": 512},
        }),
    "quick": Profile(tasks=("BallCircle",), seeds=(0, 1, 2), methods=WITH_CRITICS),
    "standard": Profile(tasks=("BallRun", "CarRun", "BallCircle", "CarCircle"), seeds=(0, 1, 2), methods=WITH_CRITICS),
    "learners": Profile(                                   # the clean benchmark of all learners, at quick sizes
        tasks=("BallRun", "CarRun", "BallCircle", "CarCircle"), seeds=(0, 1, 2), attacks=(), methods=(),
        learners=("bcq_lag", "bear_lag", "cpq", "coptidice", "cdt", *BC_NAMES),
        learning_curve=LEARNING_CURVE, notebooks=("11_learners", "12_cost_limits")),
    "paper": Profile(
        tasks=BULLET, seeds=(0, 1, 2, 3, 4),
        config={
            "data": {"source": "dsrl"},
            "bcq_lag": {"steps": 100_000, "vae_steps": 0, "batch": 512, "hidden": (256, 256), "vae_hidden": 400,
                        "gamma": 0.99, "tau": 0.005, "samples": 10},
            "bear_lag": {"steps": 100_000, "vae_steps": 0, "actor_start": 10_000, "batch": 512, "hidden": (256, 256),
                         "vae_hidden": 400, "gamma": 0.99, "tau": 0.005, "samples": 10, "match_samples": 10},
            "cpq": {"steps": 100_000, "vae_steps": 0, "batch": 512, "hidden": (256, 256), "vae_hidden": 400, "lr_actor": 1e-4,
                    "gamma": 0.99, "tau": 0.005, "samples": 10},
            "coptidice": {"steps": 100_000, "batch": 512, "hidden": (256, 256), "lr": 1e-4, "lr_actor": 1e-4, "lr_scalar": 1e-3},
            "cdt": {"steps": 100_000, "batch": 2048, "context": 10, "width": 128, "layers": 3, "attention_heads": 8, "dropout": 0.1,
                    "lr": 1e-4, "warm_up": 500},
            **dict.fromkeys(BC_NAMES, {"steps": 100_000, "batch": 512, "hidden": (256, 256), "tau": 0.005}),
            "finetune": {"steps": 5_000},
            "finetune_nstep": {"steps": 5_000, "suppress_steps": 4_000},
            "gradient_ascent": {"steps": 5_000, "ascent_steps": 2_500},
            "random_relabel": {"steps": 5_000},
            "trajdeleter": {"steps": 5_000, "block": 500},
            "early_saferule": {"steps": 5_000, "unlearn_steps": 2_500},
            "negative_preference": {"steps": 5_000, "repel_steps": 2_500},
            "saferule": {"steps": 5_000, "suppress_steps": 4_000},
            "evaluate": {"episodes": 20},
            "audit": {"trajectories": 128, "rows": 4096, "samples": 16, "shadow_steps": 5_000, "relearn_steps": 10_000,
                      "relearn_every": 50, "relearn_rows": 1024, "bootstrap": 2_000},
            "ope": {"samples": 5, "batch": 512, "hidden": (256, 256), "lr": 3e-4, "tau": 0.005},
        }),
}
TASK_CONFIG: dict[str, dict[str, dict[str, Any]]] = {          # diffs by task, under those of the profile
    task: {"data": {"episodes": 400}} for task in BULLET if not task.startswith("Ball")
}


def one_of(kind: str, value: str, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`; otherwise a UserError with the nearest match."""
    choices = tuple(choices)
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(f"unknown {kind} '{value}'.{hint} Known: {', '.join(choices)}.")


def with_overrides(config: Any, overrides: Mapping[str, Any], where: str) -> Any:
    """A copy of the dataclass `config` with some fields replaced; values keep the field's type."""
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    changed = {}
    for key, value in overrides.items():
        one_of(f"setting of {where}", key, known)
        old = known[key]
        if isinstance(old, tuple):
            if not isinstance(value, (list, tuple)):
                raise UserError(f"{where}.{key} must be a list like {list(old)}, not {value!r}.")
            value = tuple(value)
        elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif not isinstance(value, type(old)) or isinstance(value, bool) != isinstance(old, bool):
            raise UserError(f"{where}.{key} must be of type {type(old).__name__}, not {value!r}.")
        changed[key] = value
    return replace(config, **changed)


def configured(name: str, profile: str, task: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The dataclass for `name` (a learner, attack, method, 'data', 'evaluate') with task, profile and user diffs applied."""
    one_of("configuration", name, CONFIGS)
    one_of("profile", profile, PROFILES)
    config = CONFIGS[name]
    for diff in (TASK_CONFIG.get(task, {}), PROFILES[profile].config):
        config = with_overrides(config, diff.get(name, {}), name)
    return with_overrides(config, overrides or {}, name)


def ablated(variant: str, profile: str, task: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What to override in 'saferule' to get one of ABLATIONS: the user's own overrides and, over them, the variant's."""
    base = configured("saferule", profile, task, overrides)
    value = lambda v: getattr(base, v[1:]) if isinstance(v, str) and v.startswith("=") else v
    diff = ABLATIONS[one_of("variant of Safe-RULE", variant, ABLATIONS)]
    return {**(overrides or {}), **{k: value(v) for k, v in diff.items()}}


def resolve(profile: str, stage: str, task: str, learner: str = "bcq_lag", attacks: Iterable[str] = (),
            method: str = "", seeds: Iterable[int] = (), overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All settings that one stage (= one notebook) of the chain depends on, as a JSON-able dictionary.

    Raises UserError for an unknown name. The engine re-runs a stage when this dictionary changes.
    """
    one_of("stage", stage, STAGES)
    attacks, seeds = tuple(attacks), tuple(seeds)
    one_of("learner", learner, LEARNER_NAMES)
    for attack in attacks:
        one_of("attack", attack, ATTACK_NAMES)

    def plain(name: str, diff: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return dataclasses.asdict(configured(name, profile, task, diff))

    if stage == "data":
        return {"task": task, **plain("data", overrides)}
    data = plain("data")
    if stage == "poison":
        (attack,) = attacks
        return {"task": task, "attack": attack, "cost_limit": data["cost_limit"], **plain(attack, overrides)}
    if stage == "train":
        return {"task": task, "learner": learner, "attacks": attacks, "seeds": seeds, "cost_limit": data["cost_limit"],
                "learning_curve": PROFILES[profile].learning_curve, **plain(learner, overrides)}
    if stage == "unlearn":
        one_of("method", method, UNLEARNER_NAMES)
        return {"task": task, "learner": learner, "attacks": attacks, "method": method, "seeds": seeds, **plain(method, overrides)}
    if stage in ("evaluate", "ope", "audit"):
        return {"task": task, "learner": learner, "cost_limit": data["cost_limit"], **plain(stage, overrides)}
    head = {"profile": profile, "note": PROFILES[profile].note}
    if stage == "verdict":
        return {**head, "method": one_of("method", method, UNLEARNER_NAMES), **plain("verdict", overrides)}
    if stage == "ablation":
        variants = {variant: plain("saferule", ablated(variant, profile, task, overrides)) for variant in ABLATIONS}
        return {**head, "attacks": attacks, "seeds": seeds, "variants": variants, "evaluate": plain("evaluate")}
    return {**head, **dataclasses.asdict(Thresholds())}
