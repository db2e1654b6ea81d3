"""The parts of the workers that start nothing: capacity, exits, logs, orders, memory."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab_storage.database import Store
from attnlab_storage.queue import Claim
from attnlab_workers import log_relay, processes, ray_cluster
from attnlab_workers.backlog import Waiting
from attnlab_workers.capacity import Capacity, Node, Share
from attnlab_workers.exits import classify, exit_from_dict
from attnlab_workers.log_relay import LogRelay
from attnlab_workers.order import Order, order_from_dict, resolve

MB = 2**20
INSPECT, BENCH = Waiting(1, 0, False), Waiting(2, 0, True)
ONE_GPU, TWO_GPUS = Waiting(3, 1, True), Waiting(4, 2, True)


def capacity(*nodes: Node) -> Capacity:
    made = Capacity()
    made.replace_nodes(nodes)
    return made


def fill(capacity: Capacity, *runs: Waiting) -> list[Share | None]:
    shares = []
    for index, run in enumerate(runs):
        share = capacity.place(run)
        shares.append(share)
        if share is not None:
            capacity.held[f"{index}"] = share
    return shares


def test_one_slot_takes_one_run():
    first, second = fill(capacity(Node("a", "a", 1, 0)), INSPECT, INSPECT)
    assert first is not None
    assert second is None


def test_a_timed_run_on_the_processor_has_its_node_to_itself():
    node = Node("a", "a", 3, 0)
    (bench, beside) = fill(capacity(node), BENCH, INSPECT)
    assert bench == Share(node, 3, 0)
    assert bench is not None
    assert bench.of_machine == 1.0
    assert beside is None
    assert fill(capacity(node), INSPECT, BENCH)[1] is None


def test_gpus_are_counted_a_node_and_not_added_up():
    two = capacity(Node("a", "a", 1, 1), Node("b", "b", 1, 1))
    assert two.place(TWO_GPUS) is None
    assert two.never_fits(TWO_GPUS) == "waiting for 2 GPUs: the best of 2 nodes has 1"
    assert [share and share.node.id for share in fill(two, ONE_GPU, ONE_GPU, ONE_GPU)] == ["a", "b", None]


def test_a_run_without_a_gpu_leaves_the_gpus_to_others():
    (share,) = fill(capacity(Node("gpu", "gpu", 1, 1), Node("cpu", "cpu", 1, 0)), INSPECT)
    assert share is not None
    assert share.node.id == "cpu"


def test_the_node_that_fits_best_is_taken():
    (share,) = fill(capacity(Node("big", "big", 8, 8), Node("small", "small", 2, 2)), TWO_GPUS)
    assert share is not None
    assert share.node.id == "small"


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ((), "waiting for a machine: no node of the cluster takes runs"),
        ((Node("head", "head", 0, 0),), "waiting for a machine: no node of the cluster takes runs"),
        ((Node("a", "a", 1, 0),), "waiting for 1 GPU: this machine has 0"),
    ],
    ids=["empty", "head only", "no gpu"],
)
def test_what_can_never_fit_says_what_it_waits_for(nodes, reason):
    assert capacity(*nodes).never_fits(ONE_GPU) == reason


def test_what_only_has_to_wait_is_not_hopeless():
    busy = capacity(Node("a", "a", 1, 1))
    fill(busy, ONE_GPU)
    assert busy.place(ONE_GPU) is None
    assert busy.never_fits(ONE_GPU) is None


@pytest.mark.parametrize(
    ("code", "facts", "end"),
    [
        (0, {}, "ended"),
        (75, {}, "lost"),
        (76, {}, "out_of_memory"),
        (70, {}, "crashed"),
        (1, {}, "crashed"),
        (-signal.SIGKILL, {}, "crashed"),
        (-signal.SIGKILL, {"memory_kills": 1}, "out_of_memory"),
        (-signal.SIGKILL, {"peak_memory": 900 * MB}, "out_of_memory"),
        (-signal.SIGSEGV, {"memory_kills": 1}, "crashed"),
        (-signal.SIGABRT, {"tail": "terminate called after throwing 'std::bad_alloc'"}, "out_of_memory"),
    ],
    ids=str,
)
def test_an_exit_status_is_read_with_what_happened_beside_it(code, facts, end):
    usual = {"peak_memory": 100 * MB, "memory": 1000 * MB, "memory_kills": 0, "tail": ""}
    found = classify(code, **{**usual, **facts})
    assert found.end == end
    assert exit_from_dict(found.to_dict()) == found


def test_an_unknown_signal_still_has_a_name():
    found = classify(-64, peak_memory=0, memory=1, memory_kills=0, tail="")
    assert found.reason in ("the child died of SIGRTMAX", "the child died of signal 64")


def test_log_lines_arrive_whole_however_they_were_cut():
    relay = LogRelay()
    text = "first\nsecond ünïcode line\nand no end".encode()
    for start in range(0, len(text), 3):
        relay.feed(text[start : start + 3])
    relay.finish()
    assert "".join(relay.remainder()) == "first\nsecond ünïcode line\nand no end\n"


@pytest.mark.parametrize(
    ("raw", "stored"),
    [(b"10%\r50%\r100%\n", "100%\n"), (b"a\0b\n", "a\ufffdb\n"), (b"\xff\n", "\ufffd\n"), (b"\r\n", "\n")],
    ids=["progress bar", "nul", "not utf-8", "empty"],
)
def test_log_text_can_be_stored_in_any_database(raw, stored):
    relay = LogRelay()
    relay.feed(raw)
    assert "".join(relay.remainder()) == stored


def test_a_log_is_bounded_and_keeps_its_end(monkeypatch):
    monkeypatch.setattr(log_relay, "TOTAL_CHARACTERS", 1000)
    relay = LogRelay()
    for number in range(500):
        relay.feed(f"line {number}\n".encode())
    relay.feed(b"x" * 50_000 + b"\nlast words\n")
    stored = "".join(relay.remainder())
    assert len(stored) < 1500
    assert "the rest is not kept" in stored
    assert relay.tail().endswith("last words")


def test_a_log_is_handed_on_at_a_bounded_rate():
    relay = LogRelay()
    relay.feed(b"a\n")
    assert relay.due(10.0) == "a\n"
    relay.feed(b"b\n")
    assert relay.due(10.1) == ""
    assert relay.due(10.6) == "b\n"


def test_an_order_survives_its_way_to_the_child():
    claim = Claim(3, 2, 1, "me", {"text": "naïve\n"}, {"parameters": {"window_size": 7}}, 60.0, 0)
    order = Order(claim, "sqlite:///x.db", "cpu", memory_limit=7)
    assert order_from_dict(order.to_dict()) == order
    assert order.to_line().count(b"\n") == 1


@pytest.mark.parametrize("name", ["", "json", "json:", ":loads", "json:no_such_function"])
def test_a_job_that_is_none_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"job .*"):
        resolve(name)


def test_the_memory_of_this_machine_is_known():
    assert 0 < processes.memory_available() <= processes.memory_total()
    assert processes.out_of_memory_kills() >= 0
    assert processes.peak_memory(1 << 22) == 0


def test_a_control_group_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "memory.max").write_text(f"{100 * MB}\n")
    (tmp_path / "memory.current").write_text(f"{90 * MB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {20 * MB}\n")
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    monkeypatch.setattr(processes, "_memory_groups", lambda: iter([tmp_path]))
    machine = processes._counter(Path("/proc/vmstat"))
    assert processes.memory_total() == 100 * MB
    assert processes.memory_available() == 30 * MB
    assert processes.out_of_memory_kills() - machine == 2


def test_sqlite_is_refused_for_a_cluster_of_several_machines(sqlite_store: Store):
    ray_cluster.refuse_shared_sqlite(sqlite_store, ["here", "here"], "here")
    with pytest.raises(ray_cluster.ClusterRefused, match=r"there.*ATTNLAB_DATABASE_URL.*PostgreSQL"):
        ray_cluster.refuse_shared_sqlite(sqlite_store, ["here", "there"], "here")


def test_a_child_without_an_order_says_that_it_was_ready_and_ends():
    command = [sys.executable, "-m", "attnlab_workers.child", "--job", "json:loads"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
