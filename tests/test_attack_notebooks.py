"""Every attack by name through the notebooks: 02_poison, 03_train, 04_unlearn, 05_evaluate, with tiny settings."""
import contextlib
import io
import json

import pytest

from saferule.artifacts import load
from saferule.config import ATTACK_NAMES, CONFIGS, TRIGGERED_ATTACKS
from saferule.files import run_dir
from saferule.notebook import declared, run_notebook
from saferule.sources import NOTEBOOKS, read_cells

pytestmark = pytest.mark.slow
ATTACKS = [name for name in ATTACK_NAMES if name != "given"]
TINY = {"01_data": {"episodes": 40, "donors": 16},
        "03_train": {"steps": 30, "vae_steps": 10, "batch": 16, "hidden": [8], "vae_hidden": 8},
        "04_unlearn": {"steps": 6, "suppress_steps": 4, "gate_steps": 5}, "05_evaluate": {"episodes": 1, "curve_episodes": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all chapters of this file read and write; the data are there."""
    folder = tmp_path_factory.mktemp("chapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERULE_RESULTS", str(folder / "results"))
        patch.setenv("WANDB_MODE", "disabled")
        execute("01_data")
        yield folder


def execute(name, **parameters):
    """Runs the notebook's cells in this process, which is much faster than a kernel for each; returns what they print."""
    path, said = NOTEBOOKS / f"{name}.ipynb", io.StringIO()
    settings = {**TINY.get(name, {}), **parameters.pop("overrides", {})}
    space = {**declared(path), **parameters, "overrides": settings, "display": lambda *shown: print(*shown)}
    with contextlib.redirect_stdout(said):
        for source, tags in read_cells(path):
            if "parameters" not in tags:
                exec(compile(source, f"{name}.ipynb", "exec"), space)
    return said.getvalue()


def executed(folder, name, **parameters):
    """The same in a kernel of its own: 04_unlearn checks that no simulator has been imported."""
    out = folder / f"{name}.ipynb"
    run_notebook(NOTEBOOKS / f"{name}.ipynb", out, {**parameters, "overrides": repr(TINY[name])})
    outputs = [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", ())]
    return "".join(sum((o.get("text", []) for o in outputs), []))


@pytest.mark.parametrize("attack", ATTACKS)
def test_poison(folder, attack):
    tiny = {"surrogate_steps": 20} if "surrogate_steps" in CONFIGS[attack].__dataclass_fields__ else {}
    said = execute("02_poison", attack=attack, overrides=tiny)
    assert "all checks hold" in said and f"poison/BallRun-{attack} " in said


def test_all_attacks_trained_on_unlearned_and_evaluated(folder):
    """One stacked run with a victim of every attack; those with a trigger are shown with and without it."""
    assert "all checks hold" in execute("03_train", attacks=",".join(ATTACKS), seeds="0")
    assert "all checks hold" in executed(folder, "04_unlearn")
    said = execute("05_evaluate", methods="saferule")
    assert "all checks hold" in said and "follows the trigger" in said
    made = load("evaluate", "BallRun-bcq_lag", run_dir("smoke"))
    runs, episodes = made.table("runs.csv"), made.table("episodes.csv")
    assert {(a, m) for a, m in zip(runs.attack, runs.method)} == {("none", "clean"), *(
        (a, m) for a in ATTACKS for m in ("poisoned", "retrain", "saferule"))}
    assert set(episodes[episodes.stage == "triggered"].trigger) == set(TRIGGERED_ATTACKS)


def test_given_rows(folder):
    suspects = folder / "suspects.csv"
    suspects.write_text("row,weight\n" + "".join(f"{row},0.5\n" for row in range(200, 400)))
    assert "all checks hold" in execute("02_poison", attack="given", overrides={"forget_file": str(suspects)})
    assert "all checks hold" in execute("03_train", attacks="given", seeds="0")
    assert "all checks hold" in executed(folder, "04_unlearn")
    said = execute("05_evaluate", methods="saferule")
    assert "all checks hold" in said and "None of these attacks has a trigger: given." in said
