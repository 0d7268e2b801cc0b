# The DAG of notebooks. `saferule reproduce` (saferule/engine.py) starts it inside results/runs/<profile>, so paths are
# relative to that; --config gives profile, device, seeds, tasks and, in tests, the notebooks' folder.
#
# A rule runs again when its resolved settings, its notebook's code, a module behind that, or an input changes; the first
# three are its `params`. The device is not: it says where work that is still to be done runs, not what is done.
import json
import sys
from itertools import product
from pathlib import Path

from saferule import config as settings
from saferule.notebook import declared, listed, parse_seeds
from saferule.sources import NOTEBOOKS, PRESENTATION, digest

PROFILE = config["profile"]
PRESET = settings.PROFILES[PROFILE]
TASKS = listed(config.get("tasks", "")) or PRESET.tasks
SEEDS = parse_seeds(config.get("seeds", "")) or PRESET.seeds
LEARNERS, ATTACKS, METHODS = PRESET.learners, PRESET.attacks, PRESET.methods
FOLDER = Path(config.get("notebooks", NOTEBOOKS))
EVERYTHING = {"tasks": TASKS, "learners": LEARNERS, "attacks": ATTACKS, "methods": METHODS, "seeds": SEEDS}


def resolved(stage, **given):
    """All that decides what a stage does, as one string: snakemake remembers it and compares."""
    def params(wildcards):
        values = {"task": TASKS[0], "attacks": ATTACKS, "seeds": SEEDS, **wildcards, **given}
        if "attack" in values:
            values["attacks"] = (values.pop("attack"),)
        return json.dumps(settings.resolve(PROFILE, stage, **values), sort_keys=True)
    return params


def code(name):
    """A digest of the notebook and of every module behind it."""
    return digest(FOLDER / f"{name}.ipynb")


def stage_code(name):
    """The same for a notebook that makes what others need: how its results are drawn does not count."""
    return digest(FOLDER / f"{name}.ipynb", without=PRESENTATION)


def run(name, *wildcards):
    """The command that executes a notebook: of profile, device, wildcards and lists it gets those that it declares."""
    given = {"profile": PROFILE, "device": config["device"]}
    given |= {key: ",".join(map(str, values)) for key, values in EVERYTHING.items()}
    given |= {key: "{wildcards.%s}" % key for key in wildcards}
    given = "".join(f" -p {key} '{given[key]}'" for key in declared(FOLDER / f"{name}.ipynb") if key in given)
    return f"exec '{sys.executable}' -m saferule notebook --engine '{FOLDER}/{name}.ipynb' {{output.notebook}}{given}"


def artefact(kind, *name):
    return f"artifacts/{kind}/{'-'.join(name)}/manifest.json"


def artefacts(kind, *names):
    return [artefact(kind, *name) for name in product(*names)]


wildcard_constraints:
    task="[A-Za-z0-9]+", learner="[a-z0-9_]+", attack="[a-z0-9_]+", method="[a-z0-9_]+",


rule all:
    input: expand("notebooks/{name}.ipynb", name=PRESET.notebooks)


rule start:
    output: notebook="notebooks/00_start_here.ipynb"
    params: settings=resolved("start"), code=code("00_start_here")
    shell: run("00_start_here")


rule data:
    output: artefact("data", "{task}"), notebook="notebooks/01_data-{task}.ipynb"
    params: settings=resolved("data"), code=stage_code("01_data")
    threads: workflow.cores                                # its simulators use every core
    shell: run("01_data", "task")


rule poison:
    input: artefact("data", "{task}")
    output: artefact("poison", "{task}", "{attack}"), notebook="notebooks/02_poison-{task}-{attack}.ipynb"
    params: settings=resolved("poison"), code=stage_code("02_poison")
    shell: run("02_poison", "task", "attack")


rule train:
    input: artefact("data", "{task}"), artefacts("poison", ["{task}"], ATTACKS)
    output: artefact("train", "{task}", "{learner}"), notebook="notebooks/03_train-{task}-{learner}.ipynb"
    params: settings=resolved("train"), code=stage_code("03_train")
    shell: run("03_train", "task", "learner")


