"""How the tests run: in which order, and where their shared fixtures come from (`shared.py`)."""

import os
import signal
from pathlib import Path

import pytest

# Whoever starts the tests in the background has them ignore Ctrl-C, and all that they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray's workers would give way to every other process of the tests, and those that wait for them would wait long.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so

# For all processes that are started from here on, those that run the tests among them: see there.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Files go to the processes one by one, these first: none that takes long must be the last one running.
LONGEST = ("test_flow", "test_train_stage", "test_pretokenize", "test_generate", "test_tracking", "test_serving")
LONGEST += (
    "test_jobs",
    "test_browsing",
    "test_clusters",
    "test_training",
    "test_autoscaling",
    "test_remote",
    "test_optimizers",
)
LONGEST += ("test_plan", "test_score", "test_judge", "test_engine", "test_cli", "test_data_stage")


def pytest_configure(config: pytest.Config) -> None:
    """Load the shared fixtures; not where other processes run the tests, since their imports take seconds."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
