from __future__ import annotations

from tests.launch.planning import only_worker


def test_a_simulated_worker() -> None:
    pool = {"engine": "sim", "sim": {"decode_ms_per_token": 2, "block_size": 32}, "args": ["--seed", "1"]}
    spec = only_worker(pool)
    assert spec.argv == (
        *("python", "-m", "worker.sim", "--model-name", "m", "--role", "both"),
        *("--host", "127.0.0.1", "--port", "8100", "--side-channel-port", "9100"),
        *("--decode-ms-per-token", "2.0", "--block-size", "32"),
        *("--seed", "1"),
    )
    assert spec.env == {}
