"""Kernels that are compiled while a model is traced: those of two of its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store
from ingot.compiler.build import CompileOptions, Job
from ingot.compiler.codegen.emit import Emitter
from ingot.compiler.pipeline import lower
from ingot.compiler.select import wanted_sources
from ingot.models.frontend import shortened


def test_two_layers_have_the_kernels_of_all() -> None:
    job = Job.prepare("bundled", CompileOptions(target="sm_90"))
    short = shortened(job.source.config)
    assert short is not None and short.num_hidden_layers == 2 < job.source.config.num_hidden_layers
    graphs = [lower(job.traced(config), job.target)[0] for config in (job.source.config, short)]
    whole, foreseen = (wanted_sources([p for _, p in job.programs(g)], job.target, None, job.table) for g in graphs)
    assert len(foreseen) > 20 and foreseen == whole


def test_kinds_of_layers_that_follow_from_their_number_do_so_still() -> None:
    short = shortened(transformers.Mamba2Config(num_hidden_layers=8))
    assert short is not None and len(short.layer_types) == 2


def test_layers_that_differ_are_not_shortened() -> None:
    config = transformers.Gemma2Config(num_hidden_layers=8)
    assert len(set(config.layer_types)) == 2 and shortened(config) is None
    assert shortened(transformers.LlamaConfig(num_hidden_layers=4)) is None


def test_what_cannot_be_foreseen_is_left_to_the_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job.prepare("bundled", CompileOptions(target="sm_90"))

    def fails(self: Job, config: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Job, "traced", fails)
    with Emitter(job.target, Store(settings().home), tmp_path, lambda done, of: None) as emitter:
        job.begin_kernels(emitter, None)
        assert list(emitter([])) == [] and emitter.compiled == 0
