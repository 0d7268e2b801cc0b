"""Record golden updates from a checkout of OSRL: `python benchmarks/record_osrl.py --osrl PATH [--out tests/data]`.

Three consecutive updates of OSRL's learners from weights, batches and noise made by fixed formulas (tests/golden.py): losses,
multipliers, and checksums of every parameter; which rows its behaviour cloning selects; and the layout and settings of the
checkpoints that it saves, with what such a model does. OSRL's logger is replaced by an empty module and its Pareto package by a
few lines of our own; none of its code is copied. Re-recording with revision 03a4586 reproduces the committed files up to the
last digits of float32.
"""
from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import golden  # noqa: E402


class Pareto:
    """Stands in for oapackage.ParetoDoubleLong: the indices of the points that no other point beats in both coordinates."""

    def __init__(self) -> None:
        self.points: list[tuple[tuple[float, ...], int]] = []

    def addvalue(self, point: tuple[float, ...], index: int) -> None:
        self.points.append((point, index))

    def show(self, verbose: int = 0) -> None:
        pass

    def allindices(self) -> list[int]:
        beats = lambda p, q: p != q and all(a >= b for a, b in zip(p, q))
        return [i for q, i in self.points if not any(beats(p, q) for p, _ in self.points)]


def load_osrl(path: Path, module: str = "algorithms.bcql"):
    """A module of OSRL, without running its packages' __init__ (they import simulators and loggers)."""
    stub = types.ModuleType("fsrl.utils")
    stub.DummyLogger = stub.WandbLogger = type("DummyLogger", (), {"store": lambda self, **_: None})
    sys.modules.update({"fsrl": types.ModuleType("fsrl"), "fsrl.utils": stub})
    for name in ("osrl", "osrl.algorithms", "osrl.common"):
        package = types.ModuleType(name)
        package.__path__ = [str(path / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["oapackage"] = types.SimpleNamespace(ParetoDoubleLong=Pareto, doubleVector=tuple)
    return importlib.import_module(f"osrl.{module}")


def start(model: torch.nn.Module) -> None:
    """Every weight by its formula; targets start equal."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden.weight(name.replace("_old.", "."), tuple(p.shape)))


def updates(trainer, scalars: dict[str, str]) -> dict:
    """Consecutive updates of a trainer whose model has been started; scalars: our name -> what OSRL logs it as."""
    z, stored, noise, steps = golden.SIZES, {}, golden.Noise(), []
    trainer.logger.store = lambda **logged: stored.update(logged)
    with mock.patch("torch.randn", noise), mock.patch("torch.randn_like", lambda t: noise(*t.shape)), \
            mock.patch("torch.distributions.normal._standard_normal", lambda shape, dtype, device: noise(*shape)):
        for t in range(z["steps"]):
            b = golden.batch(t, z["batch"], z["n_obs"], z["n_act"])
            trainer.train_one_step(b["obs"], b["next_obs"], b["action"], b["reward"], b["cost"], b["done"])
            steps.append({**{ours: stored[f"loss/{theirs}"] for ours, theirs in scalars.items()},
                          "parameters": golden.checksums(dict(trainer.model.named_parameters()))})
    return {"steps": steps, "noise_calls": noise.calls}


LOGGED = {"vae": "loss_vae", "critic": "critic_loss", "cost_critic": "cost_critic_loss", "actor": "actor_loss", "lam": "lagrangian"}


def record_bcq_lag(path: Path) -> dict:
    z, module = golden.SIZES, load_osrl(path)
    hidden = list(z["hidden"])
    model = module.BCQL(z["n_obs"], z["n_act"], 1.0, hidden, hidden, z["vae_hidden"], z["samples"], z["gamma"], z["tau"],
                        num_q=z["heads"], num_qc=z["heads"], cost_limit=z["cost_limit"], episode_len=z["horizon"])
    start(model)
    return updates(module.BCQLTrainer(model, env=None, actor_lr=z["lr"], critic_lr=z["lr"], vae_lr=z["lr"]), LOGGED)


def record_bear_lag(path: Path) -> dict:
    z, more, module = golden.SIZES, golden.BEAR, load_osrl(path, "algorithms.bearl")
    hidden = list(z["hidden"])
    model = module.BEARL(z["n_obs"], z["n_act"], 1.0, hidden, hidden, z["vae_hidden"], z["samples"], z["gamma"], z["tau"],
                         mmd_sigma=more["mmd_sigma"], target_mmd_thresh=more["mmd_limit"],
                         num_samples_mmd_match=more["match_samples"], start_update_policy_step=more["actor_start"],
                         num_q=z["heads"], num_qc=z["heads"], cost_limit=z["cost_limit"], episode_len=z["horizon"])
    start(model)
    trainer = module.BEARLTrainer(model, env=None, actor_lr=z["lr"], critic_lr=z["lr"], alpha_lr=more["lr_alpha"], vae_lr=z["lr"])
    return {"settings": more, **updates(trainer, {**LOGGED, "mmd": "mmd_loss", "alpha": "alpha_value"})}


def record_cpq(path: Path) -> dict:
    z, more, module = golden.SIZES, golden.CPQ, load_osrl(path, "algorithms.cpq")
    hidden = list(z["hidden"])
    model = module.CPQ(z["n_obs"], z["n_act"], 1.0, hidden, hidden, z["vae_hidden"], z["samples"], z["gamma"], z["tau"], beta=0.5,
                       num_q=z["heads"], num_qc=z["heads"], qc_scalar=more["ood_limit"], cost_limit=golden.CPQ_COST_LIMIT,
                       episode_len=z["horizon"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden.weight(name.replace("_old.", "."), tuple(p.shape)))             # targets start equal
    trainer = module.CPQTrainer(model, env=None, actor_lr=more["lr_actor"], critic_lr=z["lr"], alpha_lr=more["lr_alpha"],
                                vae_lr=z["lr"])
    stored: dict[str, float] = {}
    trainer.logger.store = lambda **scalars: stored.update(scalars)
    noise, steps = golden.Noise(), []
    used = itertools.cycle([True, True, True, False, True, False, True])       # of two draws per step OSRL makes no use

    def draw(*shape: int) -> torch.Tensor:
        return noise(*shape) if next(used) else torch.zeros(shape)

    with mock.patch("torch.randn_like", lambda t: draw(*t.shape)), \
            mock.patch("torch.normal", lambda mean, std: mean + std * draw(*mean.shape)), \
            mock.patch("torch.distributions.normal._standard_normal", lambda shape, dtype, device: draw(*shape)):
        for t in range(z["steps"]):
            b = golden.batch(t, z["batch"], z["n_obs"], z["n_act"])
            trainer.train_one_step(b["obs"], b["next_obs"], b["action"], b["reward"], b["cost"], b["done"])
            parameters = {name: p for name, p in model.named_parameters() if not name.startswith("actor_old.")}   # never used
            steps.append({"vae": stored["loss/loss_vae"], "critic": stored["loss/critic_loss"],
                          "cost_critic": stored["loss/cost_critic_loss"], "actor": stored["loss/actor_loss"],
                          "alpha": stored["loss/alpha_value"], "parameters": golden.checksums(parameters)})
    return {"settings": more, "cost_limit": golden.CPQ_COST_LIMIT, "steps": steps, "noise_calls": noise.calls}


def record_coptidice(path: Path) -> dict:
    z, more, module = golden.SIZES, golden.COPTIDICE, load_osrl(path, "algorithms.coptidice")
    hidden, known = list(z["hidden"]), golden.measured(z["n_obs"], z["n_act"])
    model = module.COptiDICE(z["n_obs"], z["n_act"], 1.0, more["divergence"], known["p0"],
                             np.array([known["obs_spread"]], np.float32), np.array([known["action_spread"]], np.float32),
                             hidden, hidden, z["gamma"], more["alpha"], more["kl_limit"], z["heads"], z["heads"],
                             golden.COPTIDICE_COST_LIMIT, z["horizon"])
    start(model)
    trainer = module.COptiDICETrainer(model, env=None, actor_lr=more["lr_actor"], critic_lr=z["lr"], scalar_lr=more["lr_scalar"])
    logged = {"chi": "chi_loss", "temperature": "tau_loss", "nu": "nu_loss", "multiplier": "lmbda_loss", "actor": "actor_loss",
              "lam": "lmbda", "tau": "tau", "kl": "D_kl"}
    stored: dict[str, float] = {}
    trainer.logger.store = lambda **scalars: stored.update(scalars)
    noise, steps = golden.Noise(), []
    with mock.patch("torch.randn_like", lambda t: noise(*t.shape)), \
            mock.patch("torch.distributions.normal._standard_normal", lambda shape, dtype, device: torch.zeros(shape)):   # unused
        for t in range(z["steps"]):
            b = golden.batch(t, z["batch"], z["n_obs"], z["n_act"])
            trainer.train_one_step([b["obs"], b["next_obs"], b["action"], b["reward"], b["cost"], b["done"],
                                    golden.starts(t, z["batch"])])
            scalars = {"lmbda": model.lmbda, "tau": model.tau}                     # OSRL does not register them as parameters
            steps.append({**{ours: stored[f"loss/{theirs}"] for ours, theirs in logged.items()},
                          "parameters": golden.checksums({**dict(model.named_parameters()), **scalars})})
    return {"settings": more, "cost_limit": golden.COPTIDICE_COST_LIMIT, "measured": known, "steps": steps,
            "noise_calls": noise.calls}


def record_cdt(path: Path) -> dict:
    """Without dropout: its masks come from torch's own generator, which no formula stands in for."""
    z, more, module = golden.SIZES, golden.CDT, load_osrl(path, "algorithms.cdt")
    model = module.CDT(z["n_obs"], z["n_act"], 1.0, seq_len=more["context"], episode_len=z["horizon"], embedding_dim=more["width"],
                       num_layers=more["layers"], num_heads=more["attention_heads"], use_rew=True, use_cost=True,
                       cost_transform=True, stochastic=True, init_temperature=more["temperature"], target_entropy=-z["n_act"])
    start(model)
    trainer, steps = module.CDTTrainer(model, env=None, learning_rate=more["lr"], weight_decay=more["weight_decay"],
                                       clip_grad=more["clip"], lr_warmup_steps=more["warm_up"],
                                       loss_cost_weight=more["cost_weight"]), []
    stored: dict[str, float] = {}
    trainer.logger.store = lambda **scalars: stored.update(scalars)
    for t in range(z["steps"]):
        b = golden.windows(t, z["batch"], more["context"], z["n_obs"], z["n_act"])
        trainer.train_one_step(b["obs"], b["action"], b["ret"], b["cost_to_go"], b["t"], b["mask"], None, b["cost"])
        steps.append({"policy": stored["all_loss"], "likelihood": -stored["nll"], "entropy": stored["ent"],
                      "cost_loss": stored["cost_loss"], "temperature": model.temperature().item(),
                      "parameters": golden.checksums(dict(model.named_parameters()))})
    return {"settings": more, "steps": steps}


def record_bc(path: Path) -> dict:
    z, module = golden.SIZES, load_osrl(path, "algorithms.bc")
    model = module.BC(z["n_obs"], z["n_act"], 1.0, list(z["hidden"]), z["horizon"])
    start(model)
    trainer, steps = module.BCTrainer(model, env=None, actor_lr=z["lr"]), []
    stored: dict[str, float] = {}
    trainer.logger.store = lambda **scalars: stored.update(scalars)
    for t in range(z["steps"]):
        b = golden.batch(t, z["batch"], z["n_obs"], z["n_act"])
        trainer.train_one_step(b["obs"], b["action"])
        steps.append({"actor": stored["loss/actor_loss"], "parameters": golden.checksums(dict(model.named_parameters()))})
    process, limit, selected = load_osrl(path, "common.dataset").process_bc_dataset, 12.0, {}
    for mode in ("all", "safe", "risky", "frontier", "boundary", "multi-task"):
        names = {"observations": "obs", "actions": "action", "rewards": "reward", "costs": "cost", "terminals": "terminal",
                 "timeouts": "timeout"}
        data = {theirs: golden.trajectories()[ours].numpy() for theirs, ours in names.items()}
        data["rows"] = np.arange(len(data["rewards"]))
        process(data, limit, 1.0, mode)
        selected[mode] = {"rows": data["rows"].tolist()}
        if mode == "multi-task":
            selected[mode]["costs"] = data["observations"][:, -1].tolist()
    return {"steps": steps, "selection_limit": limit, "selected": selected}


RECORDERS = {"bcq_lag": record_bcq_lag, "bear_lag": record_bear_lag, "cpq": record_cpq, "coptidice": record_coptidice,
             "cdt": record_cdt, "bc": record_bc}


# ----------------------------------------------------------------------- checkpoints: their layout, and how a model of it acts
LAYOUTS = {"bc_all": ("bc", {"bc_mode": "all"}), "bc_multitask": ("bc", {"bc_mode": "multi-task"}), "bcq_lag": ("bcql", {}),
           "bear_lag": ("bearl", {}), "cpq": ("cpq", {}),
           "cdt": ("cdt", {"embedding_dim": 12, "num_layers": 2, "num_heads": 2, "seq_len": 4, "device": "cpu"})}


def osrl_config(path: Path, kind: str, task: str, **changes) -> dict:
    """The settings that OSRL's training script saves for a task, changed as by its command line."""
    field = lambda default, is_mutable: dataclasses.field(default_factory=lambda: default)
    sys.modules["pyrallis"] = types.SimpleNamespace(field=field)
    for name in ("examples", "examples.configs"):
        package = types.ModuleType(name)
        package.__path__ = [str(path / name.replace(".", "/"))]
        sys.modules[name] = package
    module = importlib.import_module(f"examples.configs.{kind}_configs")
    config = dataclasses.asdict(getattr(module, f"{kind.upper()}_DEFAULT_CONFIG")[task]())
    small = {"a_hidden_sizes": list(golden.SIZES["hidden"]), "c_hidden_sizes": list(golden.SIZES["hidden"]),
             "vae_hidden_sizes": golden.SIZES["vae_hidden"]}
    return {**config, **{k: v for k, v in small.items() if k in config}, **changes, "name": "recorded"}


class FakeEnv:
    """Stands in for an environment: what it says depends on the step alone. Rewards are scaled, as OSRL's wrapper does."""

    def __init__(self, reward_scale: float, n_obs: int):
        self.script, self.scale, self.actions = golden.episode(n_obs), reward_scale, []

    def reset(self):
        return self.script["obs"][0].numpy(), {}

    def step(self, action: np.ndarray):
        self.actions.append(action.tolist())
        t = len(self.actions)
        ended = t == len(self.script["reward"])
        return (self.script["obs"][t].numpy(), float(self.script["reward"][t - 1]) * self.scale, ended, False,
                {"cost": float(self.script["cost"][t - 1])})


def played(path: Path, name: str, config: dict, weights, n_obs: int = 8, n_act: int = 2) -> tuple[list, list, int]:
    """A model built as OSRL's scripts do, in an episode that a script plays: layout (name, shape, type) of its state dictionary,
    its actions, and how often it drew noise. weights: layout -> state dictionary."""
    kind = LAYOUTS[name][0]
    module = load_osrl(path, f"algorithms.{kind}")
    known = inspect.signature(getattr(module, kind.upper())).parameters
    settings = {k: v for k, v in config.items() if k in known}
    if kind == "cdt":
        settings["target_entropy"] = -n_act
    model = getattr(module, kind.upper())(n_obs + (name == "bc_multitask"), n_act, 1.0, **settings)
    layout = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in model.state_dict().items()]
    model.load_state_dict(weights(layout))
    more = {k: config[k] for k in ("reward_scale", "cost_scale", "cost_reverse", "bc_mode", "cost_limit")
            if k in config and k in inspect.signature(getattr(module, f"{kind.upper()}Trainer")).parameters}
    if kind in ("bcql", "bearl", "cpq"):
        model.setup_optimizers = lambda *rates: None
    env, noise = FakeEnv(config.get("reward_scale", 1.0), n_obs), golden.Noise()
    trainer = getattr(module, f"{kind.upper()}Trainer")(model.eval(), env, **more)
    asked = config["target_returns"][0] if kind == "cdt" else ()                                # as its evaluate does
    target = [model, env, *(x * config[scale] for x, scale in zip(asked, ("reward_scale", "cost_scale")))] if asked else []
    with mock.patch("torch.randn", noise), torch.no_grad():
        trainer.rollout(*target)
    return layout, env.actions, noise.calls


def record_layout(path: Path, name: str, task: str = "OfflineBallCircle-v0") -> dict:
    """What OSRL saves: its state dictionary's layout and its config.yaml; and how the model acts with weights by formula."""
    kind, changes = LAYOUTS[name]
    config = osrl_config(path, kind, task, **changes)
    layout, actions, noise_calls = played(path, name, config, golden.state)
    text = yaml.dump(config, default_flow_style=False, indent=4, sort_keys=False)              # as its logger writes it
    return {"config": text, "layout": layout, "actions": actions, "noise_calls": noise_calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--osrl", type=Path, required=True, help="a checkout of OSRL")
    parser.add_argument("--revision", default="", help="its revision, where the checkout has no .git")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests" / "data")
    args = parser.parse_args()
    git = subprocess.run(["git", "-C", args.osrl, "rev-parse", "HEAD"], capture_output=True, text=True)
    revision = args.revision or git.stdout.strip()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, record in RECORDERS.items():
        content = {"source": "liuzuxin/OSRL", "revision": revision, "torch": torch.__version__, "sizes": golden.SIZES,
                   **record(args.osrl)}
        (args.out / f"osrl_{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"three updates of {name} recorded from {revision[:7]}")
    for name in LAYOUTS:
        content = {"source": "liuzuxin/OSRL", "revision": revision, "torch": torch.__version__, **record_layout(args.osrl, name)}
        (args.out / f"osrl_layout_{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"layout of {name}'s checkpoints recorded from {revision[:7]}")


if __name__ == "__main__":
    main()
