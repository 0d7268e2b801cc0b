"""Where the repository's files lie, and which of the package's modules a notebook depends on.

The engine re-runs a notebook when `digest` changes: a hash over the notebook's code and over the modules that it imports,
directly or through others, found by reading the sources and without importing anything.
"""
from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from .errors import UserError

PACKAGE = Path(__file__).resolve().parent
REPO = PACKAGE.parent
NOTEBOOKS = REPO / "notebooks"
# config: the engine compares the resolved settings instead. The others check, show and start; no number passes through them.
NOT_COUNTED = frozenset({"saferule", "saferule.config", "saferule.errors", "saferule.notebook", "saferule.sources",
                         "saferule.cli", "saferule.__main__"})
# These draw, print and mirror what a stage has made: an edit to them redoes tables and figures, but trains nothing again.
PRESENTATION = frozenset({"saferule.report", "saferule.figures", "saferule.dotplots", "saferule.benchmark", "saferule.sketches",
                          "saferule.tracking", "saferule.verdict_page", "saferule.forgetting"})


def relative(path: Path) -> str:
    """`path` from the repository's root, if it lies in there; otherwise whole."""
    path = path.absolute()
    return str(path.relative_to(REPO) if path.is_relative_to(REPO) else path)


def read_cells(notebook: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(source, tags) of every code cell. Raises UserError if the file is not a notebook."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [("".join(cell["source"]), tuple(cell["metadata"].get("tags", ()))) for cell in cells if cell["cell_type"] == "code"]
    except FileNotFoundError:
        raise UserError(f"{notebook}: no such notebook.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{notebook}: not a Jupyter notebook.") from None


@cache
def module_file(name: str, package: Path = PACKAGE) -> Path | None:
    """The file of module `name` ('saferule.learners.bcq_lag'), or None if there is none."""
    base = package.parent.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@cache
def lazy_exports(package: Path = PACKAGE) -> dict[str, str]:
    """What `saferule/__init__.py` hands out on demand, from its dictionary {"Pool": "data", ...}: name -> module."""
    found = {}
    for node in ast.walk(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(value, ast.Constant) and module_file(module := f"{package.name}.{value.value}", package):
                    found[key.value] = module
    return found


def _absolute(node: ast.ImportFrom, parent: str) -> str:
    """The absolute module name of a `from ... import`, seen from inside package `parent`."""
    if not node.level:
        return node.module or ""
    base = parent.split(".")
    base = base[: len(base) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def imports(code: str, parent: str = "", package: Path = PACKAGE) -> set[str]:
    """The package's modules that `code`, standing in package `parent`, imports anywhere or reaches as attributes of imports."""
    top, found = package.name, set()
    bound: dict[str, str] = {}                             # names that stand for a module

    def add(module: str, *attributes: str) -> str:
        while attributes and module_file(f"{module}.{attributes[0]}", package):
            module, attributes = f"{module}.{attributes[0]}", attributes[1:]
        if module == top and attributes:
            module = lazy_exports(package).get(attributes[0], top)
        if module.split(".")[0] == top:
            found.add(module)
        return module

    tree = ast.parse(_without_magics(code))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = add(alias.name)
                bound[alias.asname or alias.name.split(".")[0]] = module if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound[alias.asname or alias.name] = add(_absolute(node, parent), alias.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):     # 'saferule.learners', given to import_module
            if node.value.startswith(top + ".") and module_file(node.value.rstrip("."), package):
                found.add(node.value.rstrip("."))
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func) and parent not in ("", top):
            folder = package.parent.joinpath(*parent.split("."))                 # chosen at run time: any of this package
            found |= {f"{parent}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split(".")
            if chain[0] in bound:
                add(bound[chain[0]], *chain[1:])
    return found


def _without_magics(code: str) -> str:
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines())


@cache
def closure(modules: frozenset[str], package: Path = PACKAGE, without: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """`modules` and every module of the package that they import in turn, sorted; parents' __init__ files included.

    Those in `without` and in NOT_COUNTED are left out, with what only they import.
    """
    seen: set[str] = set()
    todo = set(modules)
    while todo:
        name = todo.pop()
        path = module_file(name, package)
        if path is None or name in seen | NOT_COUNTED | without:
            continue
        seen.add(name)
        parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
        todo |= imports(path.read_text(encoding="utf-8"), parent, package) | {name.rpartition(".")[0]}
    return tuple(sorted(seen))


def modules_behind(notebook: Path, package: Path = PACKAGE, without: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """`closure` of what the code cells of `notebook` import."""
    return closure(frozenset().union(*(imports(source, package=package) for source, _ in read_cells(notebook))), package, without)


def digest(notebook: Path, package: Path = PACKAGE, without: frozenset[str] = frozenset()) -> str:
    """12 hex digits over the code cells of `notebook` (not its outputs) and the sources of the modules behind it."""
    total = hashlib.sha256("\0".join(source for source, _ in read_cells(notebook)).encode())
    for name in modules_behind(notebook, package, without):
        total.update(name.encode() + b"\0" + module_file(name, package).read_bytes())
    return total.hexdigest()[:12]
