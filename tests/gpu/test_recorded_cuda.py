"""On a CUDA device: draft levels that replay graphs compute what they would without, next to other work."""

from __future__ import annotations

import threading

import pytest
import torch

from conf.schema import CudaGraphs, FullCacheTier, Mode
from launch.measure.gpu import main
from tests.gpu.test_cuda import CUDA, generate
from tests.support.recorded_steps import SHAPE, compare_drafters, compare_retrieval_drafts
from tests.support.tiny_models import random_prompt, save_checkpoint, tiny_config
from tiers.device_tier import DeviceTier
from tiers.streaming_llm_cache import StreamingLLMCache
from workers.checkpoint.facts import describe
from workers.models.cuda_graphs import CudaRecorder, NotRecordableError, RecordedModel
from workers.models.loading import load_model
from workers.models.streaming_model import StreamingModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Requires: a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config("llama", max_position_embeddings=2048)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", config)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(describe("model.target", str(folder), torch.float32), CUDA, self_check=False)


def test_retrieval_draft_replays_what_it_would_compute(model):
    compare_retrieval_drafts(model, CudaRecorder(CUDA))


def test_drafter_replays_what_it_would_compute(model):
    compare_drafters(model, CudaRecorder(CUDA))


def test_levels_that_share_a_recorder_do_not_disturb_each_other(model):
    record = CudaRecorder(CUDA)
    compare_drafters(model, record)
    compare_retrieval_drafts(model, record)
    compare_drafters(model, record)


def test_recordings_go_with_other_threads_that_use_the_device(model):
    ended, errors = threading.Event(), []

    def work() -> None:
        try:
            while not ended.is_set():
                host = torch.randn(200, 200).pin_memory()
                (host.to(CUDA, non_blocking=True) @ torch.randn(200, 200, device=CUDA)).sum().item()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        compare_retrieval_drafts(model, CudaRecorder(CUDA))
    finally:
        ended.set()
        thread.join()
    assert not errors


def test_logits_are_the_caller_s_own(model):
    cache = StreamingLLMCache(SHAPE, 4, 20, 12, DeviceTier(CUDA))
    level = StreamingModel(RecordedModel(model, cache, 3, CudaRecorder(CUDA)), cache)
    level.prefill(random_prompt(20))
    first = level.append([1], 1)
    kept = first.clone()
    assert not torch.equal(level.append([2], 1), kept)
    assert torch.equal(first, kept)


def test_what_waits_for_the_device_is_found_before_it_is_captured():
    with pytest.raises(NotRecordableError):
        CudaRecorder(CUDA)(lambda: torch.randn(5, device=CUDA).max().item())
    with pytest.raises(NotRecordableError):
        CudaRecorder(CUDA)(lambda: torch.randn(5, device=CUDA).cpu())
    torch.randn(5, device=CUDA).sum().item()  # the device is as it was


@pytest.mark.parametrize("mode", [Mode.triforce, Mode.retrieval, Mode.streaming])
@pytest.mark.parametrize("tier", [FullCacheTier.device, FullCacheTier.host])
def test_greedy_tokens_are_those_without_graphs(folder, tier, mode):
    full = {"tier": tier} | ({"block_tokens": "32"} if tier is FullCacheTier.host else {})
    wanted = generate(folder, Mode.autoregressive, "none", **full)
    assert generate(folder, mode, str(folder), graphs=CudaGraphs.on, **full) == wanted


def test_the_measurement_runs(tmp_path):
    assert main(["smoke=true", f"output={tmp_path}", f"models={tmp_path / 'pair'}"]) == 0
