"""One module per notebook of the chain: each turns artefacts into an artefact, so that a notebook needs a single call."""
from __future__ import annotations

from pathlib import Path

from ..artifacts import Artifact, load


def is_current(kind: str, name: str, root: Path, **inputs: Artifact) -> bool:
    """Is this artefact there, and was it made from these inputs? Raises UserError if it is there but damaged."""
    if not (root / "artifacts" / kind / name).is_dir():
        return False
    made_from = load(kind, name, root).manifest["inputs"]
    return all(made_from[role]["id"] == artifact.id for role, artifact in inputs.items())
