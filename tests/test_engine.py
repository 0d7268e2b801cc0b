"""The engine: what a change re-runs, what a kill leaves, and that a second call does nothing."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from test_cli import write_notebook

from saferule import engine
from saferule.config import PROFILES
from saferule.sources import PACKAGE, PRESENTATION, closure, digest, imports, lazy_exports

LISTS = 'task = "BallRun"\nlearner = "bcq_lag"\nattacks = ""\nmethod = "saferule"\nseeds = "0,1"\ndevice = "cpu"'
PARAMETERS = {"00_start_here": "", "01_data": 'task = "BallRun"', "02_poison": 'task = "BallRun"\nattack = "inject"',
              "03_train": LISTS, "04_unlearn": LISTS, "05_evaluate": LISTS, "06_audit": LISTS,
              "07_verdict": 'method = "saferule"', "10_table_main": "", "11_learners": 'learners = ""', "12_cost_limits": "",
              "13_ablation": 'attacks = ""', "14_off_policy": 'seeds = ""', "20_figures": 'tasks = ""'}


@pytest.fixture
def chapters(tmp_path):
    """Notebooks with the real names and parameters that do nothing."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name, parameters in PARAMETERS.items():
        write_notebook(folder / f"{name}.ipynb", 'profile = "smoke"\n' + parameters, "pass")
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFERULE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results" / "runs" / "smoke"


# Stands in for `python -m saferule notebook --engine NOTEBOOK OUT ...`: leaves what the brief says that each notebook leaves.
STUB = """
import sys
from pathlib import Path
out = Path(sys.argv[4])
stage, _, name = out.stem.partition("-")
kind = stage[3:] if name else None
files = [out, Path(f"artifacts/{kind}/{name}/manifest.json") if name else Path("tables/T1_main.csv")]
for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
"""


