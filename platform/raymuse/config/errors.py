"""Errors that a person can mend: one sentence with what was wrong, where, and what to do."""

from collections.abc import Sequence


class UserError(ValueError):
    """Something in the input, the config or the machine is wrong; the command line exits with 2."""


class ConfigError(UserError):
    """Every problem found in one config, said at once.

    Args:
        where: the recipe, file or stage that was checked.
        problems: one sentence a problem.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = list(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{where}: {count}{lines}")

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, list[str]]]:
        return ConfigError, (self.where, self.problems)  # so that it survives the way out of a Ray task


class TooManyRejects(Exception):  # noqa: N818 - the work is done: this is a verdict on it, not a failure
    """A stage finished, but more of its inputs were rejected than its config allows; exit code 3.

    Args:
        rejected: inputs that were rejected.
        total: inputs in all.
        address: the rejects: which inputs, and why.
    """

    def __init__(self, rejected: int, total: int, address: str) -> None:
        self.rejected, self.total, self.address = rejected, total, address
        share = rejected / max(total, 1)
        super().__init__(
            f"{rejected} of {total} inputs were rejected ({share:.1%}), more than max_reject_fraction allows; "
            f"{address} says which and why. All the others are done."
        )

    def __reduce__(self) -> tuple[type["TooManyRejects"], tuple[int, int, str]]:
        return TooManyRejects, (self.rejected, self.total, self.address)
