"""Two hosts on one machine: network namespaces with names, addresses and a cable of their own; one file system."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HOSTS = {"mxy-host-a": "10.77.0.1", "mxy-host-b": "10.77.0.2"}
INTERFACE = "eth0"

# Name and hosts file of the host, then the command.
ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class CannotMakeHosts(Exception):
    """Network namespaces cannot be made here; the reason."""


@contextmanager
def two_hosts(folder: Path) -> Iterator[None]:
    """Both hosts, while the block runs. Raises CannotMakeHosts."""
    first, second = HOSTS
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in HOSTS.items()))
    try:
        for name in HOSTS:
            _ip("netns", "add", name)
        _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in HOSTS.items():
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", device, "up")
        subprocess.run(on_host(first, ["true"], folder=folder), check=True, capture_output=True, text=True)
        yield
    except subprocess.CalledProcessError as error:
        raise CannotMakeHosts(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
    except FileNotFoundError as error:
        raise CannotMakeHosts(f"{error.filename} is not installed") from None
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def on_host(name: str, command: Sequence[str], *, folder: Path) -> list[str]:
    """The argv that runs `command` there."""
    inside = ["unshare", "--mount", "--uts", "bash", "-c", ENTER, "-", name, str(folder / "hosts"), *command]
    return ["ip", "netns", "exec", name, *inside]


def plug(name: str, state: str) -> None:
    """Pulls a host's cable (down) or puts it back (up)."""
    _ip("-n", name, "link", "set", INTERFACE, state)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
