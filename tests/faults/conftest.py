from __future__ import annotations

import pytest

# It asserts, and is no test module.
pytest.register_assert_rewrite("tests.faults.cluster")