def planned(capfd, chapters, profile="smoke", **arguments) -> Counter:
    """How many jobs of each rule a dry run would start."""
    capfd.readouterr()
    assert engine.run(profile, notebooks=chapters, options=["--dry-run"], **arguments) == 0
    said = "".join(capfd.readouterr())
    if "Nothing to be done" in said:
        return Counter()
    stats = said[: said.index("total")]
    return Counter({rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", stats, re.M) if rule != "all"})


def edit(notebook: Path, **cell) -> None:
    content = json.loads(notebook.read_text())
    content["cells"][-1] |= cell
    notebook.write_text(json.dumps(content))


def git_status() -> str:
    return subprocess.run(["git", "-C", PACKAGE.parent, "status", "--porcelain"], capture_output=True, text=True).stdout


def test_what_is_run_again_and_what_a_failure_says(chapters, root, capfd):
    before = git_status()
    stub = root / "saferule" / "__main__.py"               # the jobs' working directory comes first on their module path
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.with_name("__init__.py").touch()                  # or a package found elsewhere on the path would win
    assert engine.run("smoke", notebooks=chapters) == 0
    assert git_status() == before                          # nothing is written but in the results folder
    out = capfd.readouterr().out
    assert "Where to look:" in out
    (task,) = PROFILES["smoke"].tasks
    made = {str(path.relative_to(root / "artifacts").parent) for path in root.rglob("manifest.json")}
    assert made == {f"data/{task}", f"poison/{task}-inject", f"poison/{task}-label_flip", f"train/{task}-bcq_lag",
                    *(f"unlearn/{task}-bcq_lag-{method}" for method in PROFILES["smoke"].methods), f"evaluate/{task}-bcq_lag",
                    "verdict/saferule"}

    edit(chapters / "03_train.ipynb", outputs=[{"output_type": "stream", "name": "stdout", "text": "x"}])
    assert planned(capfd, chapters, device="cpu") == Counter()             # outputs are not code, the device decides nothing
    later = Counter(unlearn=len(PROFILES["smoke"].methods), evaluate=1, verdict=1, table_main=1, figures=1)
    assert planned(capfd, chapters, seeds="0,1,2") == Counter(train=1) + later
    edit(chapters / "04_unlearn.ipynb", source="1 + 1")
    edit(chapters / "00_start_here.ipynb", source="1 / 0")
    assert planned(capfd, chapters) == Counter(start=1) + later
    edit(chapters / "04_unlearn.ipynb", source="pass")

    shutil.rmtree(stub.parent)
    assert engine.run("smoke", notebooks=chapters) == 1
    kept = root / "logs" / "00_start_here.ipynb"
    says = "saferule: 00_start_here: cell [3] raised ZeroDivisionError: division by zero"
    assert capfd.readouterr().err == f"{says} (as far as it came: {kept})\n"
    assert kept.is_file() and not (root / "notebooks" / "00_start_here.ipynb").exists()


def test_jobs_of_every_profile(chapters, root, capfd):
    """Each stage once per what it makes; the clean benchmark neither poisons nor unlearns."""
    for name, preset in PROFILES.items():
        tasks, runs = len(preset.tasks), len(preset.tasks) * len(preset.learners)
        stages = Counter(data=tasks, poison=tasks * len(preset.attacks), train=runs, evaluate=runs,
                         unlearn=runs * len(preset.methods))
        ends = {"00_start_here": "start", "07_verdict-saferule": "verdict", "10_table_main": "table_main", "20_figures": "figures",
                "11_learners": "table_learners", "12_cost_limits": "cost_limits", "13_ablation": "ablation",
                "14_off_policy": "off_policy"}
        assert planned(capfd, chapters, name) == +stages + Counter(ends[notebook] for notebook in preset.notebooks), name
    assert "learners" in PROFILES and not PROFILES["learners"].attacks


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")
def test_killed_then_continued(chapters, root, tmp_path):
    """kill -9 in the middle of a notebook: nothing goes on running, nothing half-made counts, the same call finishes."""
    write_notebook(chapters / "01_data.ipynb", 'profile = "smoke"\ntask = "BallRun"', f"""
import os, time
from pathlib import Path
first = not Path({str(tmp_path / "pid")!r}).exists()
Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
folder = Path("artifacts/data") / task
folder.mkdir(parents=True, exist_ok=True)
(folder / "manifest.json").write_text("half" if first else "whole")
time.sleep(300 if first else 0)""")
    call = [sys.executable, "-c", f"from saferule.engine import run; from pathlib import Path; raise SystemExit(run('smoke', "
            f"notebooks=Path({str(chapters)!r}), options=['notebooks/01_data-BallRun.ipynb']))"]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait(lambda: (root / "artifacts/data/BallRun/manifest.json").exists(), 60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait(lambda: not alive(int((tmp_path / "pid").read_text())), 10)
    assert not (root / "notebooks/01_data-BallRun.ipynb").exists()
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (root / "artifacts/data/BallRun/manifest.json").read_text() == "whole"
    assert (root / "notebooks/01_data-BallRun.ipynb").exists() and not list((root / "logs").glob("*.ipynb"))


def wait(for_what, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


# -------------------------------------------------------------------------------------------------------------- sources

@pytest.fixture
def package(tmp_path):
    """A copy of the package's shape, small enough to know every dependency."""
    files = {"__init__.py": "_WHERE = {'Pool': 'data', 'evaluate': 'evaluate', 'T1': 'report'}\ndef __getattr__(name): ...",
             "data.py": "from .errors import UserError", "errors.py": "", "config.py": "", "report.py": "from . import data",
             "evaluate.py": "def evaluate():\n    from .tasks import get_task", "tasks.py": "", "nets.py": "",
             "learners/__init__.py": "import importlib\ndef get(n): return importlib.import_module('.' + n, __name__)",
             "learners/bc.py": "from ..nets import mlp", "learners/cpq.py": "from .bc import BC",
             "unlearning/__init__.py": "", "unlearning/saferule.py": "from ..data import Pool"}
    folder = tmp_path / "saferule"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("code, expected", [
    ("from saferule import Pool", "data"),
    ("import saferule as sr\n%matplotlib inline\nsr.evaluate(1)", "evaluate tasks"),
    ("import saferule\nsaferule.T1()", "report data"),
    ("from saferule import unlearning\nunlearning.saferule.suppress", "unlearning unlearning.saferule data"),
    ("import saferule.unlearning.saferule", "unlearning unlearning.saferule data"),
    ("from saferule.learners import get", "learners learners.bc learners.cpq nets"),
    ("import torch, numpy.random\nfrom saferule.config import resolve", ""),
])
def test_modules_behind_a_notebook(package, code, expected):
    assert closure(frozenset(imports(code, package=package)), package) == tuple(sorted(f"saferule.{m}" for m in expected.split()))


def test_drawing_is_left_out_of_a_stage(package):
    behind = frozenset({"saferule.report", "saferule.tasks"})
    assert closure(behind, package) == ("saferule.data", "saferule.report", "saferule.tasks")
    assert closure(behind, package, PRESENTATION) == ("saferule.tasks",)
    assert all((PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists() for name in PRESENTATION)


def test_digest_follows_code_and_modules_only(package, tmp_path):
    def taken():
        closure.cache_clear()
        return digest(notebook, package)

    notebook = write_notebook(tmp_path / "n.ipynb", "profile = 'smoke'", "from saferule import Pool")
    before = taken()
    edit(notebook, outputs=[{"output_type": "stream", "name": "stdout", "text": "x"}])
    for module in ("report.py", "config.py", "errors.py", "tasks.py"):
        (package / module).write_text("# another\n")
    assert taken() == before
    (package / "data.py").write_text("# another\n")
    assert taken() != before
    (package / "data.py").write_text("from .errors import UserError")
    assert taken() == before
    edit(notebook, source="from saferule import Pool  # more")
    assert taken() != before


def test_every_public_name_leads_to_its_module():
    """What is read from the source of saferule/__init__.py is what importing gives."""
    import saferule
    assert set(lazy_exports()) == set(saferule.__all__)
    for name, module in lazy_exports().items():
        assert hasattr(import_module(module), name)
