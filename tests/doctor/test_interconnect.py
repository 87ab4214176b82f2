from __future__ import annotations

import os
from pathlib import Path

import pytest

from mnist.config import RuntimeConfig
from mnist.doctor.interconnect import (
    Links,
    active_infiniband,
    find_links,
    kind_of_interface,
    links_in_log,
    nccl_log,
    nvlink_connects_all,
    slowest_link,
    tcp_interface,
)
from mnist.system.accelerator import open_accelerator
from tests.ranks import run_ranks

# As NCCL 2.27 writes it.
LOG = """\
node1:4242:4242 [0] NCCL INFO Bootstrap: Using eth0:10.0.0.1<0>
node1:4242:4242 [0] NCCL INFO NCCL version 2.27.5+cuda12.9
node1:4242:4310 [0] NCCL INFO NET/Socket : Using [0]eth1:10.0.0.1<0> [1]eth2:10.0.1.1<0>
node1:4242:4310 [0] NCCL INFO Using network Socket
node1:4242:4310 [0] NCCL INFO Channel 00/0 : 3[3] -> 0[0] [receive] via {network}
node1:4242:4310 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via {local}
node1:4242:4310 [0] NCCL INFO Connected all rings
"""


@pytest.mark.parametrize(
    ("local", "network", "has_nvlink", "links"),
    [
        ("P2P/CUMEM/read", "NET/IB/0/GDRDMA", True, ("NVLink", "InfiniBand")),
        ("P2P/IPC", "NET/IB/1", False, ("PCIe", "InfiniBand")),
        ("P2P/direct pointer", "NET/Socket/0", True, ("NVLink", "Ethernet")),
        ("SHM/direct/direct", "NET/Socket/1", True, ("shared memory", "Ethernet")),
    ],
)
def test_links_are_read_from_the_log_of_nccl(
    local: str, network: str, has_nvlink: bool, links: tuple[str, ...]
) -> None:
    assert links_in_log(LOG.format(local=local, network=network), has_nvlink) == links


def test_without_a_log_links_are_unknown() -> None:
    assert links_in_log("", has_nvlink=True) == ()
    assert slowest_link([Links((), "eth0")]) is None


def test_the_slowest_link_of_all_ranks_counts() -> None:
    assert slowest_link([Links(("NVLink", "InfiniBand"), "eth0"), Links(("NVLink",), "eth0")]) == "InfiniBand"
    assert slowest_link([Links(("NVLink",), "eth0"), Links(("PCIe", "Ethernet"), "eth0")]) == "Ethernet"


@pytest.mark.parametrize(("cell", "connects"), [("NV18", True), ("NV4", True), ("SYS", False), ("PHB", False)])
def test_nvlink_must_connect_each_pair_of_gpus(cell: str, connects: bool) -> None:
    topology = (
        "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
        "GPU0\t X \tNV18\tNV18\tPIX\t0-47\t0\t\tN/A\n"
        f"GPU1\tNV18\t X \t{cell}\tSYS\t0-47\t0\t\tN/A\n"
        f"GPU2\tNV18\t{cell}\t X \tSYS\t48-95\t1\t\tN/A\n"
        "NIC0\tPIX\tSYS\tSYS\t X \n\n"
        "Legend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
    )
    assert nvlink_connects_all(topology) is connects
    assert not nvlink_connects_all("")


def test_only_active_infiniband_ports_count(tmp_path: Path) -> None:
    ports = {
        "mlx5_0": ("4: ACTIVE", "InfiniBand"),
        "mlx5_1": ("1: DOWN", "InfiniBand"),
        "mlx5_2": ("4: ACTIVE", "Ethernet"),
    }
    for device, (state, layer) in ports.items():
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{layer}\n")
    assert active_infiniband(tmp_path) == ("mlx5_0",)
    assert active_infiniband(tmp_path / "none") == ()


@pytest.mark.parametrize(("name", "kind"), [("lo", "loopback"), ("eth0", "Ethernet"), ("ib0", "InfiniBand")])
def test_the_name_of_an_interface_tells_its_kind(name: str, kind: str) -> None:
    assert kind_of_interface(name) == kind


def test_the_interface_is_the_configured_one_or_that_of_the_route_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert tcp_interface() == "lo"
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    assert tcp_interface() == "lo", "as the own name of a Debian host"
    monkeypatch.setenv("MASTER_ADDR", "host.invalid")
    assert tcp_interface() == "unknown"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert tcp_interface() == "ib0"


def test_two_processes_on_one_machine_talk_over_loopback() -> None:
    def find() -> Links:
        with open_accelerator(RuntimeConfig(cpu=True, num_threads=1)):
            return find_links(None)

    assert run_ranks(find, 2) == [Links(("loopback",), "lo")] * 2


def test_nccl_is_asked_for_a_log_unless_the_user_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    with nccl_log() as path:
        assert path is not None
        assert (os.environ["NCCL_DEBUG"], os.environ["NCCL_DEBUG_FILE"]) == ("INFO", str(path))
        path.write_text("so")
    assert not path.parent.exists()
    assert "NCCL_DEBUG" not in os.environ
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with nccl_log() as path:
        assert path is None
    assert os.environ["NCCL_DEBUG"] == "WARN"
