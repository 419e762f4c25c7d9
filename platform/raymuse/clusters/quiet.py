"""What Ray's libraries would tell a terminal, left to their log files: a stage prints its own progress."""

import logging

from ray.data import DataContext


def quiet_data() -> None:
    """No bars and no plans of Ray Data in this process; its warnings stay."""
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no bars
