"""The shape of the code, read from its syntax trees: which way imports go, and what is done in one place only.

launch -> train -> parallel -> kernels, and everybody may read conf; train/__main__.py is the one door upward.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import shoestring

ROOT = Path(shoestring.__file__).resolve().parent
ORDER = ["conf", "kernels", "parallel", "train", "launch"]  # each may import those before it, but kernels .. launch only conf beside
DOORS = {"train/__main__.py"}
EDGES = {"parallel/_torch.py", "kernels/_torch.py", "kernels/_triton.py"}  # where private torch and triton may be used
LIBRARIES = {"torch", "triton"}


def sources() -> dict[str, str]:
    """Path in the tree -> text, of every module of the package."""
    files = [path for folder in ORDER for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def imports(path: str, text: str) -> Iterator[tuple[ast.stmt, str]]:
    """Every module of ours that a file imports, as a path without its suffix ("train/cost", or "train" for the package itself)."""
    folder = path.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node, "/".join([*base, alias.name])
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "shoestring":
            for alias in node.names:
                yield node, "/".join([*node.module.split(".")[1:], alias.name])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "shoestring":
                    yield node, "/".join(alias.name.split(".")[1:])


def upward(path: str, text: str) -> list[str]:
    mine = ORDER.index(path.split("/")[0])
    found = [target for _, target in imports(path, text) if target.split("/")[0] in ORDER]
    return [target for target in found if ORDER.index(target.split("/")[0]) > mine] if path not in DOORS else []


def absolute(path: str, text: str) -> list[str]:
    """Between folders imports are relative, so that editors follow them from the tree as it lies."""
    return [target for node, target in imports(path, text) if not getattr(node, "level", 0)]


def local(path: str, text: str) -> list[str]:
    """Imports of our own code inside a function."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lines = {node.lineno for function in functions for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))}
    return [target for node, target in imports(path, text) if node.lineno in lines]


def environment(path: str, text: str) -> list[str]:
    """Reads or writes of environment variables, by any of their names."""
    if path.startswith("launch/"):
        return []
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    tree = ast.parse(text)
    imported = [a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "os" for a in n.names]
    reached = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    return [name for name in imported + reached if name in names]


