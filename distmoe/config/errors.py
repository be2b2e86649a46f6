"""The one error of a wrong setting."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting is impossible. A line per problem: key, value, and what is allowed."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
