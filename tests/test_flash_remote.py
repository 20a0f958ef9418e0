"""``flash.sh --ssh``: a real sshd on loopback whose every session is in a small system of its own (busybox)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.needs import needs
from tests.small_images import Flasher, elf, in_memory, run, small_system, tree_of, write

PATIENCE_S = 60
SYSTEMCTL = """#!/bin/sh
echo "$*" >>/systemctl.log
case "$*" in
    'is-active --quiet sly-agent.service') [ -e /agent.runs ] ;;
    stop*) rm -f /agent.runs ;;
    *start\\ sly-agent.service) touch /agent.runs ;;
esac
"""
HELD_TAR = """#!/bin/sh
[ -e /opt/sly/flashed.list ] || { touch /tar.runs; while [ -e /hold ]; do busybox sleep 0.05; done; }
exec busybox tar "$@"
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def busybox_system(folder: Path) -> Path:
    system, busybox = small_system(folder), shutil.which("busybox")
    needs(busybox and "not a dynamic" in run_ldd(busybox), "there is no static busybox (apt-get install busybox-static)")
    assert busybox
    shutil.copy(busybox, system / "usr/bin/busybox")
    for applet in run(busybox, "--list").split():
        if not (system / "usr/bin" / applet).exists():
            (system / "usr/bin" / applet).symlink_to("busybox")
    write(system / "usr/bin/systemctl", SYSTEMCTL.encode(), 0o755)
    take(system, "dash", "usr/bin/sh")
    for name in ("flock", "install"):
        take(system, name, f"usr/bin/{name}")
    (system / "proc").mkdir()
    (system / "dev").mkdir()
    os.mknod(system / "dev/null", 0o666 | 0o020000, os.makedev(1, 3))
    for each in ("run/systemd/system", "var/tmp"):
        (system / each).mkdir(parents=True)
    return system


def take(system: Path, name: str, place: str) -> None:
    """With its libraries; dash as the shell, for busybox' own would not run the scripts that stand for its applets here."""
    program = shutil.which(name)
    needs(program, f"there is no {name}")
    (system / place).unlink(missing_ok=True)
    shutil.copy(str(program), system / place)
    for library in {Path(word) for word in run_ldd(str(program)).split() if word.startswith("/")}:
        (system / library.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library.resolve(), system / library.relative_to("/"))


def run_ldd(program: str) -> str:
    done = subprocess.run(["ldd", program], capture_output=True, text=True)
    return done.stdout + done.stderr


class Machine:
    """A system that runs, reached by SSH as ``kitchen`` of a configuration of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        folder.chmod(0o755)
        self.system = busybox_system(folder / "system")
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        write(folder / "enter", f'#!/bin/sh\nexec chroot {self.system} /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'.encode(), 0o755)
        write(folder / "sshd_config", self._server().encode())
        write(folder / "ssh_config", self._client().encode())
        write(folder / "ssh", f'#!/bin/sh\nexec ssh -F {folder}/ssh_config "$@"\n'.encode(), 0o755)
        self.know_host()
        Path("/run/sshd").mkdir(exist_ok=True)
        self.log = (folder / "sshd.log").open("wb")
        own_root = f"mount --bind {self.system} {self.system} && mount -t proc proc {self.system}/proc"
        start = f"{own_root} && exec /usr/sbin/sshd -D -e -f {folder}/sshd_config"
        self.sshd = subprocess.Popen(["unshare", "--mount", "sh", "-c", start], stderr=self.log)
        self._await_server()

    def _server(self) -> str:
        return f"""ListenAddress 127.0.0.1:{self.port}
HostKey {self.folder}/host
AuthorizedKeysFile {self.folder}/user.pub
ForceCommand {self.folder}/enter
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
"""

    def _client(self) -> str:
        return f"""Host kitchen
