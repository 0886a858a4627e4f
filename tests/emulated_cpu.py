"""Another native part than fastxm's own, as a plugin of pytest: `pytest -p emulated_cpu ...`.

EMULATED_CPU names its library; of each test's cases every EMULATED_EVERYth is run.
"""

import collections
import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("fastxm._C", os.environ["EMULATED_CPU"])
_native = importlib.util.module_from_spec(_spec)
sys.modules["fastxm._C"] = _native  # before fastxm asks for its own
_spec.loader.exec_module(_native)


def pytest_report_header():
    return f"fastxm._C of {_native.build_info()['cpu']}"


def pytest_collection_modifyitems(items):
    every, cases = int(os.environ.get("EMULATED_EVERY", "1")), collections.Counter()

    def wanted(item):
        cases[item.originalname] += 1
        return cases[item.originalname] % every == 1 % every

    items[:] = filter(wanted, items)
