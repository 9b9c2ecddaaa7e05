from __future__ import annotations

import pytest

# They assert, and are no test modules.
pytest.register_assert_rewrite("tests.faults.asking", "tests.faults.cluster")
