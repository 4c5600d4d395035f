"""Does every hostile payload's test fail when its guard is taken out? A test that passes without it guards nothing.

    python benchmarks/guards.py [--only PART]

Each guard is a line of the package. In a copy of the project it is replaced by what stands there when nobody thought of
it, and the tests that bring the payload are run: they must fail, and they must pass on the copy as it is. Writes
benchmarks/results/measured.json and the table of docs/hardening.md. The page's rules are not here:
tests/page/test_server.py takes each of them out itself.

What stands here in place of a guard (weights_only=False, allow_pickle=True) is text for the copy, which is thrown away;
nothing of it runs but there, on payloads of the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from figures import keep, measured, rewrite

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hardening.md"
START, END = "<!-- measured by benchmarks/guards.py -->", "<!-- end of what guards.py measured -->"
COPIED = ("gptlab", "tests", "experiments", "benchmarks", "pyproject.toml", "train_gpt2.py", "train_gpt2_ben.py")


@dataclass(frozen=True)
class Guard:
    """what: in words. line: of `file` in gptlab/, there once. without: what replaces it. tests: that must notice.

    behind: names of other guards that would still hold what this one lets by. They are taken out with it.
    """

    what: str
    file: str
    line: str
    without: str
    tests: tuple[str, ...]
    behind: tuple[str, ...] = ()


PICKLES = "tests/model/test_formats.py::test_code_in_a_pickle_is_refused_and_never_run"
SIZES = "tests/security/test_payloads.py::test_a_claim_ends_in_an_error_of_ours_and_takes_no_memory"
NAMES = "tests/security/test_escapes.py::test_names_that_become_folders_are_no_paths"
PATCH = "tests/security/test_escapes.py::test_a_patch_reaches_nothing_but_its_copy"
KINDS = "tests/runs/test_patches.py::test_a_patch_changes_python_files_of_the_package_and_nothing_else"
CODE = "tests/security/test_payloads.py::test_a_run_that_names_code_runs_none_when_it_is_read"
DEEP = "tests/security/test_fuzz.py::test_what_is_nested_too_deeply_is_a_value_error"
SHARDS = "tests/data/test_shards.py::test_a_damaged_file_is_named"
SECRETS = "tests/security/test_escapes.py::test_a_run_and_its_report_keep_none"

GUARDS = (
    Guard("pickled checkpoints are tensors alone", "model/weights.py",
          "weights_only=True, mmap=zipped", "weights_only=False, mmap=zipped", (PICKLES,)),
    Guard("an archive that would grow is not read", "model/weights.py",
          "zipped = refuse_bombs(path)", "zipped = False",
          ("tests/model/test_formats.py::test_an_archive_that_would_grow_is_refused_unread",)),
    Guard("no pickle in .npy", "data/shards.py", "allow_pickle=False", "allow_pickle=True",
          ("tests/security/test_syntax.py::test_nothing_runs_what_it_reads",)),
    Guard("a .npy is no archive", "data/shards.py", "if start != NPY_MAGIC:", "if False:", (SHARDS,)),
    Guard("code named by a Hugging Face config", "model/huggingface.py",
          'if (kind := content.get("model_type")) != "gpt2":', "if False:",
          ("tests/security/test_payloads.py::test_code_beside_a_hugging_face_config_is_not_run",)),
    Guard("an index names weights of its own folder", "model/huggingface.py",
          "not _FILE.fullmatch(name) or", "",
          ("tests/model/test_huggingface.py::test_an_index_names_weight_files_of_its_own_folder",)),
    Guard("a model's tokenizer is read up to a size", "data/huggingface_tokenizer.py",
          "read_bytes(folder / name, limit=LIMIT)", "(folder / name).read_bytes()",
          ("tests/data/test_tokenizers.py::test_a_file_that_is_too_large_or_no_file_is_refused",)),
    Guard("a signal file needs --allow_code", "cli/train.py",
          "if code and not allow_code:", "if False:", (CODE,)),
    Guard("an experiment's signal file needs --allow_code", "cli/experiment.py",
          "if experiment.codes and not options.allow_code and not looks:", "if False:", (CODE,)),
    Guard("a signal's function is no path", "signals/config.py",
          'if self.is_code and not self.name.rpartition(":")[2].isidentifier():', "if False:",
          ("tests/security/test_payloads.py::test_a_function_is_no_path",)),
    Guard("a preset is one that is known", "cli/train.py", "if preset not in PRESETS:", "if False:",
          ("tests/security/test_payloads.py::test_a_preset_is_no_path",)),
    Guard("an experiment's name is no path", "runs/experiment_spec.py",
          "if not _is_name(name):", "if False:", (NAMES,)),
    Guard("an arm's name is no path", "runs/experiment_spec.py",
          "if not _is_name(name) or not isinstance(own, Mapping):", "if False:", (NAMES,)),
    Guard("a corpus names files of its own folder", "data/corpus.py",
          '_SHARD_NAME.fullmatch(shard["file"])', 'isinstance(shard["file"], str)',
          ("tests/security/test_escapes.py::test_a_manifest_names_files_of_its_own_folder",)),
    Guard("a checkpoint's manifest names its own files", "runs/checkpoint.py",
          "if unknown := expected.keys() - {*names}:", "if unknown := set():",
          ("tests/runs/test_checkpoint.py::test_a_manifest_lists_nothing_but_a_checkpoints_own_files",)),
    Guard("a patch changes modules of the package and makes no link", "runs/executor.py",
          'raise ConfigError(f"patch {patch}: expected changes of Python files',
          'return text\n    str(f"{patch}', (PATCH, KINDS)),
    Guard("code for another machine is as it was submitted", "runs/executor.py",
          "if hashlib.sha256(archive).hexdigest() != sha256:", "if False:",
          ("tests/runs/test_patches.py::test_code_for_another_machine_is_checked_before_it_is_used",)),
    Guard("a child imports nothing of the folder that it starts in", "processes.py", '"-P", "-c"', '"-c"',
          ("tests/runs/test_processes.py::test_a_child_imports_nothing_that_lies_around",)),
    Guard("a cell is not run through a link", "runs/cells.py",
          "refuse_links(folder / name, folder.parents[1], error=ConfigError)", "pass",
          ("tests/security/test_escapes.py::test_a_cell_is_claimed_through_no_link",)),
    Guard("nobody waits for the other end of a pipe", "files.py",
          "_READ = os.O_RDONLY | os.O_NONBLOCK", "_READ = os.O_RDONLY",
          ("tests/test_files.py::test_what_is_no_file_is_refused_at_once",)),
    Guard("no more of a file is read than was asked for", "files.py", "if len(content) > limit:", "if False:",
          ("tests/test_files.py::test_no_more_is_read_than_was_asked_for",)),
    Guard("a link within a folder is not read", "files.py",
          "os.open(path, _READ) if inside is None else", "os.open(path, _READ) if True else",
          ("tests/test_files.py::test_nothing_outside_a_folder_is_read",)),
    Guard("the name of a file while it is written cannot be foreseen", "files.py", "secrets.token_hex(8)", "'0' * 16",
          ("tests/test_files.py::test_the_name_while_writing_cannot_be_guessed_and_is_hidden",)),
    Guard("a run is not written through a link", "runs/folder.py",
          "if (path := self.path / name).is_symlink():", "if (path := self.path / name) is None:",
          ("tests/security/test_escapes.py::test_a_run_is_not_written_through_a_link",)),
    Guard("of a link among checkpoints the link alone is removed", "runs/checkpoint.py",
          "if path.is_symlink() or path.is_file():", "if path.is_file():",
          ("tests/security/test_escapes.py::test_links_among_checkpoints_are_removed_and_not_what_they_lead_to",)),
    Guard("a pack takes no link along", "runs/archive.py", "refuse_links(path, folder, error=ConfigError)", "pass",
          ("tests/security/test_escapes.py::test_a_pack_takes_no_link_along",)),
    Guard("a trash that leads elsewhere takes nothing", "runs/folder.py", "if trash.resolve() != trash:", "if False:",
          ("tests/security/test_escapes.py::test_a_trash_that_is_a_link_takes_nothing",)),
    Guard("nothing elsewhere is deleted", "runs/folder.py",
          "if path.is_symlink() or real == inside or inside not in real.parents:", "if False:",
          ("tests/cli/test_runs.py",)),
    Guard("the page follows no link", "analysis/run.py", "follow_symlinks=False", "follow_symlinks=True",
          ("tests/page/test_server.py::test_a_link_to_elsewhere_is_not_followed",)),
    Guard("stated sizes fit the file", "model/weights.py", "if least > room:", "if False:",
          (SIZES, "tests/model/test_formats.py::test_a_damaged_llmc_file_is_one_line"),
          behind=("weights from elsewhere have a GPT-2's shapes",)),
    Guard("weights from elsewhere have a GPT-2's shapes", "model/weights.py",
          "if found is not None and not _is_weight(found, shape):", "if False:",
          ("tests/model/test_formats.py::test_a_checkpoint_that_is_no_gpt2_is_one_line",)),
    Guard("a checkpoint's options fit its weights", "model/weights.py",
          "if held != config.parameters:", "if False:", (SIZES,), behind=("a checkpoint's weights have its shapes",)),
    Guard("a checkpoint's weights have its shapes", "model/weights.py",
          "if name not in expected or not _is_weight(found, expected[name]):", "if False:",
          ("tests/security/test_payloads.py::test_weights_have_the_shapes_of_the_options",)),
    Guard("moments are those of the weights", "model/weights.py",
          "if of not in weights or not _is_weight(found, expected):", "if False:",
          ("tests/security/test_payloads.py::test_moments_are_those_of_the_weights",)),
    Guard("sizes have an end", "options.py", "if not 1 <= found <= most:", "if found < 1:",
          (SIZES, "tests/model/test_formats.py::test_a_damaged_llmc_file_is_one_line"),
          behind=("stated sizes fit the file",)),
    Guard("an llm.c model is as long as it says", "model/formats.py", "if room != expected:", "if False:",
          ("tests/model/test_formats.py::test_a_damaged_llmc_file_is_one_line",)),
    Guard("a hidden file is no input", "data/text_files.py",
          'if path.name.startswith("."):\n                left_out.add', "if False:\n                left_out.add",
          ("tests/data/test_text_files.py::test_names_that_begin_with_a_dot_are_no_input",)),
    Guard("what unpacks to too much is not read on", "data/text_files.py", "if self.left < 0:", "if False:",
          ("tests/data/test_text_files.py::test_a_file_may_come_to_so_much_of_its_size",)),
    Guard("raw tokens are 16 bits wide", "data/shards.py",
          "if other := _other_width(tokens[:WIDTH_SAMPLE]):", "if other := None:",
          ("tests/data/test_shards.py::test_raw_tokens_of_another_width_are_refused",)),
    Guard("tokens of an unknown vocabulary are not GPT-2's", "data/corpus.py",
          "return (UNKNOWN, largest + 1, doubt) if doubt else", "return",
          ("tests/data/test_corpus.py::test_tokens_of_a_vocabulary_of_their_own_are_not_taken_for_gpt2s",)),
    Guard("a shard is as long as it says", "data/shards.py", "if found != expected:", "if False:", (SIZES, SHARDS)),
    Guard("tokens are below the vocabulary", "data/shards.py",
          "if len(tokens) == 0 or tokens.max() < vocab_size:", "if True:",
          ("tests/data/test_shards.py::test_the_first_token_out_of_range_is_named",)),
    Guard("a tuned lens has the model's shape", "signals/tuned_lens.py",
          "if lens.weight.shape != (L - 1, C, C) or lens.bias.shape != (L - 1, C):", "if False:",
          ("tests/signals/test_readout.py::test_a_lens_of_another_shape_is_refused_whatever_weights_it_names",)),
    Guard("JSON and TOML are not nested without end", "files.py",
          '        if not level:\n            return value\n    raise ValueError("nested too deeply")',
          "        pass\n    return value", (DEEP,)),
    Guard("a state is well formed, whoever signed it", "runs/checkpoint.py",
          "if not isinstance(state, dict) or not _well_formed(state) or not _is_finite(state):", "if False:",
          ("tests/security/test_payloads.py::test_verify_names_a_state_that_only_its_checksum_speaks_for",)),
    Guard("an optimizer's state is whole", "model/weights.py", "if found not in (ADAMW, MUON):", "if False:",
          ("tests/security/test_payloads.py::test_moments_that_lack_a_tensor_or_a_number_are_refused",)),
    Guard("figures that are not finite are no answer", "model/weights.py",
          "if not figures.isfinite().all():", "if False:",
          ("tests/security/test_payloads.py::test_figures_that_are_not_finite_are_one_line",)),
    Guard("rows of a cut tensor make a whole", "runs/checkpoint.py",
          "if first != expected or not piece.dim() or len(shapes) > 1:", "if False:",
          ("tests/runs/test_checkpoint.py::test_rows_that_make_no_whole_are_refused",)),
    Guard("an error does not steer the terminal", "cli/console.py",
          "print(printable(line), file=sys.stderr", "print(line, file=sys.stderr",
          ("tests/security/test_payloads.py::test_what_a_file_says_does_not_steer_the_terminal",)),
    Guard("text stays text in HTML", "analysis/report/page.py", "autoescape=True", "autoescape=False",
          ("tests/page/test_views.py::test_hostile_names_stay_text_on_every_page",)),
    Guard("no variable of the environment is recorded", "device.py",
          '"torch": torch.__version__,', '"torch": torch.__version__, "variables": dict(os.environ),', (SECRETS,)),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="guards whose words hold this; what the others came to is kept")
    options = parser.parse_args()
    chosen = [guard for guard in GUARDS if options.only in guard.what]
    found = measured("guards")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, copy / name)
        for guard in chosen:
            found[guard.what] = tried(guard, copy)
            print(f"{guard.what}: {found[guard.what]['said']}", file=sys.stderr, flush=True)
            kept = {guard.what: found[guard.what] for guard in GUARDS if guard.what in found}
            keep("guards", kept)
            rewrite(PAGE, START, END, table(kept))
    return int(any(one["said"] != "noticed" for one in found.values()))


def tried(guard: Guard, copy: Path) -> dict[str, str]:
    """What the tests say of the guard: `noticed` where each of them passes with it and fails without."""
    taken = [guard, *(other for other in GUARDS if other.what in guard.behind)]
    whole = {one.file: (copy / "gptlab" / one.file).read_text(encoding="utf-8") for one in taken}
    open_ = dict(whole)
    for one in taken:
        assert open_[one.file].count(one.line) == 1, f"{one.file}: expected {one.line!r} once"
        open_[one.file] = open_[one.file].replace(one.line, one.without)
    said = "noticed"
    if code := run(guard.tests, copy):
        said = f"do not pass as it is (pytest ended with {code})"
    else:
        write(copy, open_)
        for test in guard.tests:
            if (code := run((test,), copy)) != 1:
                said = f"pass: {test}" if code == 0 else f"pytest ended with {code}: {test}"
        write(copy, whole)
    return {
        "file": guard.file,
        "tests": ", ".join(guard.tests),
        "behind": ", ".join(guard.behind),
        "said": said,
        "date": date.today().isoformat(),
    }


def write(copy: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (copy / "gptlab" / name).write_text(text, encoding="utf-8")


def run(tests: tuple[str, ...], copy: Path) -> int:
    """What pytest ends with: 1 where a test failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-m", "", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, check=False, capture_output=True, timeout=600)
    return done.returncode


def table(found: dict[str, dict[str, str]]) -> str:
    """What was found, as Markdown."""
    lines = ["| guard | where | without it its tests | date |", "|---|---|---|---|"]
    lines += [f"| {what}{behind(one)} | `{one['file']}` | {said(one)} | {one['date']} |" for what, one in found.items()]
    return "\n".join([*lines, "", ""])


def behind(one: dict[str, str]) -> str:
    """What was taken out besides, in words."""
    return f" (and, taken out with it, {one['behind']})" if one.get("behind") else ""


def said(one: dict[str, str]) -> str:
    return "fail" if one["said"] == "noticed" else one["said"]


if __name__ == "__main__":
    sys.exit(main())
