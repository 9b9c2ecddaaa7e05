"""All cases. Each is sent once to Baton, in two legs where it can be, and once straight to a worker."""

from __future__ import annotations

from tests.differential.case import Case
from tests.differential.generation import GENERATION
from tests.differential.other_paths import OTHERS
from tests.differential.refusals import REFUSALS
from tests.differential.request_ids import REQUEST_IDS

CASES: list[Case] = [*GENERATION, *REFUSALS, *REQUEST_IDS, *OTHERS]
