"""docs/requirements.md says of every core requirement, once, what stands behind it; what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The numbers of the core requirements of the checklist: single ones and ranges.
CORE = """1-12 17-19 24-29 33-40 42 44 46-48 51-52 54-60 62-67 71-77 80-83 87-93 95-99 105-112 118-121 123-128 131-139 144-147
154-160 162-166 172 177-181 190-196 198-199 201 203 205-208 211-213 215-217 221-223 225-228 230 233 236-239 241-245 248-252
254-258 262-267 273"""
CHECKS = {"M1": 10, "M2": 9, "M3": 8, "M4": 10, "M5": 7}


def lines() -> list[list[str]]:
    text = (ROOT / "docs" / "requirements.md").read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if re.match(r"\| [RPM]\d", line)]


def core() -> list[str]:
    spans = [[int(end) for end in span.split("-")] for span in CORE.split()]
    return [f"R{number:03}" for span in spans for number in range(span[0], span[-1] + 1)]


def test_every_core_requirement_has_one_line():
    assert [line[0] for line in lines() if line[0].startswith("R")] == core()
    assert len(core()) == 177


def test_a_line_names_a_module_that_exists_or_says_why_there_is_none():
    for name, state, by, why in (line for line in lines() if not line[0].startswith("M")):
        assert state in ("holds", "in part", "postponed", "declined"), name
        assert bool(by) == (state in ("holds", "in part")), name
        assert why or state == "holds", name
        assert not by or (ROOT / by.strip("`")).is_file(), f"{name} names {by}"


def test_every_check_is_there_and_its_tests_exist():
    checks = [line for line in lines() if line[0].startswith("M")]
    assert [line[0] for line in checks] == [f"{part}.{i}" for part, count in CHECKS.items() for i in range(1, count + 1)]
    for name, tests, said in checks:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named or said, f"{name} has neither a test nor a reason"
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{name} names {file}::{test}"
