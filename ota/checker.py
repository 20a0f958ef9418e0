"""The child process that checks the fleet's metadata: one question on stdin, one answer on stdout, then it ends.

Rules: its memory, CPU time, files and their size are limited before it reads a byte of metadata; it ends when the agent ends; it
answers only what it was asked.  Arguments: the agent's process id, and its CPU time in seconds.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Sequence

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.runtime.confine import address_space_bytes, allow_cpu_time, die_with
from ota.checked import (
    MAX_QUESTION_BYTES,
    Checked,
    Question,
    decode_question,
    encode_answer,
    encode_refused,
    encode_unavailable,
)
from ota.trust import MAX_TARGETS_BYTES, HttpFetcher, Offered, TrustedMetadata

MEMORY_BYTES = 256 * 2**20
"""Beyond what its libraries take: a question and an answer of the greatest length, parsed."""
MAX_OPEN_FILES = 64


def limit(cpu_s: int) -> None:
    """Give up what a check does not need."""
    for kind, ceiling in (
        (resource.RLIMIT_AS, address_space_bytes() + MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_FSIZE, MAX_TARGETS_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (ceiling, ceiling) if hard == resource.RLIM_INFINITY else (min(ceiling, hard), hard))
    allow_cpu_time(cpu_s)


def answer(question: Question) -> Checked:
    """Refresh, and find what is wanted. Raises as ``TrustedMetadata`` does."""
    trusted = TrustedMetadata(
        question.folder,
        HttpFetcher() if question.url else Offered(question.offered),
        bootstrap=question.root,
        base_url=question.url,
        floors=question.floors,
        not_before_s=question.not_before_s,
    )
    trusted.refresh()
    paths = trusted.paths()
    targets = {path: target for path in wanted(paths, question.want) if (target := trusted.target(path))}
    return Checked(targets, trusted.marks, trusted.signed_s, trusted.root_version, tuple(paths), tuple(trusted.notes))


def wanted(paths: Sequence[str], want: Sequence[str]) -> list[str]:
    """The exact paths of ``want``, and those of ``paths`` that one of its patterns matches; a ``*`` stays between slashes."""
    exact = [each for each in want if "*" not in each]
    patterns = ["[^/]*".join(map(re.escape, each.split("*"))) for each in want if "*" in each]
    matching = re.compile("|".join(patterns)) if patterns else None
    return list(dict.fromkeys(exact + [path for path in paths if matching and matching.fullmatch(path)]))


def answered(data: bytes) -> bytes:
    """The answer to an encoded question, whatever it is."""
    try:
        return encode_answer(answer(decode_question(data)))
    except RefusedError as error:
        return encode_refused(error)
    except UnavailableError as error:
        return encode_unavailable(error.subject, error.reason, error.remedy)


def main() -> None:
    parent, cpu_s = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        limit(cpu_s)
        out.write(answered(sys.stdin.buffer.read(MAX_QUESTION_BYTES + 1)))


if __name__ == "__main__":
    main()
