"""The README's table of faults, and the tests that make each of them happen."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "README.md").read_text().partition("## When something goes wrong")[2].partition("\n## ")[0]
ROWS = [m[1].strip() for m in re.finditer(r"(?m)^\| (.*?) \|", TABLE)][1:]

MADE_BY = {
    "compiler killed at any moment": [
        "test_faults.py::test_a_compiler_killed_at_any_moment_leaves_a_store_that_works",
        "artifacts/test_store.py::test_kill_at_any_moment_leaves_a_store_that_works",
        "artifacts/test_store.py::test_a_leftover_of_a_killed_builder_is_collected",
    ],
    "two compilers of one model": [
        "artifacts/test_store.py::test_two_builders_build_once",
        "artifacts/test_store.py::test_who_waits_builds_when_the_first_is_killed",
    ],
    "full disk, or a limit on file sizes": [
        "test_faults.py::test_a_full_disk_ends_a_compilation_with_a_remedy",
        "test_faults.py::test_a_file_that_may_not_grow_is_told",
        "artifacts/test_store.py::test_a_full_disk_is_an_error_that_breaks_nothing",
    ],
    "read-only store": [
        "test_faults.py::test_a_read_only_store_gives_what_it_has_and_refuses_the_rest",
        "artifacts/test_store.py::test_a_read_only_store_serves_and_says_why_it_cannot_build",
        "test_faults.py::test_a_gate_record_that_cannot_be_written_is_told",
    ],
    "manifest truncated, foreign or edited by hand": [
        "artifacts/test_artifact.py::test_every_byte_of_the_manifest_counts",
        "artifacts/test_artifact.py::test_a_foreign_manifest_is_refused",
        "artifacts/test_artifact.py::test_a_hand_edited_manifest_is_refused",
    ],
    "artifact of another format version": ["artifacts/test_artifact.py::test_another_version_is_refused_whatever_else_it_says"],
    "a damaged byte in any file": [
        "artifacts/test_artifact.py::test_a_flipped_byte_is_refused_with_the_name_of_its_file",
        "artifacts/test_artifact.py::test_a_truncated_or_missing_file_is_refused_with_its_name",
        "artifacts/test_weights.py::test_a_damaged_chunk_is_refused_wherever_it_is",
        "test_faults.py::test_a_kernel_that_cannot_be_loaded_is_named",
    ],
    "damaged or malicious archive": [
        "artifacts/test_archive.py::test_a_truncated_archive_is_refused",
        "artifacts/test_archive.py::test_a_flipped_byte_is_refused",
        "artifacts/test_archive.py::test_a_malicious_archive_is_refused",
    ],
    "kernels never run where they were compiled": ["test_travel.py::test_a_deferred_gate_is_run_where_the_artifact_arrives"],
    "a kernel that disagrees with its reference": [
        "test_travel.py::test_a_wrong_kernel_fails_its_gate",
        "test_travel.py::test_kernels_that_fail_are_not_served",
    ],
    "artifact for another machine": [
        "test_travel.py::test_a_gpu_that_is_not_here",
        "ops/test_target.py::test_less_than_the_machine_has_runs_and_more_does_not",
    ],
    "config that lies about shapes": [
        "test_faults.py::test_a_config_that_lies_is_found_before_the_long_work",
        "models/test_checkpoint.py::test_one_error_lists_everything",
        "serve/test_cli.py::test_an_error_is_one_message_and_exit_code_1",
    ],
    "NaN or infinite weights": [
        "test_faults.py::test_weights_that_are_not_numbers_are_refused_by_name",
        "models/test_checkpoint.py::test_nan_and_infinity_are_found_by_name",
    ],
    "checkpoint truncated, overlapping or a header bomb": [
        "models/test_checkpoint.py::test_damaged_files_are_named",
        "models/test_checkpoint.py::test_headers_that_lie",
        "models/test_checkpoint.py::test_header_bombs_are_not_opened",
    ],
    "index that points outside its folder": ["models/test_checkpoint.py::test_an_index_that_points_outside_is_refused"],
    "tokenizer with more tokens than the model": [
        "test_faults.py::test_a_tokenizer_of_another_model_is_refused",
        "models/test_source.py::test_a_tokenizer_with_more_tokens_than_the_model_is_refused",
    ],
}


def test_the_rows_are_those_that_are_tested() -> None:
    assert list(MADE_BY) == ROWS


@pytest.mark.parametrize("test", sorted({t for tests in MADE_BY.values() for t in tests}))
def test_the_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
