import hmac
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.keys import Key, KeyFileError, KeyLimits, KeyRing, Scope, line_of, load_keys
from orchestrator.config.options import OrchestratorConfig
from orchestrator.errors import MissingScope, StartError, Unauthorized


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


RING = KeyRing(Key(name, sha256(name.encode()).digest()) for name in ("alpha", "beta", "gamma"))


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER", b"  Bearer  "])
def test_a_key_is_known_by_its_name(scheme: bytes) -> None:
    assert RING.check(scheme + b" beta") == "beta"


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"beta",
        b"Basic beta",
        b"Bearer wrong",
        b"Bearer beta extra",
        b"Bearerbeta",
        b"Bearer b\xe9ta",
        "Bearer é".encode(),
        b"Bearer beta\x00",
        b"Bearer " + digest("beta").encode(),
        b"Bearer " + b"x" * 100_000,
    ],
    ids=repr,
)
def test_everything_else_is_refused(authorization: bytes | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        RING.check(authorization)
    assert caught.value.status == 401
    assert "beta" not in caught.value.message


@given(st.binary(max_size=300))
def test_no_header_value_is_an_error_of_ours(authorization: bytes) -> None:
    with pytest.raises(Unauthorized):
        RING.check(authorization)


@pytest.mark.parametrize("key", ["alpha", "beta", "gamma", "none"])
def test_every_key_is_compared_whichever_fits(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    if key == "none":
        with pytest.raises(Unauthorized):
            RING.check(b"Bearer none")
    else:
        RING.check(f"Bearer {key}".encode())
    assert len(compared) == 3
    assert {len(value) for pair in compared for value in pair} == {32}


def test_a_file_is_read_with_comments_and_blank_lines(key_file: Path) -> None:
    key_file.write_text(f"# who may ask\n\nalice {digest('s3cret')}\n  bob\t{digest('other').upper()}  \n")
    ring = KeyRing.load(key_file)
    assert len(ring) == 2
    assert ring.check(b"Bearer s3cret") == "alice"
    assert ring.check(b"Bearer other") == "bob"


def test_all_mistakes_are_told_at_once_with_their_lines_and_without_their_text(key_file: Path) -> None:
    good = digest("s3cret")
    lines = [
        f"alice {good}",
        "bob sk-plaintext-key",
        "carol",
        f"dave {good} extra",
        f"e/ve {digest('e')}",
        f"alice {digest('a')}",
        f"frank {good}",
    ]
    key_file.write_text("\n".join(lines))
    with pytest.raises(KeyFileError) as caught:
        KeyRing.load(key_file)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"{key_file}:{number}" for number in range(2, 8)
    ]
    assert "sk-plaintext-key" not in str(caught.value)
    assert good not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"# nobody\n", b"\xff\xfe"])
def test_a_file_without_keys_is_refused(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"no keys|not UTF-8"):
        KeyRing.load(key_file)


def test_a_missing_file_is_an_os_error(key_file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        KeyRing.load(key_file)


def test_a_ring_shows_names_only() -> None:
    assert repr(RING) == "KeyRing(alpha, beta, gamma)"


def test_without_a_key_file_everybody_may_ask() -> None:
    assert load_keys(OrchestratorConfig()) is None


def test_the_key_file_of_the_config_is_loaded(key_file: Path) -> None:
    key_file.write_text(f"mine {digest('s3cret')}")
    ring = load_keys(OrchestratorConfig(api_keys_file=str(key_file)))
    assert ring is not None
    assert ring.check(b"Bearer s3cret") == "mine"


@pytest.mark.parametrize("text", ["mine", None])
def test_a_start_fails_with_what_is_wrong_with_the_key_file(key_file: Path, text: str | None) -> None:
    if text is not None:
        key_file.write_text(text)
    reason = "No such file" if text is None else f"{key_file}:1: expected NAME SHA256HEX"
    with pytest.raises(StartError, match=f"^api_keys_file: .*{reason}"):
        load_keys(OrchestratorConfig(api_keys_file=str(key_file)))


# --- scopes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "scopes"),
    [
        ("", {"infer"}),  # a file from before there were scopes: its keys are clients'
        ("infer", {"infer"}),
        ("metrics", {"metrics"}),
        ("admin", {"admin", "metrics"}),
        ("admin,infer", {"admin", "metrics", "infer"}),
    ],
)
def test_a_key_may_do_what_its_line_says(key_file: Path, word: str, scopes: set[Scope]) -> None:
    key_file.write_text(f"alice {digest('s3cret')} {word}\n")
    ring = KeyRing.load(key_file)
    names: tuple[Scope, ...] = ("infer", "metrics", "admin")
    for scope in names:
        if scope in scopes:
            assert ring.check(b"Bearer s3cret", scope=scope) == "alice"
        else:
            with pytest.raises(MissingScope, match=f"lacks the scope {scope}; it has ") as caught:
                ring.check(b"Bearer s3cret", scope=scope)
            assert caught.value.status == 403


