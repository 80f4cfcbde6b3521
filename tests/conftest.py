"""`python -m pytest` leaves the tests marked slow aside; `python -m pytest -m slow` runs just them."""

import lib  # noqa: F401, before torch is loaded: its threads are to wait as in the scripts

# isort: split
from hypothesis import HealthCheck, settings

# A machine that is busy with other things is slow: no example has a time limit.
BUSY = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("sauron", deadline=None, suppress_health_check=BUSY)
settings.load_profile("sauron")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; only run by -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
