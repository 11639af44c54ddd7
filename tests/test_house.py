"""Rules of the house that no single module can keep: light imports, complete `__all__`, data files in the packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import quest_attention

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "quest_attention"
BOTTOM_LAYERS = ("serving", "ops", "pages", "config", "errors")
GPU_ONLY = "quest_attention.ops.triton"


def module_names() -> list[str]:
    """Every module of the package that can be imported here."""
    names = [quest_attention.__name__]
    names += [found.name for found in pkgutil.walk_packages(quest_attention.__path__, "quest_attention.")]
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if not name.startswith(GPU_ONLY)]
    if importlib.util.find_spec("lm_eval") is None:
        names = [name for name in names if name != "quest_attention.eval.lm_eval"]
    if importlib.util.find_spec("vllm") is None:
        names = [name for name in names if not name.startswith("quest_attention.vllm")]
    return names


def is_public(name: str) -> bool:
    """Whether people may import from a module; the command's modules are reached through `quest` alone."""
    if name.startswith("quest_attention.cli."):
        return False
    return not any(part.startswith("_") for part in name.split("."))


def source_files(*layers: str) -> Iterator[Path]:
    for layer in layers:
        folder = SOURCE / layer
        yield from sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_changes_nothing_in_the_world() -> None:
    """Attention functions, mask functions, model classes, torch's settings, warnings, logging, environment, hooks."""
    code = """
import json, logging, os, random, signal, sys, warnings
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama import modeling_llama

def functions(thing):
    return {name: id(value) for name, value in vars(thing).items() if callable(value)}

def world():
    return {
        "attention": {name: id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS.valid_keys()},
        "masks": {name: id(ALL_MASK_ATTENTION_FUNCTIONS[name]) for name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()},
        "classes": [functions(c) for c in (PreTrainedModel, DynamicCache, LlamaForCausalLM, LlamaConfig)],
        "llama": functions(modeling_llama),
        "sdpa": id(torch.nn.functional.scaled_dot_product_attention),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "seed": torch.initial_seed(),
        "random": hash(random.getstate()),
        "precision": torch.get_float32_matmul_precision(),
        "warnings": [str(f) for f in warnings.filters],
        "logging": [str(h) for h in logging.root.handlers] + [logging.root.level],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "hooks": [id(sys.excepthook), id(sys.displayhook)],
        "signals": str(signal.getsignal(signal.SIGINT)),
    }

before = world()
import quest_attention
for name in quest_attention.__all__:
    getattr(quest_attention, name)
after = world()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
    assert json.loads(run_python(code)) == []


def test_importing_is_light() -> None:
    """`import quest_attention` needs the standard library; PyTorch comes with the first name that uses it."""
    code = """
import json, sys
before = set(sys.modules)
import quest_attention
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    heavy = {
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "typer",
        "rich",
        "matplotlib",
        "vllm",
    }
    assert heavy.isdisjoint(json.loads(run_python(code)))


@pytest.mark.parametrize("path", list(source_files(*BOTTOM_LAYERS)), ids=lambda path: str(path.relative_to(SOURCE)))
def test_bottom_layers_import_torch_and_the_standard_library_only(path: Path) -> None:
    """A whitelist, where the import contract can only forbid packages by name; triton inside ops/triton alone."""
    allowed = {"torch", "quest_attention", *sys.stdlib_module_names}
    if path.is_relative_to(SOURCE / "ops" / "triton"):
        allowed.add("triton")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert found <= allowed


def test_only_the_command_line_imports_the_top_of_the_package() -> None:
    """Inside, a name comes from the module that defines it: the top of the package imports all the others."""
    guilty = []
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        # `from quest_attention import pages` is fine, it names a module; __version__ lives at the top.
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "quest_attention":
                names += [
                    "quest_attention"
                    for alias in node.names
                    if not (SOURCE / alias.name).is_dir()
                    and not (SOURCE / f"{alias.name}.py").exists()
                    and alias.name != "__version__"
                ]
        if "quest_attention" in names and not path.is_relative_to(SOURCE / "cli"):
            guilty.append(str(path.relative_to(SOURCE)))
    assert guilty == []


@pytest.mark.parametrize("name", [name for name in module_names() if is_public(name)])
def test_all_is_complete(name: str) -> None:
    """`__all__` names every public class, function and constant that a module defines, and nothing that is missing."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    public = {item for item in defined if not item.startswith("_")}
    if not public and not hasattr(module, "__all__"):
        return
    listed = module.__all__
    assert len(set(listed)) == len(listed), "a name stands twice in __all__"
    assert public <= set(listed), "public names are missing from __all__"
    for item in listed:
        assert hasattr(module, item), f"{item} is in __all__ but not in the module"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of the tree under test."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def package_files() -> set[str]:
    """Every file under src/quest_attention that is not made by running it."""
    return {
        f"quest_attention/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package_files() <= names
    assert {name.split("/")[0] for name in names} == {
        "quest_attention",
        f"quest_attention-{quest_attention.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "quest_attention/py.typed" in names


def test_the_sdist_holds_every_file_of_the_package(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in package_files()} <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= names


def test_the_bundled_model_is_there() -> None:
    folder = SOURCE / "models" / "tiny"
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    assert {"config.json", "tokenizer.json"} <= present
    assert any(name.endswith(".safetensors") for name in present)


def texts() -> list[Path]:
    """Every text of the repository that a reader may open."""
    suffixes = {".py", ".md", ".toml", ".txt", ".cff", ".json", ".yml", ".yaml", ".sh", ".svg"}
    folders = ["src", "tests", "docs", "examples", "benchmarks", "training", "tools", "constraints", ".ci"]
    found = [path for path in ROOT.iterdir() if path.is_file() and (path.suffix in suffixes or path.name == "Makefile")]
    for folder in folders:
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file() and (p.suffix in suffixes or folder == ".ci")]
    return [path for path in found if "__pycache__" not in path.parts]


def test_no_text_names_a_path_of_somebodys_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp|opt)/\w")
    guilty = [
        f"{path.relative_to(ROOT)}: {line.strip()[:100]}"
        for path in texts()
        if path.stat().st_size < 1_000_000 and path != Path(__file__).resolve()
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert guilty == []


def test_graphs_are_captured_in_one_way() -> None:
    """By `ops.capture.capturing`, which keeps Python from freeing what a capture forbids to free."""
    direct = [path.name for path in SOURCE.rglob("*.py") if "torch.cuda.graph(" in path.read_text(encoding="utf-8")]
    assert direct == ["capture.py"]


def test_links_between_the_pages_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in texts()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists()
    ]
    assert broken == []


def test_the_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{quest_attention.__version__}]" in changelog
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {quest_attention.__version__}\n" in citation
