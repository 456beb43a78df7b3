"""docs/config.md lists every key, and is what the schema says."""

from pathlib import Path

from ilm_compile.config.reference import reference
from ilm_compile.config.schema import SECTIONS
from ilm_compile.internevo.config.keys import KEYS

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_of_keys_is_up_to_date() -> None:
    remedy = "python -m ilm_compile.config.reference > docs/config.md"
    assert PAGE.read_text() == reference(), f"run: {remedy}"


def test_the_page_has_every_key() -> None:
    page = reference()
    for key in KEYS:
        assert f"| {key} | " in page
    for name, section in SECTIONS.items():
        part = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for key in section.__dataclass_fields__:
            assert f"\n| {key} | " in part, key
