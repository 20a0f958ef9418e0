"""``sly broker``: the embedded MQTT broker, for several agents on one machine."""

from __future__ import annotations

import argparse


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "run the embedded MQTT broker, for several agents on this machine"
    more = (
        "It listens on 127.0.0.1 and forgets everything when it stops; a fleet of several machines needs Mosquitto or the like."
    )
    parser = subparsers.add_parser("broker", help=about, description=more)
    parser.add_argument("--port", type=int, default=1883, metavar="N", help="where it listens (default: 1883)")
    parser.set_defaults(run=_broker)


def _broker(arguments: argparse.Namespace) -> int:
    import os
    import selectors
    import signal
    import sys

    from edge_agent.core.errors import UnavailableError
    from edge_agent.transport.embedded import HOST, EmbeddedBroker

    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with EmbeddedBroker(arguments.port) as broker, selectors.DefaultSelector() as selector:
        print(f"broker on {HOST}:{arguments.port}; Ctrl-C ends it", file=sys.stderr, flush=True)
        assert broker.pid is not None
        end = os.pidfd_open(broker.pid)
        selector.register(wake_read, selectors.EVENT_READ)
        selector.register(end, selectors.EVENT_READ)
        asked_to_end = wake_read in [key.fd for key, _ in selector.select()]
        os.close(end)
    if not asked_to_end:
        raise UnavailableError(f"broker on {HOST}:{arguments.port}", "it ended by itself", "start it again")
    return 0
