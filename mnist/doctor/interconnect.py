"""Which links the messages between ranks take, and whether they are the ones that the machines have.

In: NCCL's log, `nvidia-smi`, /sys and the network interfaces. Out: a `Links` per rank, and a judgement of all of them
with the measured speed of an all-reduce.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

# The least that a healthy link of each kind carries in a large all-reduce, in bytes per second and rank: far below what
# its hardware can do, far above the next slower kind.
MIN_BYTES_PER_S = {
    "NVLink": 20e9,
    "InfiniBand": 3e9,
    "PCIe": 3e9,
    "shared memory": 1e9,
    "Ethernet": 50e6,
    "loopback": 10e6,
}
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Links:
    """Attributes:

    used: kinds of links, keys of `MIN_BYTES_PER_S`, that this rank sends over; empty where NCCL has not said.
    interface: network interface of TCP connections, e.g. eth0.
    infiniband: devices of this host with an active InfiniBand port, whether used or not.
    has_nvlink: whether NVLink connects each pair of GPUs of this host.
    """

    used: tuple[str, ...]
    interface: str
    infiniband: tuple[str, ...] = ()
    has_nvlink: bool = False


@contextlib.contextmanager
def nccl_log() -> Iterator[Path | None]:
    """Has NCCL write down which links it takes; must begin before the process group opens.

    Yields None where the user's own NCCL_DEBUG takes the log.
    """
    if "NCCL_DEBUG" in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "nccl.log")
        os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_FILE=str(path))
        try:
            yield path
        finally:
            del os.environ["NCCL_DEBUG"], os.environ["NCCL_DEBUG_FILE"]


def find_links(log: Path | None) -> Links:
    """The links of this rank, after its first messages."""
    interface = tcp_interface()
    if not (dist.is_initialized() and "nccl" in dist.get_backend()):
        return Links((kind_of_interface(interface),), interface)
    has_nvlink = torch.cuda.device_count() > 1 and nvlink_connects_all(_ask_nvidia_smi())
    text = log.read_text(errors="replace") if log is not None and log.exists() else ""
    found = re.search(r"NET/Socket : Using \[0\](\S+?):", text)
    return Links(links_in_log(text, has_nvlink), found[1] if found else interface, active_infiniband(), has_nvlink)


def links_in_log(text: str, has_nvlink: bool) -> tuple[str, ...]:
    """Kinds of links in NCCL's lines about channels, such as "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM"."""
    kinds = {
        "P2P": "NVLink" if has_nvlink else "PCIe",
        "SHM": "shared memory",
        "NET/IB": "InfiniBand",
        "NET/Socket": "Ethernet",
    }
    found = set(re.findall(r"\bvia (P2P|SHM|NET/IB|NET/Socket)", text))
    return tuple(kind for name, kind in kinds.items() if name in found)


def nvlink_connects_all(topology: str) -> bool:
    """Whether each pair of GPUs in the matrix of `nvidia-smi topo -m` is connected by NVLink (NV1, NV18, ...)."""
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s", line)]
    cells = [row[1 : len(rows) + 1] for row in rows]
    pairs = [cell for number, row in enumerate(cells) for other, cell in enumerate(row) if other != number]
    return bool(pairs) and all(re.fullmatch(r"NV\d+", cell) for cell in pairs)


def _ask_nvidia_smi() -> str:
    try:
        command = ["nvidia-smi", "topo", "-m"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout)  # its header is underlined


def active_infiniband(folder: Path = _INFINIBAND) -> tuple[str, ...]:
    """Devices with an active InfiniBand port, not those whose ports are Ethernet, as on cloud machines."""
    found = set()
    for port in folder.glob("*/ports/*"):
        with contextlib.suppress(OSError):
            is_infiniband = (port / "link_layer").read_text().strip() == "InfiniBand"
            if is_infiniband and "ACTIVE" in (port / "state").read_text():
                found.add(port.parents[1].name)
    return tuple(sorted(found))


def tcp_interface() -> str:
    """The interface that connects this rank to rank 0: the one that is configured, else the one of the route."""
    configured = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    if configured:
        return configured
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 1))  # sends nothing
            own = probe.getsockname()[0]
        except OSError:  # an IPv6 address, or a name that is not known any more
            return "unknown"
    for name, addresses in psutil.net_if_addrs().items():
        if own in {address.address for address in addresses}:
            return str(name)
    return "lo" if own.startswith("127.") else "unknown"


def kind_of_interface(name: str) -> str:
    """The kind of link of a TCP connection over an interface."""
    if name == "lo":
        return "loopback"
    return "InfiniBand" if name.startswith("ib") else "Ethernet"


def reason_for_slower_link(links: Links) -> str | None:
    """Why a rank's messages take a slower link than its host has; None where they do not."""
    if "Ethernet" in links.used and links.infiniband:
        return (
            f"sends over TCP ({links.interface}) although its host has InfiniBand ({', '.join(links.infiniband)}): "
            "look at NCCL_IB_DISABLE, NCCL_IB_HCA, NCCL_NET, and whether the container has /dev/infiniband"
        )
    if "shared memory" in links.used and links.has_nvlink:
        return (
            "copies through host memory although NVLink connects its GPUs: look at NCCL_P2P_DISABLE, and whether IOMMU "
            "or PCIe ACS is on"
        )
    return None


def slowest_link(links: Sequence[Links]) -> str | None:
    """The slowest kind of link among all ranks, which limits an all-reduce; None where it is not known."""
    kinds = {kind for link in links for kind in link.used}
    return next((kind for kind in reversed(MIN_BYTES_PER_S) if kind in kinds), None)
