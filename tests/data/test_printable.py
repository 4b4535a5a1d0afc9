from __future__ import annotations

import pytest

from pharmacist_ray.data.printable import names_a_secret, printable, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "⟨U+001B⟩[31mred"), ("\x9b2J", "⟨U+009B⟩2J"), ("a\rb", "a⟨U+000D⟩b"), ("\u202egnp", "⟨U+202E⟩gnp"),
        ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"), ("\ud800", "⟨U+D800⟩"), ("\x7f\x00", "⟨U+007F⟩⟨U+0000⟩"), ("\u2028", "⟨U+2028⟩"),
        ("\U000e0041", "⟨U+E0041⟩"), ("Grüße, 你好 🙂", "Grüße, 你好 🙂"),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_written_out(text, shown):
    assert printable(text) == shown
    assert all(char.isprintable() for char in shown)


def test_line_breaks_are_kept_where_they_may_stand():
    assert printable("a\nb\t\x1b", keep="\n\t") == "a\nb\t⟨U+001B⟩"
    assert printable("a\nb") == "a⟨U+000A⟩b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:hunter2@bucket/x", "s3://***@bucket/x"),
        ("s3://me:hun/ter2@bucket/x", "s3://***@bucket/x"),
        ("see https://tok@host/a and s3://a:b@c", "see https://***@host/a and s3://***@c"),
        ("s3://b/x?secret_key=abc&region=eu", "s3://b/x?secret_key=***&region=eu"),
        ("s3://b/x?region=eu&access_key=abc&X-Amz-Signature=99#f", "s3://b/x?region=eu&access_key=***&X-Amz-Signature=***#f"),
        ("gs://b/x?session_token=a%2Fb", "gs://b/x?session_token=***"),
        ("https://host/watch?v=abc&tokens=3", "https://host/watch?v=abc&tokens=3"),
        ("mail me@example.org, key=abc", "mail me@example.org, key=abc"),
    ],
)
def test_uris_lose_their_credentials_and_nothing_else(text, shown):
    assert without_secrets(text) == shown


def test_a_key_says_whether_its_value_is_a_secret():
    assert [key for key in ("hub_token", "api_key", "password", "max_new_tokens", "tokens_per_batch", "keyed") if names_a_secret(key)] == [
        "hub_token", "api_key", "password",
    ]  # fmt: skip
