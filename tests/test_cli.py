"""The command line, the notebook runner and the helpers that notebooks call."""
import json
import subprocess
import sys

import h5py
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from saferule import notebook as nb
from saferule.cli import main
from saferule.errors import UserError


def write_notebook(path, parameters, *cells):
    """A notebook with a cell tagged 'parameters' and further code cells."""
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}), path)
    return path


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert err.startswith("saferule: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("argv, says", [
    (["reproduce", "--profile=quik"], "unknown profile 'quik'. Did you mean 'quick'?"),
    (["reproduce", "--device=gpu"], "unknown device 'gpu'"),
    (["reproduce", "--seeds=0,one"], "seeds: '0,one' must be"),
    (["reproduce", "--seeds=1,1"], "seeds: '1,1' must be different"),
    (["reproduce", "--tasks=BallCirle"], "BallCircle"),
    (["reproduce", "--cores=none"], "cores: 'none'"),
    (["reproduce", "--colour=red"], "--colour=red"),
    (["cook"], "cook"),
    (["notebook", "no.ipynb", "out.ipynb"], "no.ipynb: no such notebook"),
    (["check", "data.hdf5", "--task", "BallCirle"], "BallCircle"),
    (["check", "data.hdf5", "--task", "BallCircle"], "data.hdf5"),
    (["verify", "nothing"], "nothing"),
    (["verdict", "nothing.json"], "nothing.json is missing"),
    (["verdict", "--profile=quik"], "unknown profile 'quik'. Did you mean 'quick'?"),
    (["verdict", "--method=safrule"], "Did you mean 'saferule'?"),
    (["verdict", "--tasks=BallCirle"], "BallCircle"),
    (["verdict", "--learners=bcq"], "unknown learner 'bcq'"),
    (["download", "BallCirle"], "BallCircle"),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert says in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_unwritable_results_folder(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAFERULE_RESULTS", str(tmp_path / "file"))
    assert main(["reproduce", "--profile=smoke"]) == 2
    assert "cannot be written" in one_line(capsys)


def test_check_describes_a_good_file(capsys, tmp_path):
    from saferule.tasks import get_task
    task, n = get_task("BallCircle"), 400
    with h5py.File(tmp_path / "mine.hdf5", "w") as file:
        for name, width in (("observations", task.n_obs), ("next_observations", task.n_obs), ("actions", task.n_act)):
            file[name] = np.full((n, width), 0.1, np.float32)
        file["rewards"], file["costs"] = np.ones(n, np.float32), np.zeros(n, np.float32)
        file["terminals"], file["timeouts"] = np.zeros(n, bool), np.arange(n) % 200 == 199
    assert main(["check", str(tmp_path / "mine.hdf5"), "--task", "BallCircle"]) == 0
    out = capsys.readouterr().out
    assert "400 transitions, 2 episodes" in out and "200.0 / 200.0 / 200.0" in out and "100% of episodes" in out


def test_verify_names_a_flipped_byte(capsys, tmp_path):
    from saferule.artifacts import save
    path = save("table", "T0", {"note.md": "hello\n"}, {"a": 1}, root=tmp_path).path
    assert main(["verify", str(path)]) == 0 and "every file matches" in capsys.readouterr().out
    (path / "note.md").write_text("hellp\n")
    assert main(["verify", str(path / "manifest.json")]) == 2
    assert "note.md" in one_line(capsys)


# ----------------------------------------------------------------------------------------------------------- parameters

@pytest.mark.parametrize("given, seeds", [("0,1,2", (0, 1, 2)), (3, (3,)), (" 4 ", (4,)), ([0, 2], (0, 2)), ("", ())])
def test_seeds(given, seeds):
    assert nb.parse_seeds(given) == seeds


@pytest.mark.parametrize("given", ["-1", "1.5", "a", "0,0"])
def test_bad_seeds(given):
    with pytest.raises(UserError, match="seeds"):
        nb.parse_seeds(given)


DEFAULTS = """profile = "smoke"
task = "BallRun"
attacks = "inject"
method = "saferule"
seeds = "0,1"
device = "cpu"
rate = 0.1
"""


@pytest.fixture
def chapter(tmp_path):
    return write_notebook(tmp_path / "chapter.ipynb", DEFAULTS)


def values(**changed):
    space = {}
    exec(DEFAULTS, space)
    return space | changed


def test_begin_returns_checked_values(chapter):
    run = nb.begin(chapter, values(seeds=1, attacks="", task="CarCircle"))
    assert (run.profile, run.task.name, run.seeds, run.rate) == ("smoke", "CarCircle", (1,), 0.1)
    assert run.attacks == ("inject", "label_flip")
    assert run.device == "cpu" and run.root.parts[-2:] == ("runs", "smoke")


@pytest.mark.parametrize("changed, says", [
    ({"In": ["", "# Parameters\ntaks = 'CarRun'\n"]}, "unknown parameter of .*'taks'. Did you mean 'task'"),
    ({"profile": "quik"}, "unknown profile 'quik'"), ({"task": "BallRum"}, "BallRun"),
    ({"attacks": "inject,flip"}, "unknown attack 'flip'"), ({"method": "safe_rule"}, "Did you mean 'saferule'"),
    ({"seeds": "0;1"}, "seeds"), ({"device": "gpu"}, "unknown device")])
def test_begin_refuses(chapter, changed, says):
    with pytest.raises(UserError, match=says):
        nb.begin(chapter, values(**changed))


def test_begin_misses_a_parameter(chapter):
    space = values()
    del space["task"]
    with pytest.raises(UserError, match="'task' is not set; its default is 'BallRun'"):
        nb.begin(chapter, space)


@pytest.mark.parametrize("cell", ["task = str(1)", "task ="])
def test_parameters_must_be_literals(tmp_path, cell):
    with pytest.raises(UserError, match="literals"):
        nb.declared(write_notebook(tmp_path / "n.ipynb", cell))


# ------------------------------------------------------------------------------------------------------ executing them

def test_runner_refuses_before_anything_runs(chapter, tmp_path, capsys):
    assert main(["notebook", str(chapter), str(tmp_path / "out.ipynb"), "-p", "taks", "CarRun"]) == 2
    assert "'taks'. Did you mean 'task'?" in one_line(capsys)
    assert main(["notebook", str(chapter), str(tmp_path / "out.ipynb"), "-p", "rate", "high"]) == 2
    assert "'rate' must be of type float" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["chapter.ipynb"]


def test_executed_notebook(tmp_path, capsys):
    """One kernel for: parameters arrive typed, `show` and `progress` leave deterministic plain text, ends at OUT."""
    source = write_notebook(tmp_path / "n.ipynb", 'task = "BallRun"\nrate = 0.5', "assert task == '7' and rate == 2.0",
                            "from saferule.notebook import progress, show\nfrom saferule.config import one_of\nshow(one_of)",
                            "for _ in progress(range(40), 'train'): pass",
                            "with progress(total=9, desc='fit') as bar: bar.update(9)")
    out = tmp_path / "sub" / "out.ipynb"
    assert main(["notebook", str(source), str(out), "-p", "task", "7", "-p", "rate", "2"]) == 0
    cells = nbformat.read(out, as_version=4).cells
    assert "injected-parameters" in cells[1].metadata.tags
    shown, trained, fitted = (cell.outputs for cell in cells[3:])
    assert shown[0].data["text/plain"].startswith("# saferule/config.py\ndef one_of(")
    assert shown[0].data["text/markdown"].startswith("```python\n")
    assert [o.data["text/plain"] for o in trained] == ["train: 40/40"] and [o.data["text/plain"] for o in fitted] == ["fit: 9/9"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.ipynb"]


def test_failing_notebooks(tmp_path, capsys):
    """An unexpected error names notebook, cell and the kept copy (exit 1); a UserError is its own line (exit 2)."""
    source = write_notebook(tmp_path / "n.ipynb", "kind = 'bug'", "from saferule.errors import UserError\n"
                            "raise UserError('no such file; make it.') if kind == 'user' else ZeroDivisionError('first\\nsecond')")
    out, log = tmp_path / "out.ipynb", tmp_path / "logs" / "n.ipynb"
    assert main(["notebook", str(source), str(out), "--log", str(log)]) == 1
    line = one_line(capsys)
    assert "n: cell [2] raised ZeroDivisionError: first" in line and str(log) in line and "second" not in line
    assert json.loads(log.read_text())["cells"] and not out.exists()
    assert main(["notebook", str(source), str(out), "--log", str(log), "-p", "kind", "user"]) == 2
    assert one_line(capsys) == "saferule: no such file; make it.\n"
    assert not out.exists() and not log.exists()


def test_bare_papermill_command_refuses_a_misspelt_parameter(tmp_path):
    source = write_notebook(tmp_path / "n.ipynb", DEFAULTS,
                            f"from saferule.notebook import begin\nrun = begin({str(tmp_path / 'n.ipynb')!r}, globals())",
                            "open('was_here', 'w')")
    done = subprocess.run([sys.executable, "-m", "papermill", source, tmp_path / "out.ipynb", "-p", "taks", "CarRun"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "Did you mean 'task'?" in done.stderr
    assert not (tmp_path / "was_here").exists()


def test_reference_keeps_what_a_reader_sees(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAFERULE_RESULTS", str(tmp_path))
    assert main(["reference", "--profile", "quick"]) == 2
    assert "no finished run of profile 'quick'" in capsys.readouterr().err
    root = tmp_path / "runs" / "quick"
    table = "| task | attack | method | return [95%] | cost per seed | cost per seed, later | of retrained return |\n" + "| - " * 7
    for name, text in {"tables/T1_main.csv": "a\n", "tables/T1_main.md": table + "|\n", "tables/.manifest.lock": "",
                       "figures/F1.png": "x",
                       "notebooks/01.ipynb": '{"metadata": {"papermill": {"input_path": "/somewhere"}}, "cells": []}',
                       "artifacts/train/BallRun-bcq_lag/manifest.json": "{}", "artifacts/verdict/saferule/verdict.md": "#",
                       "artifacts/verdict/saferule/verdict.json": "{}"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert main(["reference", "--profile", "quick"]) == 0
    kept = tmp_path / "reference" / "quick"
    found = sorted(p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file())
    assert found == ["figures/F1.png", "manifests/train-BallRun-bcq_lag.json", "notebooks/01.ipynb", "tables/T1_main.csv",
                     "tables/T1_main.md", "verdicts/saferule.json", "verdicts/saferule.md"]
    assert "somewhere" not in (kept / "notebooks" / "01.ipynb").read_text()
