"""What may not stand in the code, or in one file only: names of devices, pickle, shells, megatron's globals."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "megatron_xy").rglob("*.py"))
CODE = [*PACKAGE, *sorted((ROOT / "tools").glob("*.py"))]
FOLDERS = ("megatron_xy", "tools", "tests", "examples", "docs", ".ci", "deploy")
PROSE_AND_CODE = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".cfg", ".json", ""}

Finder = Callable[[ast.AST], str | None]

# Modules that run what a file holds when they read it.
PICKLING_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "torch.save",
    "torch.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "eval",
    "exec",
    "compile",
    "__import__",
}
PICKLING_COLLECTIVES = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?")
DEVICE_OR_BACKEND = re.compile(r"(cpu:)?(gloo|nccl)|cuda:?\d*|(cpu:gloo,)?cuda:nccl", re.IGNORECASE)

# Written so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(wor[k]|hom[e]|roo[t])/")
REGISTRY_HOSTS = re.compile(r"pypi[.]org|pythonhosted[.]org|anaconda[.]org|npmjs[.]|hf-mirror[.]|tuna[.]tsinghua")


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def imported(node: ast.AST) -> Iterator[str]:
    """The dotted names that an import statement brings in."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def docstrings(tree: ast.AST) -> set[int]:
    """The identities of the constants that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and ast.get_docstring(node) is not None
    }


def found(source: str, finder: Finder) -> list[str]:
    """`LINE: what` of everything in the source that the finder names."""
    tree = ast.parse(source)
    skipped = docstrings(tree)
    finds = ((node, finder(node)) for node in ast.walk(tree) if id(node) not in skipped)
    return [f"{getattr(node, 'lineno', 0)}: {what}" for node, what in finds if what]


def device_name(node: ast.AST) -> str | None:
    """torch.cuda, Tensor.cuda(), and the names of devices and backends as strings."""
    if isinstance(node, ast.Attribute) and node.attr in ("cuda", "nccl"):
        return dotted(node) or f".{node.attr}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and DEVICE_OR_BACKEND.fullmatch(node.value):
        return repr(node.value)
    return next((name for name in imported(node) if name.split(".")[:2] == ["torch", "cuda"]), None)


def runs_what_it_reads(node: ast.AST) -> str | None:
    """Pickle in any of its clothes, code from strings, and shells."""
    for name in imported(node):
        if name.split(".")[0] in PICKLING_MODULES or name in FORBIDDEN_CALLS:
            return name
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        if name in FORBIDDEN_CALLS or PICKLING_COLLECTIVES.fullmatch(name.rpartition(".")[2]):
            return name
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                return f"{keyword.arg}="
    return None


def operation_with_advisory(node: ast.AST) -> str | None:
    """torch's operations of which megatron_xy/doctor/advisories.yaml says that nothing here calls them."""
    name = getattr(node, "attr", getattr(node, "id", ""))
    if name in ("mkldnn_max_pool2d", "ctc_loss", "CTCLoss", "lstm_cell", "LSTMCell", "unpack_sequence"):
        return str(name)
    names = [dotted(node), *imported(node)]
    return "torch.jit.script" if "torch.jit.script" in names else None


def megatron(node: ast.AST) -> str | None:
    """An import of megatron."""
    return next((name for name in imported(node) if name.split(".")[0] == "megatron"), None)


def parallel_state(node: ast.AST) -> str | None:
    """megatron-core's global process groups under any name that holds theirs."""
    names = [*imported(node), getattr(node, "id", ""), getattr(node, "attr", "")]
    return next((name for name in names if isinstance(name, str) and "parallel_state" in name), None)


