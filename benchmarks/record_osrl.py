"""Record golden updates from a checkout of OSRL: `python benchmarks/record_osrl.py --osrl PATH [--out tests/data]`.

Three consecutive updates of OSRL's BCQ-Lag from weights, batches and noise made by fixed formulas (tests/golden.py): losses,
multiplier, and checksums of every parameter. OSRL's logger and data packages are replaced by empty modules; none of its code
is copied. Re-recording with revision 03a4586 reproduces the committed file up to the last digits of float32.
"""
from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import golden  # noqa: E402


def load_osrl(path: Path):
    """OSRL's bcql module, without running its packages' __init__ (they import simulators and loggers)."""
    stub = types.ModuleType("fsrl.utils")
    stub.DummyLogger = stub.WandbLogger = type("DummyLogger", (), {"store": lambda self, **_: None})
    sys.modules.update({"fsrl": types.ModuleType("fsrl"), "fsrl.utils": stub})
    for name in ("osrl", "osrl.algorithms", "osrl.common"):
        package = types.ModuleType(name)
        package.__path__ = [str(path / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module("osrl.algorithms.bcql")


def record_bcq_lag(path: Path) -> dict:
    z, module = golden.SIZES, load_osrl(path)
    hidden = list(z["hidden"])
    model = module.BCQL(z["n_obs"], z["n_act"], 1.0, hidden, hidden, z["vae_hidden"], z["samples"], z["gamma"], z["tau"],
                        num_q=z["heads"], num_qc=z["heads"], cost_limit=z["cost_limit"], episode_len=z["horizon"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden.weight(name.replace("_old.", "."), tuple(p.shape)))             # targets start equal
    trainer = module.BCQLTrainer(model, env=None, actor_lr=z["lr"], critic_lr=z["lr"], vae_lr=z["lr"])
    stored: dict[str, float] = {}
    trainer.logger.store = lambda **scalars: stored.update(scalars)
    noise, steps = golden.Noise(), []
    with mock.patch("torch.randn", noise), mock.patch("torch.randn_like", lambda t: noise(*t.shape)):
        for t in range(z["steps"]):
            b = golden.batch(t, z["batch"], z["n_obs"], z["n_act"])
            trainer.train_one_step(b["obs"], b["next_obs"], b["action"], b["reward"], b["cost"], b["done"])
            steps.append({"vae": stored["loss/loss_vae"], "critic": stored["loss/critic_loss"],
                          "cost_critic": stored["loss/cost_critic_loss"], "actor": stored["loss/actor_loss"],
                          "lam": stored["loss/lagrangian"], "parameters": golden.checksums(dict(model.named_parameters()))})
    return {"steps": steps, "noise_calls": noise.calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--osrl", type=Path, required=True, help="a checkout of OSRL")
    parser.add_argument("--revision", default="", help="its revision, where the checkout has no .git")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests" / "data")
    args = parser.parse_args()
    git = subprocess.run(["git", "-C", args.osrl, "rev-parse", "HEAD"], capture_output=True, text=True)
    revision = args.revision or git.stdout.strip()
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"source": "liuzuxin/OSRL", "revision": revision, "torch": torch.__version__, "sizes": golden.SIZES,
               **record_bcq_lag(args.osrl)}
    (args.out / "osrl_bcq_lag.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"three updates of BCQ-Lag recorded from {revision[:7]}")


if __name__ == "__main__":
    main()
