"""A process that serves has a policy of its own for the garbage collector.

Requests free themselves: reference counts return all that one has made when it ends, so the collector is
there for the few cycles that errors and closed connections leave. What it costs by default is not in
proportion: every 700 objects it looks at the young ones, and now and then at all of them, which holds the
event loop for tens of milliseconds, since FastAPI, pydantic and their schemas are hundreds of thousands of
objects that live as long as the process. So:

- what is there when serving begins is frozen: never looked at again;
- young objects are looked at when 10,000 more were made than freed, the oldest generation a thousand times
  less often: by then a leak of cycles would be some megabytes.

`bench/micro/garbage.py` measures what that is worth.
"""

from __future__ import annotations

import gc

THRESHOLDS = (10_000, 20, 50)


def tune() -> None:
    """Set the policy. Call this once, when everything is imported and made and no request is open."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
