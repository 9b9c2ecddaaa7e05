"""A certificate of localhost and its addresses, signed by itself, and its key; for a hundred years."""

from __future__ import annotations

from pathlib import Path

CERT = Path(__file__).with_name("certificate.pem")
KEY = Path(__file__).with_name("certificate_key.pem")