HostName 127.0.0.1
Port {self.port}
User root
IdentityFile {self.folder}/user
IdentitiesOnly yes
UserKnownHostsFile {self.folder}/known_hosts
GlobalKnownHostsFile /dev/null
"""

    def know_host(self) -> None:
        key = (self.folder / "host.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")

    def _await_server(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert self.sshd.poll() is None and time.monotonic() < deadline, (self.folder / "sshd.log").read_text()
                time.sleep(0.05)

    def cut_connections(self) -> None:
        for child in Path(f"/proc/{self.sshd.pid}/task/{self.sshd.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)

    def commands(self) -> list[str]:
        log = self.system / "systemctl.log"
        return log.read_text().splitlines() if log.exists() else []

    def close(self) -> None:
        self.sshd.terminate()
        self.sshd.wait()
        self.log.close()


@pytest.fixture(scope="module")
def flasher() -> Iterator[Flasher]:
    needs(
        os.geteuid() == 0 and shutil.which("sshd", path="/usr/sbin"), "root and sshd are needed (apt-get install openssh-server)"
    )
    folder = Path(tempfile.mkdtemp(prefix="sly-ssh-test-", dir=in_memory()))
    folder.chmod(0o755)
    try:
        yield Flasher(folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def machine(flasher: Flasher) -> Iterator[Machine]:
    machine = Machine(flasher.folder / "machine")
    try:
        yield machine
    finally:
        machine.close()
        shutil.rmtree(machine.folder)


def flash(flasher: Flasher, machine: Machine, *options: str, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    return flasher.flash("--ssh", "kitchen", *options, shell=shell, SLY_SSH=str(machine.folder / "ssh"))


def test_a_machine_that_runs_becomes_a_board_and_its_agent_starts(flasher: Flasher, machine: Machine) -> None:
    done = flash(flasher, machine, "--yes")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stderr
    told = tree_of(machine.system)
    assert told["var/lib/sly/kitchen/identity.key"][0] == "-rw-------"
    assert told["opt/sly/flashed.list"][2:4] == (0, 0)
    assert (machine.system / "var/lib/sly/kitchen/identity.key").read_bytes() == (flasher.enrolled / "identity.key").read_bytes()
    assert "stop" not in " ".join(machine.commands()), "nothing ran there"
    assert machine.commands()[-1] == "--no-block start sly-agent.service"
    assert list((machine.system / "var/tmp").iterdir()) == []


@pytest.mark.long
def test_an_agent_that_runs_is_stopped_and_started_and_one_that_is_stopped_stays_so(flasher: Flasher, machine: Machine) -> None:
    write(machine.system / "etc/systemd/system/sly-agent.service")
    write(machine.system / "agent.runs")
    done = flash(flasher, machine, "--yes")
    assert done.returncode == 0, done.stderr
    verbs = [line.split()[-2 if "sly" in line else 0] for line in machine.commands()]
    assert verbs.index("sly-agent.service") < verbs.index("daemon-reload") < verbs.index("start"), machine.commands()
    assert (machine.system / "agent.runs").exists()
    (machine.system / "agent.runs").unlink()
    done = flash(flasher, machine, "--yes")
    assert done.returncode == 0, done.stderr
    assert "stays so" in done.stderr
    assert not (machine.system / "agent.runs").exists()


@pytest.mark.parametrize("what", ["unknown host", "wrong key", "no sudo", "nobody to ask", "riscv64", "option", "dry run"])
def test_whom_ssh_or_the_machine_refuses_writes_nothing(flasher: Flasher, machine: Machine, what: str) -> None:
    """Not one question on a terminal that is not there, and no host key believed that the user does not know."""
    options, said, code = ["--yes"], "no SSH connection", 1
    if what == "unknown host":
        (machine.folder / "known_hosts").write_text("")
    elif what == "wrong key":
        (machine.folder / "user").unlink()
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", machine.folder / "user", input="y\n")
        (machine.folder / "user.pub").write_text("")
    elif what == "no sudo":
        as_user(machine, sudo="exit 1")
        said, code = "NOPASSWD", 2
    elif what == "nobody to ask":
        options, said, code = [], "stdin is no terminal", 2
    elif what == "riscv64":
        write(machine.system / "usr/bin/python3.11", elf("riscv64"), 0o755)
        said, code = "riscv64", 2
    elif what == "dry run":
        options, said, code = ["--dry-run"], "nothing was written", 0
    before, hosts = tree_of(machine.system), (machine.folder / "known_hosts").read_text()
    if what == "option":
        done = flasher.flash("--ssh", "-oProxyCommand=touch x", *options, SLY_SSH=str(machine.folder / "ssh"))
        said, code = "USER@HOST", 2
    else:
        done = flash(flasher, machine, *options)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert tree_of(machine.system) == before
    assert (machine.folder / "known_hosts").read_text() == hosts


def as_user(machine: Machine, sudo: str) -> None:
    """Who logs in is told to be another than root, until sudo was asked."""
    for name, script in {"id": 'echo "${ROOT_BY_SUDO:-1000}"', "sudo": sudo}.items():
        (machine.system / "usr/bin" / name).unlink(missing_ok=True)
        write(machine.system / "usr/bin" / name, f"#!/bin/sh\n{script}\n".encode(), 0o755)


@pytest.mark.long
def test_a_user_with_sudo_that_asks_nothing_flashes_as_root(flasher: Flasher, machine: Machine) -> None:
    as_user(machine, sudo='[ "$1" = -n ] || exit 9; shift; export ROOT_BY_SUDO=0; echo x >>/sudo.log; exec "$@"')
    done = flash(flasher, machine, "--yes", shell="busybox")
    assert done.returncode == 0, done.stderr
    assert (machine.system / "opt/sly/flashed.list").exists()
    assert (machine.system / "sudo.log").read_text().count("x") > 10


@pytest.mark.long
def test_a_connection_that_is_lost_leaves_no_whole_board_and_flashing_again_goes_on(flasher: Flasher, machine: Machine) -> None:
    """Meanwhile another is refused; afterwards who stopped the agent starts it."""
    write(machine.system / "etc/systemd/system/sly-agent.service")
    write(machine.system / "agent.runs")
    whole = flash(flasher, machine, "--yes")
    assert whole.returncode == 0, whole.stderr
    write(machine.system / "var/lib/sly/kitchen/ledger.db", b"what the board did")
    cut_in_the_second_stream(flasher, machine)
    again = flash(flasher, machine, "--yes")
    assert again.returncode == 0, again.stderr
    assert (machine.system / "opt/sly/flashed.list").exists()
    assert not (machine.system / "opt/sly/flashing.list").exists()
    assert (machine.system / "var/lib/sly/kitchen/ledger.db").read_bytes() == b"what the board did"
    assert (machine.system / "agent.runs").exists(), "who stopped it starts it"
    assert "stopped by a flashing that did not end" in again.stderr


@pytest.mark.long
def test_a_machine_that_another_flashes_is_refused_until_that_one_is_gone_however_it_went(
    flasher: Flasher, machine: Machine
) -> None:
    whole = flash(flasher, machine, "--yes")
    assert whole.returncode == 0, whole.stderr
    with held_in_the_second_stream(flasher, machine) as process:
        before = tree_of(machine.system)
        done = flash(flasher, machine, "--yes", shell="busybox")
        assert (done.returncode, "another flash.sh is at work" in done.stderr) == (2, True), done.stderr
        assert tree_of(machine.system) == before
        process.kill()
    deadline = time.monotonic() + PATIENCE_S
    while (done := flash(flasher, machine, "--yes")).returncode == 2:
        assert time.monotonic() < deadline, done.stderr
    assert done.returncode == 0, done.stderr


@contextmanager
def held_in_the_second_stream(flasher: Flasher, machine: Machine) -> Iterator[subprocess.Popen[str]]:
    """The list of what is flashed has gone, the tree has not come."""
    hold = machine.system / "hold"
    environment = {**os.environ, "TMPDIR": str(flasher.folder / "scratch"), "SLY_SSH": str(machine.folder / "ssh")}
    hold.touch()
    (machine.system / "usr/bin/tar").unlink()
    write(machine.system / "usr/bin/tar", HELD_TAR.encode(), 0o755)
    (flasher.folder / "scratch").mkdir(exist_ok=True)
    command = flasher.command("--ssh", "kitchen", "--yes")
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_for(machine.system / "tar.runs")
            yield process
        finally:
            hold.unlink()
            process.kill()
            (machine.system / "usr/bin/tar").unlink()
            (machine.system / "usr/bin/tar").symlink_to("busybox")


def cut_in_the_second_stream(flasher: Flasher, machine: Machine) -> None:
    with held_in_the_second_stream(flasher, machine) as process:
        other = flash(flasher, machine, "--yes", shell="busybox")
        assert (other.returncode, "another flash.sh is at work" in other.stderr) == (2, True), other.stderr
        machine.cut_connections()
        assert process.stderr
        told = process.stderr.read()
    assert process.wait() == 1, told
    assert told.count("the connection was lost") == 1, told
    assert not (machine.system / "opt/sly/flashed.list").exists()
