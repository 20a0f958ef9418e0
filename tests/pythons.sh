#!/bin/sh
# The tests on other Pythons than make's own: sh tests/pythons.sh "3.12 3.13" [words for pytest, else every test].
#
# Owns .venv-<version> beside the checkout. Rules: a Python is taken from PATH or from pyenv's versions, and only if it runs; one
# that is not here is named, never passed over in silence; with SLY_NEED_PYTHONS set it is a failure.
set -eu
cd "$(dirname "$0")/.."

find_python() {
  for candidate in "$(command -v "python$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if [ -x "$candidate" ] && "$candidate" -c "import ensurepip, ssl, sqlite3" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

make_environment() {
  if [ -n "$(find ".venv-$1/dev.made" -newer setup.cfg 2>/dev/null)" ]; then
    return
  fi
  echo "installing what the tests need into .venv-$1 ..."
  "$2" -m venv ".venv-$1"
  ".venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[demo,dev,gateway,bench,cloud]'
  touch ".venv-$1/dev.made"
}

run_tests() {
  version=$1
  shift
  echo "== Python $version: $(".venv-$version/bin/python" --version)"
  SLY_OTHER_PYTHON="$PWD/.venv/bin/python" ".venv-$version/bin/python" -m pytest -n "${WORKERS:-0}" --dist worksteal "$@"
}

versions=$1
shift
absent=
for version in $versions; do
  python=$(find_python "$version")
  if [ -z "$python" ]; then
    absent="$absent $version"
    continue
  fi
  make_environment "$version" "$python"
  run_tests "$version" "$@"
done
if [ -n "$absent" ]; then
  echo "not tested on Python$absent: no such Python on PATH or in pyenv's versions" >&2
  [ -z "${SLY_NEED_PYTHONS:-}" ] || exit 1
fi
