"""What can be said about notebooks, README and set-up files without running them."""
import ast
import json
import re
import tomllib

import pytest
import yaml

from saferule.config import PROFILES
from saferule.notebook import declared
from saferule.sources import NOTEBOOKS, PRESENTATION, REPO, digest, modules_behind, read_cells

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
NEEDED = {"01_data": {"task"}, "02_poison": {"task", "attack"}, "03_train": {"task", "learner", "attacks", "seeds", "device"},
          "04_unlearn": {"task", "learner", "attacks", "method", "seeds", "device"},
          "05_evaluate": {"task", "learner", "attacks", "seeds"}, "06_audit": {"task", "learner", "device"},
          "07_verdict": {"tasks", "learners", "method"}}
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
TARGETS = set(re.search(r"^\.PHONY: (.+)$", (REPO / "Makefile").read_text(), re.M)[1].split())


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_well_formed(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    content = json.loads(path.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    parameters = declared(path)                            # exactly one tagged cell, literals only
    assert parameters["profile"] in PROFILES
    assert NEEDED.get(name, set()) <= set(parameters)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert len("".join(cell["source"]).splitlines()) <= 25, f"{name}: a long cell; move its code into the package"
            assert not any(output["output_type"] == "error" for output in cell["outputs"])


@pytest.mark.parametrize("name", NAMES)
def test_first_call_is_begin_with_the_notebooks_own_name(name):
    """`begin` right after the parameters is what makes a bare papermill command refuse a misspelt parameter."""
    cells = read_cells(NOTEBOOKS / f"{name}.ipynb")
    position = next(i for i, (_, tags) in enumerate(cells) if "parameters" in tags)
    assert position == 0
    calls = [node for node in ast.walk(ast.parse(cells[1][0])) if isinstance(node, ast.Call)]
    assert any(ast.unparse(call) == f"begin('{name}', globals())" for call in calls)


@pytest.mark.parametrize("name", NAMES)
def test_digest_can_be_taken(name):
    assert re.fullmatch("[0-9a-f]{12}", digest(NOTEBOOKS / f"{name}.ipynb"))


@pytest.mark.parametrize("name", [name for name in NAMES if name[:2] in ("01", "02", "03")])
def test_training_does_not_depend_on_unlearning(name):
    """So an edit to an unlearner redoes 04 and what follows it, nothing before."""
    behind = modules_behind(NOTEBOOKS / f"{name}.ipynb", without=PRESENTATION)
    assert behind and not [module for module in behind if module.startswith(("saferule.unlearning", "saferule.evaluate"))]


def test_environment_yml_is_in_step_with_pyproject():
    conda = yaml.safe_load((REPO / "environment.yml").read_text())
    plain = [entry for entry in conda["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert pip == ['-e ".[all]"']                          # every other pin is read from pyproject.toml
    version = re.fullmatch(r"python=(3\.\d+)", plain[0])[1]
    assert plain[1:] == ["pip"]
    assert PROJECT["requires-python"].startswith(f">={version},")
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert {"cluster", "dev"} <= set(re.fullmatch(r"saferule\[(.+)\]", everything)[1].split(","))
    assert PROJECT["scripts"] == {"saferule": "saferule.cli:main"}


def commands(text: str) -> list[str]:
    """The lines of a README's shell code blocks."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", text, re.M | re.S)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_knownare_the_makefiles():
    for line in commands((REPO / "README.md").read_text()):
        if words := re.match(r"make\s+(.*)", line.split("#")[0]):
            goals = [word for word in words[1].split() if "=" not in word and not word.startswith("-")]
            assert set(goals) <= TARGETS, line
            for setting in re.findall(r"\b([A-Z_]+)=", words[1]):
                assert re.search(rf"^{setting} \?=", (REPO / "Makefile").read_text(), re.M), line
        if words := re.match(r"saferule\s+(\w+)", line):
            from saferule.cli import parser
            (known,) = (action.choices for action in parser()._actions if action.choices and action.nargs == "A...")
            assert words[1] in known, line


def test_ci_is_make_test():
    script = REPO / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and "exec make test" in script.read_text()


@pytest.mark.parametrize("profile", ["quick", "learners"])
def test_the_readmes_table_is_that_of_the_reference(profile):
    """`make reference` writes it; nobody types numbers."""
    from saferule.reference import headline
    text = (REPO / "README.md").read_text(encoding="utf-8")
    block = text.split(f"<!-- {profile}: this block is written by `make reference` -->\n")[1].split(f"<!-- /{profile} -->")[0]
    assert block == headline(REPO / "results" / "reference" / profile)
