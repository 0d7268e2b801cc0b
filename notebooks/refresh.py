"""`make notebooks`: run every notebook with its defaults and keep the outputs in the committed files.

Run it after an edit to a notebook, or to code that a notebook shows. Results go to a temporary folder. What differs from run to
run for no good reason (execution times, papermill's notes, widget states) is left out.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat

HERE = Path(__file__).resolve().parent


def refresh(notebook: Path, executed: Path) -> None:
    old, new = nbformat.read(notebook, as_version=4), nbformat.read(executed, as_version=4)
    outputs = {cell["id"]: cell for cell in new.cells}
    for cell in old.cells:
        if cell.cell_type == "code":
            done = outputs[cell["id"]]
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
    nbformat.validate(old)
    nbformat.write(old, notebook)
    print(f"{notebook.name}: {notebook.stat().st_size / 1e3:.0f} kB")


def main(names: list[str]) -> None:
    chosen = sorted(HERE / name for name in names) if names else sorted(HERE.glob("*.ipynb"))
    with TemporaryDirectory() as folder:
        os.environ["SAFERULE_RESULTS"] = os.environ.get("SAFERULE_RESULTS", folder)
        from saferule.notebook import run_notebook
        for notebook in chosen:
            executed = Path(folder) / notebook.name
            run_notebook(notebook, executed, {})
            refresh(notebook, executed)


if __name__ == "__main__":
    main(sys.argv[1:])
