"""The lines on which everything hangs, each taken out in turn: ``python -m tests.mutations`` (``make mutations``).

Owns ``MUTANTS``: a line, what stands there instead, and the test that must be red then.  Rules:

* Nothing is done to this checkout: every worker has a copy of the folders that the tests need.
* Every test of the table is green before anything is changed, so red means what it says.
* A line stands exactly once in its file, so the table cannot rot unseen; ``tests/test_mutations.py`` asks that in every run.
* Red is a test that failed in its own body: an import, a fixture, a name or a hang that a mutant broke proves nothing.
* The answer is a table of all mutants; its exit code is 0 only if every one was found.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("edge_agent", "board_support", "models", "ota", "tests")
FILES = ("setup.cfg", "pyproject.toml")
WORKERS = 2
LIMIT_S = 120.0
PROVES_NOTHING = ("ImportError", "ModuleNotFoundError", "SyntaxError", "NameError", "UnboundLocalError", "AttributeError")
_FAILED = re.compile(r"^FAILED (\S+?)(?:\[.*?\])?(?: - (.*))?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mutant:
    """``line`` (or lines) of ``file``, with its indentation; ``test``: ``file.py::name`` under ``tests/``."""

    what: str
    file: str
    line: str
    instead: str
    test: str


ORDER = "test_first_boot.py::test_19_all_of_an_environment_is_durable_before_its_stamp_and_the_stamp_before_the_link"
MUTANTS = (
    Mutant("fsync of a part before its rename", "edge_agent/store/files.py",
           "        self._disk.fsync(fd)", "        pass",
           "test_files.py::test_a_power_cut_at_any_write_leaves_the_old_content_or_the_new"),
    Mutant("rename of a part", "edge_agent/store/files.py",
           "        self._disk.rename(self._path, target)", "        self._disk.unlink(self._path)",
           "test_files.py::test_a_power_cut_at_any_write_leaves_the_old_content_or_the_new"),
    Mutant("fsync of the folder after the rename", "edge_agent/store/files.py",
           "        self._disk.fsync_folder(target.parent)", "        pass",
           "test_files.py::test_a_power_cut_at_any_write_leaves_the_old_content_or_the_new"),
    Mutant("digest of a blob that is used", "edge_agent/store/blobs.py",
           "                if actual != digest:", "                if False:",
           "test_blobs.py::test_every_single_bit_flip_is_found"),
    Mutant("fsync of the cache's folder after an adoption", "edge_agent/store/blobs.py",
           "        try:\n            self._disk.fsync_folder(self._folder)\n", "        try:\n            pass\n",
           "test_staging.py::test_an_installation_that_was_killed_at_any_change_is_durable_once_the_next_says_so"),
    Mutant("fsync of what was fetched", "edge_agent/store/staging.py",
           "            self._disk.fsync(self._descriptor())", "            pass",
           "test_staging.py::test_after_an_fsync_that_failed_what_the_storage_does_not_have_is_written_again"),
    Mutant("digest of the whole of what was fetched", "edge_agent/store/staging.py",
           "        if actual != self.pieces.digest:", "        if False:",
           "test_staging.py::test_a_list_of_pieces_that_does_not_make_the_whole_never_becomes_a_blob"),
    Mutant("fsync at a commit of the ledger", "edge_agent/store/database.py",
           '    "synchronous=FULL",', '    "synchronous=OFF",',
           "test_ledger.py::test_the_settings_that_make_a_commit_durable"),
    Mutant("commit of the ledger", "edge_agent/store/database.py",
           '                self.execute("COMMIT")', "                pass",
           "test_ledger.py::test_what_was_acknowledged_outlives_a_kill"),
    Mutant("signature of a message", "edge_agent/core/cose.py",
           "        bindings.crypto_sign_open(signature + signed_bytes, public_key)", "        pass",
           "test_cose.py::test_every_single_bit_flip_of_a_signed_message_is_refused"),
    Mutant("a report is signed by its own board", "ota/orders.py",
           '    _own("report", "board", entry["board"], signed.kid)', "    pass",
           "test_orders.py::test_a_report_in_another_boards_name_is_refused"),
    Mutant("a rollout is signed by its own operator", "ota/orders.py",
           '    _own("rollout", "operator", entry["operator"], signed.kid)', "    pass",
           "test_orders.py::test_a_rollout_in_another_operators_name_is_refused"),
    Mutant("wants are signed by their own board", "ota/chunks.py",
           '    if signed.kid != entry["board"].encode():', "    if False:",
           "test_chunks.py::test_wants_of_another_board_of_a_stranger_or_for_another_purpose_are_refused"),
    Mutant("digest of a piece", "ota/chunks.py",
           "        if actual != self.piece_digest(index):", "        if False:",
           "test_chunks.py::test_a_corrupt_chunk_is_refused_at_every_bit_of_a_small_one"),
    Mutant("floor of the metadata", "ota/trust.py",
           "        if version < floor:", "        if False:",
           "test_tuf_attacks.py::test_counter_files_deleted_or_restored_from_backup_lower_no_floor"),
    Mutant("the root that a board was enrolled with", "ota/trust.py",
           "        super().__init__(str(folder), base_url, fetcher=fetcher, config=limits, bootstrap=bootstrap)",
           "        bootstrap = None if (folder / 'root.json').is_file() else bootstrap\n"
           "        super().__init__(str(folder), base_url, fetcher=fetcher, config=limits, bootstrap=bootstrap)",
           "test_tuf_attacks.py::test_a_folder_swapped_for_that_of_another_fleet_does_not_change_whom_a_board_trusts"),
    Mutant("floor of a model's releases", "ota/slots.py",
           "    if release.number < max(slots.floor, FACTORY + 1):", "    if release.number < FACTORY + 1:",
           "test_slots.py::test_an_older_release_than_the_floor_is_refused"),
    Mutant("a start of a trial is counted before anything is loaded", "ota/records.py",
           "                    self.save(started[model])", "                    pass",
           "test_slots.py::test_case_23_boot_loop_is_bounded_for_starts_are_counted_durably_before_anything_is_loaded"),
    Mutant("a charter is of this fleet", "ota/course.py",
           '        _must_agree("charter of fleet", charter.fleet, self._fleet)', "        pass",
           "test_update_attacks.py::test_a_charter_of_another_fleet_is_refused"),
    Mutant("a charter has this board's own key", "ota/course.py",
           "        if own is not None and own.key != self._signer.public_key:", "        if False:",
           "test_update_attacks.py::test_a_charter_with_another_key_for_this_board_is_refused"),
    Mutant("signature of a self-test", "edge_agent/attest/self_test.py",
           "    signed = verify1(message, find_key, AAD, MAX_SELF_TEST_BYTES)",
           "    from edge_agent.core.cose import Signed, decode_sign1\n"
           "    parts = decode_sign1(message, MAX_SELF_TEST_BYTES)\n"
           "    signed = Signed(parts.payload, decode(parts.protected, MAX_SELF_TEST_BYTES)[4], 0)",
           "test_self_test.py::test_every_truncation_and_flipped_bit_of_a_self_test_is_refused"),
    Mutant("a self-test is of its signer", "edge_agent/attest/self_test.py",
           '    if signed.kid != entry["board"].encode():', "    if False:",
           "test_self_test.py::test_a_self_test_of_another_form_or_of_another_board_is_refused"),
    Mutant("first boot follows no link", "board_support/first_boot.py",
           "    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=folder)",
           "    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=folder)",
           "test_first_boot.py::test_a_state_folder_that_is_a_link_gives_nothing_away"),
    Mutant("first boot gives no file with a second name away", "board_support/first_boot.py",
           "    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:", "    if not stat.S_ISREG(facts.st_mode):",
           "test_first_boot.py::test_a_second_name_of_a_file_of_roots_gives_nothing_away"),
    Mutant("an environment is durable before its stamp", "board_support/first_boot.py",
           "    _settle(target)", "    pass", ORDER),
    Mutant("fsync of a stamp before its rename", "board_support/first_boot.py",
           "        os.fsync(file.fileno())", "        pass", ORDER),
    Mutant("fsync of the folder after a stamp", "board_support/first_boot.py",
           "    _fsync(path.parent)", "    pass", ORDER),
    Mutant("fsync of the folder after the factory's link", "board_support/first_boot.py",
           "    _fsync(link.parent)", "    pass", ORDER),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """What became of a mutant; ``why`` it was not found, or the words of the test that found it."""

    mutant: Mutant
    red: bool
    why: str
    took_s: float


def check(mutants: Sequence[Mutant] = MUTANTS, workers: int = WORKERS) -> list[Found]:
    """Try all mutants, ``workers`` at a time. Raises ``ValueError`` for a line that does not stand exactly once in its file,
    ``RuntimeError`` when a test is red before anything was changed."""
    for mutant in mutants:
        must_stand_once(ROOT, mutant)
    with tempfile.TemporaryDirectory(prefix="sly-mutants-") as folder, ThreadPoolExecutor(workers) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for tree in pool.map(copied, (Path(folder) / str(number) for number in range(workers))):
            trees.put(tree)

        def using_a_tree(tests: Iterable[str], mutant: Mutant | None = None) -> Found | str:
            tree = trees.get()
            try:
                return tried(tree, mutant) if mutant else green(tree, tests)
            finally:
                trees.put(tree)

        tests = sorted({each.test for each in mutants})
        greens = [pool.submit(using_a_tree, part) for part in (tests[at::workers] for at in range(workers)) if part]
        founds = [pool.submit(using_a_tree, (), mutant) for mutant in mutants]
        if reds := [str(each.result()) for each in greens if each.result()]:
            raise RuntimeError("red before anything was changed: " + "\n".join(reds))
        return [found for each in founds if isinstance(found := each.result(), Found)]


def must_stand_once(root: Path, mutant: Mutant) -> str:
    """The content of the mutant's file. Raises ``ValueError`` unless its line is there exactly once."""
    text = (root / mutant.file).read_text()
    count = f"\n{text}\n".count(f"\n{mutant.line.rstrip()}\n")
    if count != 1:
        raise ValueError(
            f"{mutant.what}: {mutant.line.strip()!r} stands {count} times in {mutant.file}; it must stand there once"
        )
    return text


