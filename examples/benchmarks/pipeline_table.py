"""Which pipelines work beside a patch: the outcomes of `tests/table.py`, as JSON for the README's table."""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from _common import add_common_options, environment, print_table, write_json

ROOT = Path(__file__).parents[2]
TESTS = {
    "test_where_nothing_needs_blocking_the_result_is_the_unpatched_one": "unblocked",
    "test_all_is_blocked_and_restored": "blocked",
    "test_what_is_exact_gives_the_unpatched_result": "exact",
}
# As in "test_all_is_blocked_and_restored[Stable Diffusion XL: IP-Adapter]".
NAMED = re.compile(r"(?P<test>\w+)\[(?P<family>[^:]+): (?P<name>.+)\]")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--junit", type=Path, help="what `pytest --junitxml` wrote, to be read instead of running it")
    add_common_options(parser, "pipelines")
    return parser.parse_args()


def run_tests(report: Path) -> None:
    """A test that fails is an outcome like any other; what keeps the tests from running is not."""
    command = [sys.executable, "-m", "pytest", "-q", "tests", "-k", " or ".join(TESTS), f"--junitxml={report}"]
    finished = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    if finished.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {finished.returncode}")


def outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
    return kinds.pop() if kinds else "passed"


def outcomes(report: Path) -> dict[str, dict[str, dict[str, str]]]:
    """By family, pipeline and question."""
    results: dict[str, dict[str, dict[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        named = NAMED.fullmatch(case.get("name", ""))
        if named and named["test"] in TESTS:
            pipelines = results.setdefault(named["family"], {})
            pipelines.setdefault(named["name"], {})[TESTS[named["test"]]] = outcome(case)
    return results


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [family, name, *(answers.get(question, "not run") for question in TESTS.values())]
        for family, pipelines in results.items()
        for name, answers in pipelines.items()
    ]


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        junit = options.junit or Path(folder) / "junit.xml"
        if not options.junit:
            run_tests(junit)
        results = outcomes(junit)
    report = {"question": __doc__, "environment": environment(), "note": options.note, "results": results}
    write_json(options.out, report)
    print_table(("family", "pipeline", *TESTS.values()), rows(results))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