RULES: dict[str, tuple[Finder, set[str], str, list[str]]] = {
    # rule: finder, files that may, what a refused source looks like
    "devices and backends": (
        device_name,
        {"megatron_xy/device.py", "megatron_xy/cuda_stand_in.py"},
        "import torch\n",
        [
            "torch.cuda.synchronize()",
            "x = y.cuda()",
            "from torch.cuda import Stream",
            "import torch.cuda.nvtx",
            'a = torch.zeros(1, device="cuda")',
            'a = f"cuda:{rank}"',
            'start("nccl")',
            'start(backend="gloo")',
        ],
    ),
    "pickle, code and shells": (
        runs_what_it_reads,
        set(),
        "import os\n",
        [
            "import pickle",
            "from pickle import loads",
            "torch.save(a, b)",
            "from torch import load",
            "yaml.load(a)",
            "run(a, shell=True)",
            "run(a, shell=flag)",
            "np.load(a, allow_pickle=True)",
            "os.system(a)",
            "eval(a)",
            "exec(a)",
            "dist.all_gather_object(a, b)",
            "dist.broadcast_object_list(a)",
        ],
    ),
    "operations with advisories": (
        operation_with_advisory,
        set(),
        "import torch\n",
        [
            "torch.mkldnn_max_pool2d(a, 2)",
            "F.ctc_loss(a, b, c, d)",
            "loss = CTCLoss()",
            "@torch.jit.script\ndef f(a): ...",
            "from torch.jit import script",
        ],
    ),
    "megatron": (
        megatron,
        # The benchmark's rival is megatron-core's own dataset builder.
        {"megatron_xy/mcore.py", "tools/bench_tokenize.py"},
        "import megatron_xy\n",
        ["import megatron.core", "from megatron.core import mpu", "def f():\n    from megatron import core"],
    ),
    "parallel_state": (
        parallel_state,
        {"megatron_xy/mcore.py"},
        "x = 1\n",
        ["from a import parallel_state", "a = mcore.parallel_state.get()", "from a import parallel_state as mpu"],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_code_keeps_the_rule(rule: str) -> None:
    finder, allowed, _, _ = RULES[rule]
    places = [
        f"{path.relative_to(ROOT)}:{find}"
        for path in CODE
        if path.relative_to(ROOT).as_posix() not in allowed
        for find in found(path.read_text(encoding="utf-8"), finder)
    ]
    assert not places, "\n".join(places)


@pytest.mark.parametrize("rule", RULES)
def test_rule_sees_what_it_refuses(rule: str) -> None:
    finder, _, harmless, refused = RULES[rule]
    assert not found(f'"""Says torch.cuda, pickle, eval, megatron."""\n{harmless}', finder)
    for source in refused:
        assert found(source, finder), source


def test_exceptions_are_still_needed() -> None:
    for finder, allowed, _, _ in RULES.values():
        for path in allowed:
            assert found((ROOT / path).read_text(encoding="utf-8"), finder), path


def test_no_torch_function_mode() -> None:
    """The stand-in costs nothing in a torch call; a mode is asked in every one: what a dry run's ledger is for."""
    for path in CODE:
        if path == ROOT / "megatron_xy" / "dryrun" / "ledger.py":
            continue
        names = {
            getattr(node, "id", getattr(node, "attr", ""))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        }
        assert not names & {"TorchFunctionMode", "TorchDispatchMode", "BaseTorchFunctionMode"}, path


def test_public_names_have_docstrings() -> None:
    bare = []
    for path in PACKAGE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            bare.append(f"{path.relative_to(ROOT)}: the file")
        bare += [f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}" for node in public_names(tree)]
    assert not bare, "\n".join(bare)


def public_names(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions, classes and their methods without a docstring that others may call."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from public_names(node)


def test_public_names_sees_a_bare_one() -> None:
    tree = ast.parse('class A:\n    """Says."""\n    def b(self): ...\n    def _c(self): ...\ndef _d(): ...')
    assert [node.name for node in public_names(tree)] == ["b"]


def test_no_machine_and_no_registry_is_named() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    places = []
    for path in files:
        if path.suffix not in PROSE_AND_CODE or "__pycache__" in path.parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := MACHINE_PATHS.search(line) or REGISTRY_HOSTS.search(line):
                places.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not places, "\n".join(places)
    slash, dot = "/", "."
    assert MACHINE_PATHS.search(f"cd {slash}work{slash}main") and REGISTRY_HOSTS.search(f"https://pypi{dot}org/simple")
