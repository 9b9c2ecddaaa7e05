"""What is measured here runs in this process: in the form that BATON_FORM names, or as pure Python."""

import os

from orchestrator.form import FORM_ENV, take_form

take_form({FORM_ENV: "pure", **os.environ})
