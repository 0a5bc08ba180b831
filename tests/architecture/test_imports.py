"""Imports run one way, down the floors of pyproject.toml: its contracts hold, cover every file and can fail."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def contracts() -> dict[str, dict]:
    """The contracts of pyproject.toml by their id."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """lint-imports over the package in `folder`, by the contracts of pyproject.toml."""
    command = [sys.executable, "-c", LINT_IMPORTS, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_every_contract_holds() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(contracts())} kept, 0 broken" in result.stdout


def test_every_contract_can_fail(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megatron_xy", tmp_path / "megatron_xy", ignore=shutil.ignore_patterns("__pycache__"))
    for file, planted in {
        "yaml_file.py": "from megatron_xy.training import trainer",
        "training/train_step.py": "from megatron.core import parallel_state",
        "data/draws/sampler.py": "import torch",
    }.items():
        path = tmp_path / "megatron_xy" / file
        path.write_text(path.read_text(encoding="utf-8") + f"\n\ndef planted():\n    {planted}\n", encoding="utf-8")

    result = lint(tmp_path)

    assert result.returncode == 1, result.stdout + result.stderr
    for contract in contracts().values():
        assert f"{contract['name']} BROKEN" in result.stdout
    assert "0 kept" in result.stdout


def test_every_file_stands_on_one_floor() -> None:
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "megatron_xy").rglob("*.py")]
    modules = sorted(".".join(path.parts) for path in files if path.name != "__init__")
    assert sorted(contracts()["floors"]["layers"]) == modules


def test_packages_import_nothing_but_their_own_files() -> None:
    """A package stands on no floor; it may hand on what its files, which do, offer to others."""
    for path in (ROOT / "megatron_xy").rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_own = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
            assert is_own or not isinstance(node, ast.Import | ast.ImportFrom), f"{path}:{node.lineno}"


def test_what_never_imports_torch_is_all_of_what_does_not() -> None:
    """The list of torch-free files is complete: whatever reaches torch, or what brings it, by no way is on it."""
    graph = grimp.build_graph("megatron_xy", include_external_packages=True, cache_dir=None)
    contract = contracts()["torch-free"]
    listed, forbidden = set(contract["source_modules"]), contract["forbidden_modules"]
    free = {
        module
        for module in contracts()["floors"]["layers"]
        if not any(graph.chain_exists(importer=module, imported=name) for name in forbidden)
    }
    in_lists = {module for module in free if any(f"{module}.".startswith(f"{package}.") for package in listed)}
    assert free == in_lists
