"""Two certificates of localhost and its addresses, each signed by itself, and their keys."""

from __future__ import annotations

from pathlib import Path

CERT = Path(__file__).with_name("certificate.pem")
KEY = Path(__file__).with_name("certificate_key.pem")
RENEWED_CERT = Path(__file__).with_name("renewed.pem")
RENEWED_KEY = Path(__file__).with_name("renewed_key.pem")
EXPIRED_CERT = Path(__file__).with_name("expired.pem")  # of RENEWED_KEY
