"""`make reference`: what a reader of the repository sees of a finished run, copied to results/reference/<profile>."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd

from .config import PROFILES
from .errors import UserError
from .files import atomic_file, replacing, results_dir, run_dir
from .sources import REPO

SHOWN = {                              # the README's table of a profile: a table, and some of its columns
    "T1_main": ("attack", "method", "return [95%]", "cost per seed", "cost per seed, later", "of retrained return"),
    "T0_learners": ("task", "learner", "return [95%]", "cost per seed", "of best safe return", "verdict"),
}
PARTS = ("tables", "figures", "notebooks")
MANY = 30


def keep(profile: str) -> Path:
    """Copies tables, figures, executed notebooks, verdicts, and every artefact's manifest (configuration, hashes, machine).

    The folder is replaced as a whole. Of MANY notebooks only those that the profile ends with are kept; they lose what papermill
    notes about paths. Raises UserError if the run is not there.
    """
    root, final = run_dir(profile), results_dir() / "reference" / profile
    if not any((root / "tables" / f"{name}.csv").is_file() for name in SHOWN):
        raise UserError(f"no finished run of profile '{profile}'; call `make reproduce PROFILE={profile}` first.")
    with replacing(final) as folder:
        for part in PARTS:
            shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns(".*"))
        made, ends = sorted(folder.glob("notebooks/*.ipynb")), PROFILES[profile].notebooks
        for path in made:
            if len(made) > MANY and path.stem not in ends:
                path.unlink()
                continue
            notebook = json.loads(path.read_text(encoding="utf-8"))
            notebook["metadata"].pop("papermill", None)
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in sorted(root.glob("artifacts/*/*/manifest.json")):
            copy = folder / "manifests" / f"{path.parent.parent.name}-{path.parent.name}.json"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        for path in sorted(root.glob("artifacts/verdict/*/verdict.*")):
            (folder / "verdicts").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "verdicts" / f"{path.parent.name}{path.suffix}")
    readme, block = REPO / "README.md", headline(final)
    text = readme.read_text(encoding="utf-8")
    start, end = f"<!-- {profile}: this block is written by `make reference` -->", f"<!-- /{profile} -->"
    if start in text and final == REPO / "results" / "reference" / profile:
        before, rest = text.split(start)
        with atomic_file(readme) as temporary:
            temporary.write_text(before + start + "\n" + block + end + rest.split(end)[1], encoding="utf-8")
    return final


def headline(kept: Path) -> str:
    """The README's table: some columns of a kept one, as Markdown. Its numbers are typed nowhere."""
    from .report import to_markdown
    path, shown = next((path, shown) for name, shown in SHOWN.items() if (path := kept / "tables" / f"{name}.md").is_file())
    text = path.read_text(encoding="utf-8").split("\n## ")[0]                                      # the claims' table follows
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return to_markdown(pd.DataFrame(lines[2:], columns=lines[0])[list(shown)])
