"""Every item of the list, H001 to H140, is held by a test, and the tests named for it exist.

Most items are cases of this folder, told by the ids of the cases and the names of the functions. What is held
elsewhere, beside the code it is about, is named here by its node id.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.hostile.hostile_cases import GENERATE
from tests.hostile.http_cases import HTTP

ROOT = Path(__file__).resolve().parents[2]
ITEMS = [f"H{number:03}" for number in range(1, 141)]
CHECKPOINT = "tests/weft/artifact/test_checkpoint.py"
STORE = "tests/weft/artifact/test_store.py"
REFUSALS = "tests/services/engine/models/test_refusals.py"
ASSETS = "tests/services/gateway/text/test_assets.py"
TEMPLATE = "tests/services/gateway/text/test_chat_template.py"
TOKENS = "tests/services/gateway/text/test_tokenization.py"
LINK = "tests/services/gateway/links/test_link.py"
TEXTS = "tests/services/quantizer/test_texts.py"
BAD = "tests/services/quantizer/test_bad_input.py"
JOBS = "tests/services/quantizer/jobs/test_job_servicer.py"
DATABASE = "tests/services/quantizer/jobs/test_job_database.py"
COMMAND = "tests/services/quantizer/test_command.py"

ELSEWHERE: dict[str, list[str]] = {
    # What a model says in its output, and what an engine sends: the gateway's own tests.
    "H047": ["tests/services/gateway/text/test_detokenizer.py"],
    "H115": [
        f"{LINK}::test_wrong_epochs_are_dropped_and_counted",
        f"{LINK}::test_doubled_tokens_are_dropped_and_counted",
        f"{LINK}::test_a_missing_token_is_drawn_again",
    ],
    # Artifacts.
    "H118": [f"{CHECKPOINT}::test_hostile_safetensors_are_refused_by_name"],
    "H119": [
        f"{CHECKPOINT}::test_hostile_safetensors_are_refused_by_name",
        f"{REFUSALS}::test_a_bad_scale_is_named",
        f"{BAD}::test_values_that_are_not_finite_are_named",
        "tests/services/engine/runner/test_artifacts.py::test_an_artifact_has_no_subnormal_scale",
    ],
    "H120": [
        f"{CHECKPOINT}::test_a_lying_index_is_refused",
        f"{CHECKPOINT}::test_a_tensor_in_two_shards_is_refused",
        f"{CHECKPOINT}::test_only_regular_files_are_read",
    ],
    "H121": [
        f"{CHECKPOINT}::test_a_file_that_changes_under_the_reader_is_noticed",
        f"{BAD}::test_a_file_that_changes_while_it_is_read_is_noticed",
    ],
    "H122": [
        f"{CHECKPOINT}::test_hostile_configurations_are_refused",
        f"{REFUSALS}::test_a_bad_config_names_its_field",
        f"{REFUSALS}::test_a_bad_tensor_is_named",
        f"{REFUSALS}::test_a_group_that_does_not_divide_is_named",
        f"{REFUSALS}::test_a_tied_head_must_equal_the_embedding",
    ],
    "H123": [
        f"{TOKENS}::test_a_bad_file_is_a_clear_error",
        f"{TOKENS}::test_a_panic_of_the_library_is_an_error",
        f"{COMMAND}::test_a_tokenizer_that_panics_ends_with_one_line",
        f"{ASSETS}::test_generation_config_gives_what_is_usable",
    ],
    # A model with no tokenizer.json is refused by the quantizer; the gateway reads nothing else.
    "H124": [f"{BAD}::test_a_bad_source_ends_with_one_line"],
    "H125": [
        f"{TEMPLATE}::test_what_a_template_may_not_do",
        f"{TEMPLATE}::test_bombs_end_and_the_pool_comes_back",
        f"{TEMPLATE}::test_the_template_may_refuse_a_conversation",
        f"{TEMPLATE}::test_a_template_that_does_not_compile_is_refused_at_the_start",
        f"{ASSETS}::test_a_bad_template_costs_chat_alone",
    ],
    "H126": [f"{CHECKPOINT}::test_hostile_safetensors_are_refused_by_name"],
    "H127": [
        f"{STORE}::test_a_manifest_that_is_not_ours_is_refused",
        f"{STORE}::test_a_manifest_in_another_spelling_is_refused",
        f"{STORE}::test_every_change_to_a_file_is_found",
        f"{STORE}::test_an_artifact_under_another_name_is_refused",
        f"{ASSETS}::test_a_changed_file_is_refused",
    ],
    "H128": [f"{CHECKPOINT}::test_hostile_safetensors_are_refused_by_name"],
    "H130": [
        f"{TEXTS}::test_bad_lines_are_named",
        f"{TEXTS}::test_bad_files_are_named",
        "tests/services/quantizer/test_inputs.py::test_a_long_text_is_read_in_pieces",
        "tests/services/quantizer/test_inputs.py::test_a_file_that_adds_nothing_is_refused",
        f"{COMMAND}::test_bad_calibration_text_ends_with_one_line",
    ],
    # The job service.
    "H131": [f"{JOBS}::test_what_is_wrong_is_named"],
    "H132": [
        f"{JOBS}::test_create_is_repeatable_and_another_body_is_not",
        f"{DATABASE}::test_the_same_request_is_the_same_job_and_another_body_is_refused",
    ],
    "H133": [
        f"{JOBS}::test_a_full_queue_says_when_to_come_back",
        f"{DATABASE}::test_a_full_queue_is_refused_but_not_a_repeated_request",
    ],
    "H134": [
        f"{DATABASE}::test_two_jobs_of_one_name_never_run_at_once",
        f"{STORE}::test_equal_bytes_published_twice_are_one_version_and_a_damaged_one_is_replaced",
    ],
    "H136": [
        f"{COMMAND}::test_missing_text_and_source_and_unwritable_volume",
        f"{STORE}::test_no_space_at_any_step_leaves_the_old_version_current",
        "tests/services/quantizer/jobs/test_job_store.py::test_a_full_disk_is_unavailable_and_what_was_there_stays",
    ],
    "H137": [
        f"{JOBS}::test_a_queued_job_is_cancelled_at_once_and_for_good",
        f"{JOBS}::test_jobs_that_are_not_there",
        f"{DATABASE}::test_cancel",
    ],
    "H138": [
        f"{JOBS}::test_a_hundred_watchers_that_go_away_leave_nothing",
        f"{JOBS}::test_a_watcher_that_sleeps_gets_the_latest_state_not_every_one",
    ],
    "H139": [f"{JOBS}::test_pages"],
    "H140": [
        f"{DATABASE}::test_sql_in_every_string_is_text",
        f"{JOBS}::test_ids_that_are_none",
    ],
}


# What no test holds, and why.
NOT_HELD = {
    "H135": "a source is only read and a version is a new directory: one root for both loses nothing",
}


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def held_here() -> set[str]:
    """The items that ids of cases and names of tests in this folder begin with, wherever they are written."""
    folder = Path(__file__).resolve().parent
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("test_*.py") if path != Path(__file__)]
    in_names = {
        item for text in texts for name in re.findall(r"def (test_\w+)", text) for item in ids_in(name)
    }
    in_cases = {case[:4] for text in texts for case in re.findall(r'\b(?:Case|Raw)\(\s*f?"(H\d{3}-)', text)}
    in_keys = {key[:4] for text in texts for key in re.findall(r'^    "(H\d{3}-)', text, re.MULTILINE)}
    return in_names | in_cases | in_keys | {case.id[:4] for case in (*GENERATE, *HTTP)}


def ids_in(name: str) -> list[str]:
    return re.findall(r"H\d{3}", name)


def test_every_item_is_held_by_a_test() -> None:
    missing = set(ITEMS) - held_here() - set(ELSEWHERE) - set(NOT_HELD)
    assert not missing, sorted(missing)


def test_no_case_has_an_id_of_no_item() -> None:
    assert held_here() | set(ELSEWHERE) <= set(ITEMS)


@pytest.mark.parametrize("item", ELSEWHERE)
def test_what_is_held_elsewhere_is_there(item: str) -> None:
    for node in ELSEWHERE[item]:
        path, _, name = node.partition("::")
        assert (ROOT / path).is_file(), node
        assert not name or name in functions(ROOT / path), node


def test_ids_of_cases_are_unique() -> None:
    for cases in (GENERATE, HTTP):
        seen = [case.id for case in cases]
        assert len(seen) == len(set(seen)), sorted({i for i in seen if seen.count(i) > 1})