rule unlearn:
    input: artefact("train", "{task}", "{learner}"), artefacts("poison", ["{task}"], ATTACKS)
    output: artefact("unlearn", "{task}", "{learner}", "{method}"), notebook="notebooks/04_unlearn-{task}-{learner}-{method}.ipynb"
    params: settings=resolved("unlearn"), code=stage_code("04_unlearn")
    shell: run("04_unlearn", "task", "learner", "method")


rule evaluate:
    input:
        artefact("train", "{task}", "{learner}"), artefacts("unlearn", ["{task}"], ["{learner}"], METHODS),
        artefacts("poison", ["{task}"], [attack for attack in ATTACKS if attack in settings.TRIGGERED_ATTACKS]),
    output: artefact("evaluate", "{task}", "{learner}"), notebook="notebooks/05_evaluate-{task}-{learner}.ipynb"
    params: settings=resolved("evaluate"), code=stage_code("05_evaluate")
    threads: workflow.cores
    shell: run("05_evaluate", "task", "learner")


rule audit:
    input: artefact("train", "{task}", "{learner}"), artefacts("unlearn", ["{task}"], ["{learner}"], METHODS)
    output: artefact("audit", "{task}", "{learner}"), notebook="notebooks/06_audit-{task}-{learner}.ipynb"
    params: settings=resolved("audit"), code=code("06_audit")
    shell: run("06_audit", "task", "learner")


rule forgetting:                                           # every audit of the profile, and with them T5; no profile ends with it
    input: artefacts("audit", TASKS, LEARNERS)


rule verdict:
    input:
        artefacts("evaluate", TASKS, LEARNERS),
        audits=lambda wildcards: [path for path in artefacts("audit", TASKS, LEARNERS) if Path(path).exists()],
    output: artefact("verdict", "{method}"), notebook="notebooks/07_verdict-{method}.ipynb"
    params: settings=resolved("verdict"), code=code("07_verdict")
    shell: run("07_verdict", "method")


rule table_main:
    input: artefacts("evaluate", TASKS, LEARNERS)
    output: "tables/T1_main.csv", notebook="notebooks/10_table_main.ipynb"
    params: settings=resolved("table"), code=code("10_table_main")
    shell: run("10_table_main")


rule table_learners:
    input: artefacts("evaluate", TASKS, LEARNERS)
    output: "tables/T0_learners.csv", notebook="notebooks/11_learners.ipynb"
    params: settings=resolved("table"), code=code("11_learners")
    shell: run("11_learners")


rule cost_limits:
    input: artefacts("evaluate", TASKS, LEARNERS)
    output: "tables/T0_cost_limits.csv", notebook="notebooks/12_cost_limits.ipynb"
    params: settings=resolved("table"), code=code("12_cost_limits")
    shell: run("12_cost_limits")


rule ablation:
    input:
        artefacts("train", TASKS, LEARNERS), artefacts("poison", TASKS, ATTACKS),
        artefacts("unlearn", TASKS, LEARNERS, ["saferule"]),
    output: "tables/T3_ablation.csv", notebook="notebooks/13_ablation.ipynb"
    params: settings=resolved("ablation"), code=code("13_ablation")
    threads: workflow.cores
    shell: run("13_ablation")


rule off_policy:                                           # no profile ends with it: FLAGS=off_policy
    input: artefacts("evaluate", TASKS, LEARNERS)
    output: "tables/T_ope.csv", notebook="notebooks/14_off_policy.ipynb"
    params: settings=resolved("ope"), code=code("14_off_policy")
    shell: run("14_off_policy")


rule figures:
    input: artefacts("evaluate", TASKS, LEARNERS), artefacts("poison", TASKS, ATTACKS)
    output: notebook="notebooks/20_figures.ipynb"
    params: settings=resolved("figures"), code=code("20_figures")
    shell: run("20_figures")
