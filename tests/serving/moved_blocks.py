"""Blocks that vLLM's KV connectors move: a store for its offloading connector on a CPU, and oracles that go along.

The oracle knows the keys of a block because it saw them written. Nobody writes a block that is loaded, so what the
oracle has of a block goes where the block goes; and the metadata of a loaded block must have the bits that were saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from vllm_oracle import OracleExtension


class CopyingSpec(CPUOffloadingSpec):
    """vLLM's store in the host's memory, which asks for a GPU, with copies by PyTorch in place of a GPU's.

    The connector, and all that runs beside the scheduler, are vLLM's.
    """

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return CopyingWorker(kv_caches, self.num_chunks)


class CopyingWorker(OffloadingWorker):
    """Copies as many bytes of a block as the connector says that a layer has in it, as vLLM's own does."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        (refs,) = kv_caches.group_data_refs
        self._blocks = [kv_caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
        self._chunks = [blocks.new_zeros(num_chunks, blocks.shape[1]) for blocks in self._blocks]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._blocks, src_spec.block_ids, self._chunks, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._chunks, src_spec.block_ids, self._blocks, dst_spec.block_ids)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Copies are made when they are asked for."""

    def _copy(self, job_id: int, source: list[Tensor], these: Any, target: list[Tensor], those: Any) -> bool:
        for ours, theirs in zip(source, target, strict=True):
            theirs[those] = ours[these]
        self._done.append(TransferResult(job_id, success=True))
        return True


class MovingOracle(OracleExtension):
    """An oracle that knows the keys of blocks that were loaded, and compares their metadata with what was saved."""

    def install_oracle(self) -> None:
        """Check every call, and follow the connector of this worker."""
        super().install_oracle()
        self._moved = {"blocks": 0, "elsewhere": 0, "other bits": 0}
        self._waiting: list[tuple[dict[str, Tensor], Tensor]] = []

    def moved_report(self) -> dict[str, int]:
        """Blocks that were loaded, those of them in another place, and blocks of layers with other metadata."""
        for metadata, blocks in self._waiting:
            for layer, opened in self._opened():
                self._moved["other bits"] += _unlike(opened.parts.metadata[blocks], metadata[layer])
        self._waiting.clear()
        return self._moved

    def _opened(self) -> list[tuple[str, Any]]:
        """What lies in the cache, by layer."""
        layers = self.model_runner.compilation_config.static_forward_context  # type: ignore[attr-defined]
        return [(name, layer.impl.open(layer, layer.kv_cache)) for name, layer in layers.items()]

    def _save(self, blocks: Sequence[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Keys and values as they were written to some blocks, and their metadata as it is in the cache."""
        ids = torch.as_tensor(blocks).long()
        metadata = {layer: opened.parts.metadata[ids] for layer, opened in self._opened()}
        return self._oracle.give(ids), metadata  # type: ignore[attr-defined]

    def _load(self, tokens: dict[str, Any], blocks: Sequence[int], before: Sequence[int]) -> None:
        ids = torch.as_tensor(blocks).long()
        for layer, opened in self._opened():
            self._oracle.take(layer, opened.paged, tokens[layer], ids)  # type: ignore[attr-defined]
        self._moved["blocks"] += len(ids)
        self._moved["elsewhere"] += int((ids != torch.as_tensor(before)).sum())


class OffloadingOracle(MovingOracle):
    """Goes along with the offloading connector, whose chunks are blocks here."""

    def install_oracle(self) -> None:
        super().install_oracle()
        worker = get_kv_transfer_group().connector_worker.worker
        store, load = worker.submit_store, worker.submit_load
        kept: dict[int, tuple[int, Any]] = {}

        def submit_store(job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            for block, chunk in zip(src_spec.block_ids.tolist(), dst_spec.block_ids.tolist(), strict=True):
                kept[chunk] = block, self._save([block])
            return bool(store(job_id, src_spec, dst_spec))

        def submit_load(job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            done = load(job_id, src_spec, dst_spec)
            for chunk, block in zip(src_spec.block_ids.tolist(), dst_spec.block_ids.tolist(), strict=True):
                before, (tokens, metadata) = kept[chunk]
                self._load(tokens, [block], [before])
                self._waiting.append((metadata, torch.tensor([block])))
            self.moved_report()  # copies are made already, and the block may soon be another's
            return bool(done)

        worker.submit_store, worker.submit_load = submit_store, submit_load


def _unlike(ours: Tensor, theirs: Tensor) -> int:
    """How many blocks have other bits."""
    return int((ours.contiguous().view(torch.uint8) != theirs.contiguous().view(torch.uint8)).flatten(1).any(1).sum())


class PrefillOracle(MovingOracle):
    """Of an engine that computes prompts for another."""

    def save_blocks(self, path: str, blocks: list[int]) -> None:
        """Write down what the blocks hold that the other is about to fetch."""
        torch.save(self._save(blocks), path)


class DecodeOracle(MovingOracle):
    """Of an engine that fetches blocks of prompts from another by NIXL."""

    def install_oracle(self) -> None:
        super().install_oracle()
        worker = get_kv_transfer_group().connector_worker
        start = worker.start_load_kv

        def start_load_kv(asked: Any) -> None:
            for request in asked.reqs_to_recv.values():
                (blocks,), (before,) = request.local_block_ids, request.remote.block_ids
                self._load(self._tokens, blocks, before)
                last = len(blocks) - 1  # its last token is computed anew, and in most the answer goes on
                metadata = {layer: part[:last] for layer, part in self._metadata.items()}
                self._waiting.append((metadata, torch.tensor(blocks[:last])))
            start(asked)

        worker.start_load_kv = start_load_kv

    def expect_blocks(self, path: str) -> None:
        """Read what `save_blocks` wrote of the next request's blocks, which are fetched as soon as it comes."""
        self._tokens, self._metadata = torch.load(path)
