from __future__ import annotations

import shlex
import subprocess

import pytest

from orchestrator.config.printing import (
    counted,
    is_secret_option,
    is_secret_variable,
    masked,
    masked_value,
    masked_words,
    one_line,
    shell_word,
)
from orchestrator.config.yaml12 import Mark, Problem

SECRET = "hush-hush"


@pytest.mark.parametrize(
    "name",
    [
        "API_KEY",
        "hf_token",
        "X_AUTH",
        "AWS_CREDENTIALS",
        "SSL_PASSPHRASE",
        "PGPASSWORD",
        "MY_SECRET_2",
        "COOKIE",
        "KEY",
        "OTEL_EXPORTER_OTLP_HEADERS",
        "REDIS_PWD",
        "SENTRY_DSN",
        "MY_PW",
        "PIN",
        "CRED_X",
        "ACCESS_TOKENS",
    ],
)
def test_names_of_variables_tell_secrets(name: str) -> None:
    assert is_secret_variable(name)


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "PWD",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
        "VLLM_MAX_TOKENS",
        "TOKENIZERS_PARALLELISM",
        "MONKEY",
    ],
)
def test_others_are_shown(name: str) -> None:
    assert not is_secret_variable(name)


@pytest.mark.parametrize(
    "option",
    [
        "--api-key",
        "--ssl-keyfile-password",
        "--hf_token",
        "--auth",
        "--otlp-headers",
        "--x.api_key",
        "--apikey",
    ],
)
def test_options_tell_secrets(option: str) -> None:
    assert is_secret_option(option)
    assert [*masked_words(["a", option, SECRET, "b"])] == ["a", option, "***", "b"]
    assert [*masked_words([f"{option}={SECRET}"])] == [f"{option}=***"]
    assert [*masked_words([option, "--flag"])] == [option, "--flag"]


@pytest.mark.parametrize(
    "option",
    [
        "--max-num-batched-tokens",
        "--tokenizer",
        "--ssl-keyfile",
        "--enable-prompt-tokens-details",
        "--key-file",
    ],
)
def test_other_options_are_shown(option: str) -> None:
    assert [*masked_words([option, "4096"])] == [option, "4096"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://u:{SECRET}@h:1/x", "http://***@h:1/x"),
        (f"redis://:{SECRET}@h", "redis://***@h"),
        (f"https://{SECRET}@h/?a=b", "https://***@h/?a=b"),
        (f"postgres://u:{SECRET}/x@h/db", "postgres://***@h/db"),
        (f"https://h/x?a=1&api_key={SECRET}&b=2#c", "https://h/x?a=1&api_key=***&b=2#c"),
        (f"https://h/x?X-Amz-Signature={SECRET}", "https://h/x?X-Amz-Signature=***"),
        (f"authorization: Bearer {SECRET}", "authorization: Bearer ***"),
        (f"HF_TOKEN={SECRET} python", "HF_TOKEN=*** python"),
        (f"args: {{'api_key': ['{SECRET}'], 'port': 1}}", "args: {'api_key': [***], 'port': 1}"),
        ("hf_abcdefghijkl", "***"),
        ("ipc://@baton-kv-events-28100", "ipc://@baton-kv-events-28100"),  # a name in the kernel, no user
        ("http://127.0.0.1:8000/v1?model=a@b", "http://127.0.0.1:8000/v1?model=a@b"),
        ("a@b.example", "a@b.example"),
    ],
)
def test_secrets_in_texts(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (f'{{"a": {{"auth_token": "{SECRET}"}}, "b": 1}}', '{"a":{"auth_token":"***"},"b":1}'),
        (f'["--api-key", "{SECRET}", "x"]', '["--api-key","***","x"]'),
        (f'[{{"url": "http://u:{SECRET}@h"}}]', '[{"url":"http://***@h"}]'),
        ('{"a":   1}', '{"a":   1}'),
        (f"--api-key {SECRET} --port 1", "--api-key *** --port 1"),
        (f"{{not json --api-key={SECRET}", "{not json --api-key=***"),
    ],
)
def test_secrets_in_values(value: str, shown: str) -> None:
    assert masked_value(value) == shown


@pytest.mark.processes
@pytest.mark.parametrize(
    "text", ["plain", "two words", "it's", "a\nb", "\x1b[31mred", "\\\x07'\"$x", "\u202eright to left", "é\t"]
)
def test_a_word_of_a_shell_steers_nothing_and_means_the_same(text: str) -> None:
    word = shell_word(text)
    assert one_line(word) == word
    if text.isprintable():
        assert shlex.split(word) == [text]
    script = f"printf %s {word}"
    told = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert told.stdout.decode() == text


def test_mistakes_of_a_config_repeat_no_secret_and_steer_nothing() -> None:
    problem = Problem(Mark("a\x1b.yaml", 1, 2), f"no such thing: 'http://u:{SECRET}@h'\nsecond line")
    assert str(problem) == r"a\x1b.yaml:1:2: no such thing: 'http://***@h'\nsecond line"


def test_one_is_no_plural() -> None:
    assert [counted(number, "request") for number in (0, 1, 2)] == ["0 requests", "1 request", "2 requests"]
