"""A column of progress bars; rich is slow to import, so this is imported where a bar is drawn."""

from __future__ import annotations

from datetime import timedelta

from rich.progress import ProgressColumn, Task
from rich.text import Text


class TimeLeft(ProgressColumn):
    """How long it takes yet, once that can be told."""

    def render(self, task: Task) -> Text:
        """See ``ProgressColumn``."""
        if task.finished or task.time_remaining is None:
            return Text("")
        return Text(f"{timedelta(seconds=int(task.time_remaining))} left")
