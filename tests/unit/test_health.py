"""`doctor`'s findings: versions against ranges, advisories against versions, limits, the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import tomllib
from pathlib import Path

import pytest
import yaml

from megatron_xy.doctor import health
from megatron_xy.doctor.health import is_below, machine_findings
from megatron_xy.packages import PACKAGES, Accepted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("version", "limit", "below"),
    [
        ("2.5.1", "2.6", True),
        ("2.6.0+cu128", "2.6", False),
        ("2.13.0", "2.6", False),
        ("0.16.1", "0.20", True),
        ("0.20.0rc1", "0.20", False),
        ("4.25", "4.25.8", True),
    ],
)
def test_versions_compare_by_number(version: str, limit: str, below: bool) -> None:
    assert is_below(version, limit) is below


def test_accepted_versions_are_those_that_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for name, accepted in PACKAGES.items():
        wanted = next((line for line in lines if re.split(r"[\[<>=]", line)[0] == name), "")
        if accepted.lowest is not None:
            assert (wanted in project["dependencies"]) == accepted.is_needed
        if ">" in wanted and accepted.lowest is not None:
            assert wanted == f"{name}{accepted.specifier}"


def test_this_machine_passes_and_nothing_stays(tmp_path: Path) -> None:
    findings = {finding.subject: finding for finding in machine_findings(tmp_path, has_gpu=False)}
    assert {"torch", "megatron-core", "open files", "locked memory", "/dev/shm", "free space", "disk writes"} <= set(
        findings
    )
    assert not [finding for finding in findings.values() if finding.verdict == "fail"]
    assert "MB/s" in findings["disk writes"].found and "has them" in findings["file locks"].found
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ok_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "numpy", Accepted("99", is_needed=True))
    monkeypatch.setitem(PACKAGES, "no-such-package", Accepted("1", "2", is_needed=True))
    monkeypatch.setitem(PACKAGES, "transformers", Accepted("1", "2"))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (512, 512))
    findings = machine_findings(tmp_path, has_gpu=True)
    verdicts = {finding.subject: finding.verdict for finding in findings}
    assert verdicts["numpy"] == verdicts["no-such-package"] == verdicts["open files"] == "fail"
    assert verdicts["transformers"] == "warn"
    assert all(finding.remedy for finding in findings if finding.verdict != "ok")
    assert "pip install 'no-such-package>=1,<2'" in [finding.remedy for finding in findings]


def test_a_folder_that_takes_no_runs_fails_by_itself(tmp_path: Path) -> None:
    findings = machine_findings(tmp_path / "none", has_gpu=False)
    (disk,) = (finding for finding in findings if finding.verdict == "fail")
    assert disk.subject == "disk writes" and "is no folder" in disk.found and "--folder" in disk.remedy
    read_only = Path("/proc")
    (disk,) = (finding for finding in machine_findings(read_only, has_gpu=False) if finding.subject == "disk writes")
    assert disk.verdict == "fail" and disk.remedy


def test_a_folder_without_locks_fails_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _kind: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    (locks,) = (found for found in machine_findings(tmp_path, has_gpu=False) if found.subject == "file locks")
    assert locks.verdict == "fail" and str(tmp_path) in locks.found and locks.remedy.startswith("mount it with them")


def test_an_old_version_meets_its_advisory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "version_of", lambda package: "2.5.1")
    told = {finding.subject: finding for finding in machine_findings(tmp_path, has_gpu=False)}
    assert told["CVE-2025-3000"].verdict == "ok" and "no version is without it" in told["CVE-2025-3000"].found
    assert told["CVE-2025-32434"].verdict == "warn" and "torch>=2.6.0" in told["CVE-2025-32434"].remedy


def test_every_advisory_names_a_test_that_is_there() -> None:
    entries = yaml.safe_load((ROOT / "megatron_xy" / "doctor" / "advisories.yaml").read_text())
    for entry in entries:
        named = re.match(r'(tests/[\w/]+\.py)(?:::(test_\w+)|, rule "([^"]+)")', entry["test"])
        assert named is not None, entry["id"]
        text = (ROOT / named[1]).read_text()
        assert (f"def {named[2]}(" if named[2] else f'"{named[3]}": (') in text, entry["id"]
        assert entry["package"] in PACKAGES or entry["package"] == "protobuf"
