"""Who the broker is and who may come to it: certificates as ``sly fleet`` makes them, on a real Mosquitto."""

from __future__ import annotations

import asyncio
import datetime
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.steward import authority as authority_module
from edge_agent.steward.authority import Authority, days_left
from edge_agent.steward.enrolling import Enrolment, enroll
from edge_agent.steward.folder import OperatorFolder
from edge_agent.transport.endpoint import BrokerAddress
from edge_agent.transport.link import LinkDown, LinkUp, Message
from edge_agent.transport.mqtt import check
from edge_agent.transport.tls import TlsFiles
from edge_agent.transport.topics import Topics
from tests.brokers import mosquitto
from tests.certificates import needs_openssl
from tests.operators import HOST, Client, address_of, broker_of, new_fleet

CA = "ca/ca.pem"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorFolder]:
    folder = new_fleet(tmp_path_factory.mktemp("tls") / "fleet")
    enroll(folder, Enrolment("kitchen", "jalapeno"))
    enroll(folder, Enrolment("barn", "jalapeno"))
    with broker_of(folder):
        yield folder


def fault(address: BrokerAddress) -> SlyError:
    with pytest.raises((UnavailableError, RefusedError)) as failed:
        asyncio.run(check(address, "checker"))
    assert "\n" not in str(failed.value)
    return failed.value


def pair(folder: Path, issued: authority_module.Issued) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(issued.certificate)
    key.write_bytes(issued.key)
    return certificate, key


def served_by(issued: authority_module.Issued, trusted: Path, tmp_path: Path, host: str = HOST) -> SlyError:
    """What a client that trusts ``trusted`` says of a broker with this certificate."""
    certificate, key = pair(tmp_path / "served", issued)
    with mosquitto(tmp_path / "broker", tls=f"certfile {certificate}\nkeyfile {key}") as broker:
        return fault(BrokerAddress(host, broker.port, TlsFiles(trusted)))


def test_a_board_comes_in_with_what_its_enrolment_wrote(fleet: OperatorFolder) -> None:
    asyncio.run(check(address_of(fleet, "kitchen"), "checker"))


def test_a_client_without_a_certificate_or_with_that_of_another_fleet_is_not_let_in(
    fleet: OperatorFolder, tmp_path: Path
) -> None:
    stranger = Authority.create(tmp_path / "stranger", "home")
    ca, port = fleet.folder / CA, fleet.settings.port
    for files in (TlsFiles(ca), TlsFiles(ca, *pair(tmp_path / "board", stranger.issue_client("kitchen")))):
        told = fault(BrokerAddress(HOST, port, files))
        assert isinstance(told, UnavailableError) and "certificate" in str(told)


def test_a_client_whose_certificate_has_expired_is_not_let_in(
    fleet: OperatorFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "CLIENT_DAYS", -1)
    files = TlsFiles(fleet.folder / CA, *pair(tmp_path / "old", fleet.authority.issue_client("kitchen")))
    assert "certificate expired" in str(fault(BrokerAddress(HOST, fleet.settings.port, files)))


def test_a_broker_of_another_ca_is_refused(fleet: OperatorFolder, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "stranger", "home")
    told = served_by(stranger.issue_broker([HOST]), fleet.folder / CA, tmp_path)
    assert isinstance(told, RefusedError) and "not signed by our CA" in str(told)


def test_a_broker_whose_certificate_has_expired_is_refused(
    fleet: OperatorFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "BROKER_DAYS", -1)
    told = served_by(fleet.authority.issue_broker([HOST]), fleet.folder / CA, tmp_path)
    assert isinstance(told, RefusedError) and "expired" in str(told)


def test_a_hostname_that_is_not_the_one_dialled_is_refused(fleet: OperatorFolder, tmp_path: Path) -> None:
    told = served_by(fleet.authority.issue_broker(["10.0.0.1", "broker.example"]), fleet.folder / CA, tmp_path)
    assert isinstance(told, RefusedError) and "for another address than the one that was dialled" in str(told)