@pytest.mark.parametrize("word", ["root", "admin,", ",", "infer,root", "Admin"])
def test_other_scopes_are_a_mistake_in_the_line(key_file: Path, word: str) -> None:
    key_file.write_text(f"# one\nalice {digest('s3cret')} {word}\n")
    with pytest.raises(KeyFileError) as caught:
        KeyRing.load(key_file)
    assert caught.value.problems == [
        f"{key_file}:2: scopes are infer, metrics, admin, with commas between them"
    ]


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "limits", "scopes"),
    [
        ("", KeyLimits(), {"infer"}),
        ("rpm=600", KeyLimits(rpm=600), {"infer"}),
        ("metrics,infer weight=0.5 tpm=0", KeyLimits(tpm=0, weight=0.5), {"metrics", "infer"}),
        (
            "infer rpm=1 tpm=100000 concurrency=8 weight=2",
            KeyLimits(rpm=1, tpm=100_000, concurrency=8, weight=2.0),
            {"infer"},
        ),
    ],
)
def test_a_line_may_have_limits(key_file: Path, words: str, limits: KeyLimits, scopes: set[Scope]) -> None:
    key_file.write_text(f"alice {digest('s3cret')} {words}\n")
    (key,) = KeyRing.load(key_file)
    assert (key.limits, key.scopes) == (limits, scopes)
    key_file.write_text(line_of(key))
    assert [*KeyRing.load(key_file)] == [key]


COUNT = "is a whole number up to 1000000000000, 0 for no limit"
KNOWN = "limits are rpm=N, tpm=N, concurrency=N, weight=N, with blanks between them"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("rpm=-1", f"rpm (requests per minute) {COUNT}"),
        ("rpm=1.5", f"rpm (requests per minute) {COUNT}"),
        ("rpm=", f"rpm (requests per minute) {COUNT}"),
        ("rpm=\u0661", f"rpm (requests per minute) {COUNT}"),
        ("tpm=1e5", f"tpm (tokens per minute) {COUNT}"),
        ("tpm=9999999999999", f"tpm (tokens per minute) {COUNT}"),
        (f"tpm={'9' * 10_000}", f"tpm (tokens per minute) {COUNT}"),
        ("concurrency=many", f"concurrency (requests at a time) {COUNT}"),
        ("weight=0", "weight is a number from 0.001 to 1000"),
        ("weight=nan", "weight is a number from 0.001 to 1000"),
        ("weight=1001", "weight is a number from 0.001 to 1000"),
        ("rpm=1 rpm=2", "rpm is given twice"),
        ("rpn=1", KNOWN),
        ("rpm=1 infer", KNOWN),
        ("infer rpm", KNOWN),
        ("infer sk-secret=1", KNOWN),
    ],
)
def test_what_is_no_limit_is_a_mistake_in_the_line(key_file: Path, words: str, problem: str) -> None:
    key_file.write_text(f"# one\nalice {digest('s3cret')} {words}\n")
    with pytest.raises(KeyFileError) as caught:
        KeyRing.load(key_file)
    assert caught.value.problems == [f"{key_file}:2: {problem}"]


def test_what_nobody_may_do_is_said_at_the_start(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    key_file.write_text(f"alice {digest('s3cret')}\n")
    load_keys(OrchestratorConfig(api_keys_file=str(key_file), admin="127.0.0.1:1"))
    assert "no key in" in caplog.text
    assert "has the scope admin" in caplog.text
    caplog.clear()
    key_file.write_text(f"alice {digest('s3cret')} infer,admin\n")
    load_keys(OrchestratorConfig(api_keys_file=str(key_file), admin="127.0.0.1:1"))
    assert caplog.text == ""
