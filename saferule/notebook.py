"""Helpers used inside notebooks (`begin`, `show`, `progress`), and the runner that executes one from outside.

Papermill only warns about a misspelt parameter. Here both ways of running a notebook refuse it before anything runs:
`run_notebook` checks the names first, and `begin`, the first call of every notebook, finds what a bare papermill command
injected.
"""
from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from .config import ATTACK_NAMES, LEARNER_NAMES, PROFILES, UNLEARNER_NAMES, one_of
from .errors import UserError
from .sources import NOTEBOOKS, read_cells, relative

INJECTED = "# Parameters"                  # papermill's first line of the cell that it injects


class NotebookFailed(RuntimeError):
    """A notebook raised something unexpected; the message is one line and names notebook, cell, error and the kept copy."""


# ------------------------------------------------------------------------------------------------ parameters and begin


def assigned(code: str) -> dict[str, ast.expr]:
    """Names that `code` assigns at its top level, with the expressions."""
    return {target.id: node.value for node in ast.parse(code).body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)}


def declared(notebook: Path) -> dict[str, Any]:
    """Parameters of a notebook and their defaults: the literals of its cell tagged 'parameters'.

    Raises UserError if there is not exactly one such cell or it holds more than literals.
    """
    cells = [source for source, tags in read_cells(notebook) if "parameters" in tags]
    if len(cells) != 1:
        raise UserError(f"{notebook}: {len(cells)} cells are tagged 'parameters'; exactly one is needed.")
    try:
        return {name: ast.literal_eval(value) for name, value in assigned(cells[0]).items()}
    except (SyntaxError, ValueError):
        raise UserError(f"{notebook}: the cell tagged 'parameters' may hold only assignments of literals.") from None


def listed(value: Any) -> tuple[str, ...]:
    """'0,1,2', 0 or [0, 1] -> a tuple of strings; papermill turns a lone number into an int, hence the second form."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return tuple(s for s in (str(item).strip() for item in items) if s)


def parse_seeds(value: Any) -> tuple[int, ...]:
    """'0,1,2' -> (0, 1, 2). Raises UserError unless all are different whole numbers >= 0."""
    items = listed(value)
    if not all(item.isdecimal() for item in items) or len({int(item) for item in items}) != len(items):
        raise UserError(f"seeds: '{value}' must be different whole numbers >= 0 separated by commas, such as 0,1,2.")
    return tuple(int(item) for item in items)


def parse_limits(value: Any) -> tuple[float, ...]:
    """'10,20,40' -> (10.0, 20.0, 40.0). Raises UserError unless all are different numbers >= 0."""
    try:
        limits = tuple(float(item) for item in listed(value))
        good = all(0 <= limit < float("inf") for limit in limits) and len(set(limits)) == len(limits)
    except ValueError:
        good = False
    if not good:
        raise UserError(f"cost_limits: '{value}' must be different numbers >= 0 separated by commas, such as 10,20,40.")
    return limits


def parse_device(value: str) -> str:
    """'auto' | 'cpu' | 'cuda' -> 'cpu' | 'cuda'. Raises UserError for another name, or where there is no CUDA device."""
    one_of("device", value, ("auto", "cpu", "cuda"))
    if value == "cpu":
        return value
    import torch
    if torch.cuda.is_available():
        return "cuda"
    if value == "cuda":
        raise UserError("device 'cuda': PyTorch finds no CUDA device here; use cpu or auto.")
    return "cpu"


def checked(parameters: Mapping[str, Any]) -> SimpleNamespace:
    """Parameter values as a namespace: names checked, lists parsed, the task looked up, an empty list the profile's own."""
    from .files import run_dir
    from .tasks import get_task

    out = SimpleNamespace(**parameters)
    preset = PROFILES[one_of("profile", parameters.get("profile", "smoke"), PROFILES)]
    for name, choices in (("learner", LEARNER_NAMES), ("attack", ATTACK_NAMES), ("method", UNLEARNER_NAMES)):
        if name in parameters:
            one_of(name, parameters[name], choices)
        if (plural := name + "s") in parameters:
            values = listed(parameters[plural]) or getattr(preset, plural)
            setattr(out, plural, tuple(one_of(name, value, choices) for value in values))
    if "task" in parameters:
        out.task = get_task(parameters["task"])
    if "tasks" in parameters:
        out.tasks = tuple(get_task(name) for name in listed(parameters["tasks"]) or preset.tasks)
    if "seeds" in parameters:
        out.seeds = parse_seeds(parameters["seeds"]) or preset.seeds
    if "cost_limits" in parameters:
        out.cost_limits = parse_limits(parameters["cost_limits"])
    if "device" in parameters:
        out.device = parse_device(parameters["device"])
    out.profile = parameters.get("profile", "smoke")
    out.root = run_dir(out.profile)
    return out


def begin(name: str, namespace: Mapping[str, Any]) -> SimpleNamespace:
    """First call of a notebook, right after its parameters: `run = begin("03_train", globals())`.

    Raises UserError for a misspelt parameter (also one injected by a bare papermill command) and for unknown values.
    Returns the parameters as attributes: profile (str), root (Path of the run), and, where declared, task (Task),
    learner, attack, method (str), attacks, methods, seeds, cost_limits (tuples), device ('cpu' or 'cuda'); others as they are.
    Sets PyTorch to one thread: the engine runs several notebooks at once.
    """
    defaults = declared((NOTEBOOKS / name).with_suffix(".ipynb"))
    for cell in namespace.get("In", ()):                   # IPython's list of the cells executed so far
        if cell.startswith(INJECTED):
            for parameter in assigned(cell):
                one_of(f"parameter of {name}", parameter, defaults)
    for parameter, default in defaults.items():
        if parameter not in namespace:
            raise UserError(f"{name}: parameter '{parameter}' is not set; its default is {default!r}.")
    one_thread()
    import torch
    torch.set_num_threads(1)
    return checked({parameter: namespace[parameter] for parameter in defaults})


