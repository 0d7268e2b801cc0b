"""The one exception for bad input: a single line that says what is wrong, where, and what to do."""


class UserError(ValueError):
    """Bad input. Shown as one line `saferule: <message>`: by the command line (exit code 2) and by Jupyter."""

    def _render_traceback_(self) -> list[str]:           # IPython calls this instead of printing a traceback
        return [f"saferule: {self}"]
