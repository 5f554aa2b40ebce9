"""What a base model's own card says of its licence, also of a card that somebody made to keep a reader busy."""

from __future__ import annotations

import time

import pytest

from tools.export.base_licence import MAX_CARD_BYTES, base_facts


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\nbase_model: 'someone/first'\n---\n", {"licence": "apache-2.0"}),
        ("---  \r\nlicense: mit\r\n---\r\nlicense: other\r\n", {"licence": "mit"}),
        ("---\nlicense: mit\n", {}),
        ("# Card\n---\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_the_head_of_a_card_names_the_licence(tmp_path, card, expected):
    (tmp_path / "README.md").write_bytes(card.encode())
    found = base_facts(str(tmp_path))
    assert found.get("licence") == expected.get("licence")
    assert found.get("origin") == ("someone/first" if "someone" in card else None)


@pytest.mark.parametrize("filling", ["\n", " \n", "-\n", "\t"])
def test_a_card_of_any_length_is_read_at_once(tmp_path, filling):
    (tmp_path / "README.md").write_text("---" + filling * (MAX_CARD_BYTES // len(filling)))
    began = time.monotonic()
    assert base_facts(str(tmp_path)) == {}
    assert time.monotonic() - began < 5