def copied(tree: Path) -> Path:
    """What the tests need of this checkout, in ``tree``, and what is compiled of it: it is told by times, which stay."""
    ignore = shutil.ignore_patterns("*.pyc.*")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, tree)
    return tree


def green(tree: Path, tests: Iterable[str]) -> str:
    """What is wrong with ``tests`` where nothing was changed; empty if nothing is."""
    done = pytest_in(tree, tests)
    return "" if done.returncode == 0 else done.stdout[-4000:]


def tried(tree: Path, mutant: Mutant) -> Found:
    began_s = time.monotonic()
    try:
        with mutated(tree, mutant):
            red, why = judged(mutant, pytest_in(tree, [mutant.test]))
    except SyntaxError as error:
        red, why = False, f"it is no Python: {error}"
    except subprocess.TimeoutExpired:
        red, why = False, f"no answer in {LIMIT_S:g} s"
    return Found(mutant, red, why, time.monotonic() - began_s)


def judged(mutant: Mutant, done: subprocess.CompletedProcess[str]) -> tuple[bool, str]:
    """Whether the test found it, and by which words."""
    failed = {name: words or "" for name, words in _FAILED.findall(done.stdout)}
    words = failed.get(f"tests/{mutant.test}")
    if done.returncode == 0:
        return False, "the test is green: it does not see this"
    if done.returncode != 1 or words is None:
        return False, f"the test did not fail, it could not be run (pytest ended with {done.returncode})"
    if words.startswith(PROVES_NOTHING):
        return False, f"broken, not wrong: {words}"
    return True, words