def test_a_boards_certificate_makes_no_broker_and_a_brokers_no_client(fleet: OperatorFolder, tmp_path: Path) -> None:
    told = served_by(fleet.authority.issue_client("kitchen"), fleet.folder / CA, tmp_path)
    assert isinstance(told, RefusedError)
    files = TlsFiles(fleet.folder / CA, *pair(tmp_path / "as-client", fleet.authority.issue_broker([HOST])))
    assert "certificate" in str(fault(BrokerAddress(HOST, fleet.settings.port, files)))


def test_a_board_whose_clock_says_1970_can_believe_the_broker_and_a_long_lived_one_still_does(fleet: OperatorFolder) -> None:
    needs_openssl()
    in_25_years = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=4 * 365)
    for at_s in (86_400, int(in_25_years.timestamp())):
        command = [
            "openssl",
            "verify",
            "-attime",
            str(at_s),
            "-CAfile",
            fleet.folder / CA,
            "-purpose",
            "sslserver",
            "-x509_strict",
        ]
        done = subprocess.run([*command, fleet.broker_folder / "broker.pem"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_a_client_id_takeover_loop_is_told_backs_off_and_each_stays_whom_its_certificate_names(fleet: OperatorFolder) -> None:
    async def scene() -> None:
        kitchen = await Client(address_of(fleet, "kitchen"), "sly-home-kitchen").up()
        thief = await Client(address_of(fleet, "barn"), "sly-home-kitchen").up()
        for each in (kitchen, thief):
            await each.until(lambda each=each: len(each.downs) >= 2)  # type: ignore[misc]
        assert all("another client uses our id" in str(down.reason) or "taken over" in down.reason for down in kitchen.downs)
        assert max(down.retry_in_us for down in kitchen.downs) > 0
        kitchen.link.close()
        await thief.until(lambda: isinstance(thief.events[-1], LinkUp) or not isinstance(thief.events[-1], LinkDown))
        thief.link.subscribe("#")
        topics = Topics("home")
        assert await thief.says(Message(topics.record("kitchen"), b"x")) == "not authorized"
        thief.link.close()

    asyncio.run(scene())


def test_keys_are_private_p_256_and_a_ca_is_never_made_over(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "home")
    assert stat.S_IMODE((tmp_path / "ca" / "ca.key").stat().st_mode) == 0o600
    with pytest.raises(RefusedError, match="there already"):
        Authority.create(tmp_path / "ca", "home")
    issued = authority.issue_client("kitchen")
    assert b"PRIVATE" not in issued.certificate and "PRIVATE" not in repr(issued)
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    assert certificate.public_key().curve.name == "secp256r1"  # type: ignore[union-attr]
    assert days_left(issued.certificate, 0) > 20 * 365


def test_a_ca_key_of_another_certificate_or_none_at_all_is_refused_by_its_name(tmp_path: Path) -> None:
    one, other = (Authority.create(tmp_path / name, name) for name in ("one", "other"))
    assert one.certificate != other.certificate
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(RefusedError, match=r"ca\.key of another certificate"):
        Authority(tmp_path / "one")
    (tmp_path / "other" / "ca.pem").write_text("no certificate")
    with pytest.raises(RefusedError, match=r"ca\.pem: got no PEM certificate"):
        Authority(tmp_path / "other")


def test_a_revoked_certificate_stays_revoked_when_others_are_and_new_ones_are_good(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "home")
    first, second = authority.issue_client("kitchen"), authority.issue_client("kitchen")
    authority.issue_client("barn")
    assert authority.revoke("kitchen", besides=[second.certificate]) == 1
    assert authority.revoke("barn") == 1 and authority.revoke("barn") == 0
    revoked = {each.serial_number for each in x509.load_pem_x509_crl(Authority(tmp_path / "ca").crl_pem)}
    assert x509.load_pem_x509_certificate(first.certificate).serial_number in revoked
    assert x509.load_pem_x509_certificate(second.certificate).serial_number not in revoked
    assert len(revoked) == 2


def test_a_board_called_like_the_broker_does_not_take_the_brokers_certificate_with_it(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "home")
    authority.issue_broker(["localhost"])
    authority.issue_client("localhost")
    assert authority.revoke("localhost") == 1


@pytest.mark.parametrize("name", ["naïve", "münchen.example"])
def test_a_broker_name_that_no_certificate_can_hold_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(RefusedError, match="a host name in ASCII"):
        Authority.create(tmp_path / "ca", "home").issue_broker([name])
