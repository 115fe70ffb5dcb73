"""What is seen while the runs work: progress bars on a terminal, plain lines anywhere else."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from _presets import Preset


class Display:
    """One bar for each run. A log file gets a line for each loss that is read instead."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def run(self, name: str, preset: Preset) -> Callable[[int, float], None]:
        """Begin a run's bar; call what comes back with each step and the last loss that was read."""
        task = self._bars.add_task(name, total=preset.steps, note="starting")

        def on_step(step: int, loss: float) -> None:
            self._bars.update(task, completed=step, note=f"loss {loss:.3f}")
            if not self._console.is_terminal and ((step - 1) % preset.every == 0 or step == preset.steps):
                self.say(f"{name:<16} step {step:>4}/{preset.steps}  loss {loss:.4f}")

        return on_step
