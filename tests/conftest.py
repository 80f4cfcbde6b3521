"""`python -m pytest` leaves the tests marked slow aside; `python -m pytest -m slow` runs just them."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; only run by -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
