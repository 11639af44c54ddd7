"""What every test runs under: no network, one thread per worker, a fixed seed; no `gpu` tests without a GPU.

It lies at the root so that the examples in the docstrings of `src` get the same.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os

# Read by libraries when they are first imported, and by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COLUMNS", "120")  # so that help texts wrap alike everywhere

import hypothesis
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which reads this when Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Time limits belong to pytest-timeout: a shared machine stalls now and then. The same examples on every run in CI.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


torch.set_num_threads(1)  # workers share the cores

# What extras bring is imported by some modules, which environments without them leave out of the doctests.
_NEEDS = {
    "lm_eval": ["eval/lm_eval.py"],
    "vllm": ["vllm/cpu.py", "vllm/gpu.py", "vllm/impl.py", "vllm/builder.py"],
}
collect_ignore = [
    f"src/quest_attention/{module}"
    for extra, modules in _NEEDS.items()
    if importlib.util.find_spec(extra) is None
    for module in modules
]
# They import vLLM, where a worker has it.
collect_ignore += [f"tests/serving/{module}.py" for module in ("gpu_on_cpu", "gpu_oracle", "moved_blocks")]


@pytest.hookimpl(tryfirst=True)  # `-m` chooses by what is marked
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out combinations that there are not, and mark those that others stand for; skip what needs a GPU."""
    from cases import mark_thorough, there_is  # noqa: PLC0415 - the path to it is the ini file's

    config.hook.pytest_deselected(items=[item for item in items if not there_is(item)])
    items[:] = [item for item in items if there_is(item)]
    mark_thorough(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not go through all of it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """All of it may go in the end, or nanobind tells of leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    """Kernels in Triton's interpreter take a third of the time."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        importlib.import_module("quick_interpreter").quicken()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test gives the same numbers alone and in the suite."""
    torch.manual_seed(0)
