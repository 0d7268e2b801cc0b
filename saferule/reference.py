"""`make reference`: what a reader of the repository sees of a finished run, copied to results/reference/<profile>."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

from .errors import UserError
from .files import replacing, results_dir, run_dir

PARTS = ("tables", "figures", "notebooks")


def keep(profile: str) -> Path:
    """Copies tables, figures and executed notebooks, and every artefact's manifest (configuration, hashes, versions, machine).

    The folder is replaced as a whole. Notebooks lose what papermill notes about paths. Raises UserError if the run is not there.
    """
    root, final = run_dir(profile), results_dir() / "reference" / profile
    if not (root / "tables" / "T1_main.csv").is_file():
        raise UserError(f"no finished run of profile '{profile}'; call `make reproduce PROFILE={profile}` first.")
    with replacing(final) as folder:
        for part in PARTS:
            shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns(".*"))
        for path in sorted(folder.glob("notebooks/*.ipynb")):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            notebook["metadata"].pop("papermill", None)
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in sorted(root.glob("artifacts/*/*/manifest.json")):
            copy = folder / "manifests" / f"{path.parent.parent.name}-{path.parent.name}.json"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    return final