@contextmanager
def mutated(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The tree with the mutant in it. Raises ``SyntaxError`` for one that is no Python."""
    path, text = tree / mutant.file, must_stand_once(tree, mutant)
    line, instead = f"\n{mutant.line.rstrip()}\n", f"\n{mutant.instead.rstrip()}\n"
    changed = f"\n{text}".replace(line, instead)[1:]
    compile(changed, str(path), "exec")
    try:
        put(path, changed)
        yield
    finally:
        put(path, text)


def put(path: Path, text: str) -> None:
    """What was compiled of the file goes too: it is told from another only by its size and its second."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()
    path.write_text(text)


def pytest_in(tree: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """These tests in a process of their own, on the code in ``tree``: its children find that first too."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-rfE"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "400"}, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip


def table(founds: Iterable[Found]) -> str:
    rows = [f"{'':7}{'without':58} {'red by':110} {'s':>5}"]
    for found in founds:
        verdict = "found" if found.red else "ALIVE"
        rows.append(f"{verdict:7}{found.mutant.what:58} {found.mutant.test:110} {found.took_s:5.1f}")
        rows += [] if found.red else [f"{'':7}  {found.mutant.file}: {found.mutant.line.strip()}", f"{'':7}  {found.why}"]
    return "\n".join(rows)


def main() -> int:
    began_s = time.monotonic()
    founds = check()
    alive = sum(not found.red for found in founds)
    print(table(founds))
    print(f"{len(founds) - alive} of {len(founds)} mutants found in {time.monotonic() - began_s:.0f} s")
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main())