# ---------------------------------------------------------------------------------------------------- show and progress


def show(*objects: Any) -> None:
    """Prints the source of functions, classes or methods as it stands in the package, highlighted in a notebook."""
    for thing in objects:
        thing = inspect.unwrap(getattr(thing, "fget", thing))
        source = textwrap.dedent(inspect.getsource(thing)).rstrip()
        where = relative(Path(inspect.getsourcefile(thing)))
        if in_kernel():
            from IPython.display import display
            display({"text/plain": f"# {where}\n{source}", "text/markdown": f"```python\n# {where}\n{source}\n```"}, raw=True)
        else:
            print(f"# {where}\n{source}")


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel (and not in a terminal, with or without IPython)."""
    ipython = sys.modules.get("IPython")
    return bool(ipython and (shell := ipython.get_ipython()) and hasattr(shell, "kernel"))


class progress:
    """A progress bar for terminals and notebooks: `for x in progress(items, "training")`, or with `total=` and `update`.

    In a notebook it is one line of text that is replaced in place and ends as 'training: 4000/4000', the same on every
    run; in a terminal it is tqdm and disappears; elsewhere (a pipe, a log file) it stays silent.
    """

    def __init__(self, iterable: Iterable | None = None, desc: str = "", total: int | None = None):
        from tqdm import tqdm
        self.iterable, self.desc = iterable, desc
        total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.handle, stream = None, sys.stderr
        if in_kernel():
            from IPython.display import display
            stream = _Silent()
            self.handle = display({"text/plain": f"{desc}: 0/{total}"}, raw=True, display_id=True)
        self.bar = tqdm(total=total, desc=desc, leave=False, disable=None if self.handle is None else False, file=stream,
                        mininterval=0.2 if self.handle is None else 0.5, ncols=90, dynamic_ncols=False)

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        if self.bar.update(n) and self.handle:             # true when tqdm's own interval has passed
            self.handle.update({"text/plain": str(self.bar)}, raw=True)

    def close(self) -> None:
        if self.handle:
            self.handle.update({"text/plain": f"{self.desc}: {self.bar.n}/{self.bar.total or self.bar.n}"}, raw=True)
        self.bar.close()

    def __iter__(self) -> Iterator:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def __enter__(self) -> progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Silent:
    """A stream that swallows what tqdm draws; the notebook's own line is drawn from tqdm's numbers."""

    def write(self, _: str) -> None: ...

    def flush(self) -> None: ...


# ---------------------------------------------------------------------------------------------------------- the runner


def one_thread() -> None:
    """One numerical thread in this process and its children: parallelism comes from processes."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


def cast(name: str, value: str, default: Any) -> Any:
    """A parameter from the command line in the type of its default. Raises UserError if it does not fit."""
    if isinstance(default, str):
        return value
    try:
        literal = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        literal = value
    if isinstance(default, float) and type(literal) is int:
        literal = float(literal)
    if default is not None and type(literal) is not type(default):
        raise UserError(f"parameter '{name}' must be of type {type(default).__name__} like {default!r}, not '{value}'.")
    return literal


def run_notebook(source: Path, out: Path, parameters: Mapping[str, str], log: Path | None = None) -> None:
    """Executes `source` with papermill and leaves the executed notebook at `out`, written at once and only on success.

    While it runs, and if it fails, the executed cells are at `log` (default: OUT with the suffix .failed.ipynb).
    Raises UserError before anything runs for an unknown parameter, or with the message of a UserError raised in a cell;
    NotebookFailed for any other error.
    """
    if not source.is_file():
        known = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise UserError(f"{source}: no such notebook. In {NOTEBOOKS.name}/: {known}.")
    defaults = declared(source)
    for name in parameters:
        one_of(f"parameter of {source.stem}", name, defaults)
    values = {name: cast(name, value, defaults[name]) for name, value in parameters.items()}
    log = log or out.with_suffix(".failed.ipynb")
    try:
        for path in (out, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror}); choose another folder.") from None

    one_thread()
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config
    with TemporaryDirectory(prefix="saferule-") as sockets:  # one each: by default all kernels of a folder share their names
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        try:
            papermill.execute_notebook(source, log, values, progress_bar=False, kernel_name="python3", config=config)
        except PapermillExecutionError as error:
            if error.ename == "UserError":
                log.unlink(missing_ok=True)                # the line says it all, and nothing is left behind
                raise UserError(error.evalue) from None
            cause = f"cell [{error.exec_count}] raised {error.ename}: {error.evalue}".splitlines()[0]
            raise NotebookFailed(f"{source.stem}: {cause} (as far as it came: {relative(log)})") from None
        except RuntimeError as error:                      # the kernel did not start, or died
            raise NotebookFailed(f"{source.stem}: {error} (as far as it came: {relative(log)})") from None
    os.replace(log, out)


def die_with_parent() -> None:
    """On Linux, this process is ended when its parent ends, however that ends: a killed engine leaves no notebook running."""
    if sys.platform == "linux":
        import ctypes
        import signal
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)         # 1 = PR_SET_PDEATHSIG