def private(path: str, text: str) -> list[str]:
    """Private parts of torch and triton: imported, or reached through a name that was imported from them."""
    if path in EDGES:
        return []
    hidden = lambda dotted: any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))
    found, roots = [], set()
    for node in ast.walk(tree := ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    roots.add((alias.asname or alias.name).split(".")[0])
                    found += [alias.name] if hidden(alias.name) else []
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                roots.add(alias.asname or alias.name)
                found += [f"{node.module}.{alias.name}"] if hidden(f"{node.module}.{alias.name}") else []
    return found + [d for n in ast.walk(tree) if isinstance(n, ast.Attribute) and hidden(d := _dotted(n)) and d.split(".")[0] in roots]


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of names alone; "" for anything else, such as an attribute of a call's result."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def cycles(texts: dict[str, str]) -> list[list[str]]:
    """Modules that import each other, directly or in a ring."""
    modules = {path.removesuffix(".py").removesuffix("/__init__"): path for path in texts}
    graph = {}
    for module, path in modules.items():
        targets = {t if t in modules else t.rpartition("/")[0] for _, t in imports(path, texts[path])}
        graph[module] = {t for t in targets if t in modules and t != module}
    found, done = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def runs_data(path: str, text: str) -> list[str]:
    """What could run a program that is in a file: pickles, code in models, YAML tags, classes by name, shells."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [module for module in modules if module.split(".")[0] in ("marshal", "shelve", "dill", "cloudpickle", "joblib")]
            found += ["from pickle"] * (isinstance(node, ast.ImportFrom) and node.module == "pickle")
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in RUNNERS or (name in ("pickle.load", "pickle.loads", "pickle.Unpickler") and path not in UNPICKLES):
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load of more than tensors")
        if name in ("yaml.load", "yaml.load_all") and "SafeLoader" not in given.get("Loader", ""):
            found.append("yaml.load with any tag")
        if name.split(".")[-1] == "instantiate":
            found.append("instantiate")
        found += [f"{word}=True" for word in ("trust_remote_code", "allow_pickle", "shell") if given.get(word, "False") != "False"]
    return found


RULES = [upward, absolute, local, environment, private, runs_data]
RUNNERS = ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load")
# A restricted unpickler; what our own processes on this machine send one another.
UNPICKLES = ("train/checkpoint/manifest.py", "launch/local.py")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree(rule):
    broken = {path: found for path, text in sources().items() if (found := rule(path, text))}
    assert not broken


def test_no_cycles():
    assert cycles(sources()) == []


def test_every_folder_was_read():
    folders = {path.split("/")[0] for path in sources()}
    assert folders == set(ORDER)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ORDER)


BAD = [
    (upward, "kernels/a.py", "from ..train.cost import flops"),
    (upward, "train/a.py", "from ..launch import cli"),
    (upward, "train/a.py", "from .. import launch"),
    (upward, "conf/a.py", "from ..kernels import linear"),
    (absolute, "train/a.py", "import shoestring.kernels.linear"),
    (absolute, "train/a.py", "from shoestring import conf"),
    (local, "launch/a.py", "def f():\n    from ..train import cost"),
    (local, "launch/a.py", "class A:\n    def f(self):\n        if 1:\n            from . import cli"),
    (environment, "train/a.py", "import os\nx = os.environ['A']"),
    (environment, "train/a.py", "from os import getenv"),
    (private, "train/a.py", "import torch._dynamo"),
    (private, "train/a.py", "from torch._C import Node"),
    (private, "train/a.py", "from torch.distributed import _functional_collectives"),
    (private, "train/a.py", "import torch\ntorch._foreach_add_(a, b)"),
    (private, "train/a.py", "import torch.distributed as dist\ndist.distributed_c10d._get_default_group()"),
]
BAD += [
    (runs_data, "train/a.py", text)
    for text in (
        "import pickle\npickle.loads(x)", "import pickle\npickle.Unpickler(f).load()", "torch.load(f)", "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=safe)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader=yaml.Loader)", "yaml.load(f, yaml.UnsafeLoader)", "yaml.unsafe_load(f)", "hydra.utils.instantiate(c)",
        "instantiate(c)", "eval(x)", "exec(x)", "os.system(x)", "subprocess.run(x, shell=True)", "import dill", "from joblib import load",
        "from pickle import loads",
    )
]  # fmt: skip
GOOD = [
    (upward, "train/a.py", "from ..parallel import groups\nfrom . import cost\nfrom ..conf.schema import Config"),
    (upward, "train/__main__.py", "from ..launch.cli import main"),
    (local, "train/a.py", "from . import cost\ndef f():\n    import os"),
    (environment, "launch/a.py", "import os\nos.environ['A']"),
    (private, "parallel/_torch.py", "from torch._C import Node"),
    (private, "train/a.py", "import torch\ntorch.full((2,), self._size).sum()"),
    (runs_data, "train/a.py", "model.eval()\ntorch.load(f, weights_only=True)\nyaml.safe_load(f)\nyaml.load(f, Loader=yaml.CSafeLoader)"),
    (runs_data, "train/checkpoint/manifest.py", "import pickle\npickle.Unpickler(f).load()"),
    (private, "train/a.py", "import torch\ntorch.__version__\nself._torch = 3\nx._private()"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD, ids=lambda v: getattr(v, "__name__", None))
def test_each_rule_catches_its_offence(rule, path, text):
    assert rule(path, text)


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=lambda v: getattr(v, "__name__", None))
def test_each_rule_leaves_the_innocent_alone(rule, path, text):
    assert not rule(path, text)


def test_a_cycle_is_found_through_three_files_and_through_a_package():
    ring = {"train/a.py": "from .b import x", "train/b.py": "from ..train import c", "train/c.py": "from . import a"}
    assert cycles(ring | {"train/d.py": "from . import a"}) == [["train/a", "train/b", "train/c", "train/a"]]
    assert cycles({"train/__init__.py": "from .a import x", "train/a.py": "from . import y"}) == [["train", "train/a", "train"]]
    assert cycles({"train/__init__.py": "", "train/a.py": "from .b import x", "train/b.py": "import os"}) == []
