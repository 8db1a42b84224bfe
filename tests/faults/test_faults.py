"""Faults of a running cluster: nothing crashes, nothing is lost."""
import json
import os
import random
import signal
import socket
import threading
import time

import pytest

from cluster import Cluster, wait_until

PROMPT = "It was a dark and stormy night, and the captain"


def greedy(c, **kw):
    return {"model": "demo-20m", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **kw}


def stream_tokens(c, body, on_token=None):
    ids, text = [], ""
    for e in c.stream("/v1/completions", body):
        if e == "[DONE]":
            return ids, text
        assert "error" not in e, e
        for ch in e["choices"]:
            text += ch["text"]
            ids += ch.get("token_ids") or []
            if on_token:
                on_token(len(ids))
    raise AssertionError("the stream ended without [DONE]")


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_a_rank_mid_stream(rank):
    with Cluster() as c:
        body = greedy(c, max_tokens=1000)  # long enough that the kill comes before the end on a busy machine
        want, text = stream_tokens(c, body)
        assert len(want) == 1000
        killed = []

        def kill_once(n):
            if n >= 20 and not killed:
                name = c.serving_group()
                assert name, "no group reports the stream"
                pids = sorted(c.ranks(name))
                os.kill(pids[rank], signal.SIGKILL)
                killed.append(name)

        got, got_text = stream_tokens(c, body, kill_once)
        assert killed, "the stream ended before the kill"
        assert got == want and got_text == text
        wait_until("the whole group is gone", lambda: not c.ranks(killed[0]), 10)
        wait_until("the router sees one group", lambda: len(c.ready_groups()) == 1, 10)


def test_all_groups_killed_then_one_back():
    with Cluster(groups=("a",), router_args=["--queue-wait", "1s"]) as c:
        assert c.chat("What is the capital of France?")[0] == 200
        for p in c.ranks("a"):
            os.kill(p, signal.SIGKILL)
        wait_until("no group", lambda: not c.ready_groups(), 20)
        st, headers, r = c.chat("What is the capital of France?")
        assert st == 503 and "retry-after" in headers and r["error"]["message"]
        c.groups["a"].stop()
        c.start_group("b")
        c.wait_groups(1)
        st, _, r = c.chat("What is the capital of France?")
        assert st == 200 and "Paris" in r["choices"][0]["message"]["content"]


def test_etcd_stopped_and_back():
    with Cluster(groups=("a",)) as c:
        os.kill(c.etcd.pid, signal.SIGSTOP)
        end = time.monotonic() + float(os.environ.get("TM_ETCD_OUTAGE_S", "15"))
        n = 0
        while time.monotonic() < end:
            assert c.chat("What is the capital of France?")[0] == 200
            n += 1
            time.sleep(0.5)
        assert n > 5
        os.kill(c.etcd.pid, signal.SIGCONT)
        c.wait_groups(1)
        c.start_group("b")
        c.wait_groups(2)


def test_etcd_emptied():
    with Cluster(groups=("a",)) as c:
        c.etcd.stop(signal.SIGKILL)
        os.system(f"rm -rf {c.dir}/etcd")
        assert c.chat("What is the capital of France?")[0] == 200
        c.start_etcd()
        for _ in range(20):
            assert c.chat("What is the capital of France?")[0] == 200
            time.sleep(0.3)
        c.start_group("b")  # the watch works again
        c.wait_groups(2)


def test_client_gone_frees_the_engine():
    with Cluster(tp=1, groups=("a",), etcd=False) as c:
        rng = random.Random(int(os.environ.get("TM_SEED", "1")))
        for _ in range(30):
            s = socket.create_connection(("127.0.0.1", c.port))
            body = json.dumps(greedy(c, stream=True, max_tokens=1500)).encode()
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\ncontent-length: "
                      + str(len(body)).encode() + b"\r\n\r\n" + body)
            s.settimeout(10)
            s.recv(rng.randrange(1, 4096))
            s.close()
        wait_until("no sequence in flight", lambda: c.serving_group() is None, 10)


@pytest.mark.parametrize("who", ["router", "group"])
def test_sigterm_under_load_breaks_no_stream(who):
    drain = ["--drain-timeout", "200s"]  # a busy machine may need more than the default
    with Cluster(tp=1, groups=("a", "b"), router_args=drain, worker_args=drain) as c:
        results = []

        def one(i):
            try:
                results.append(stream_tokens(c, greedy(c, max_tokens=150, prompt=f"{i} {PROMPT}"))[0])
            except Exception as e:  # collected: a thread's exception would be lost
                results.append(e)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
        for t in threads:
            t.start()
        wait_until("streams run", lambda: c.serving_group(), 10)
        time.sleep(0.2)
        victim = c.router if who == "router" else c.groups["a"]
        victim.p.send_signal(signal.SIGTERM)
        for t in threads:
            t.join()
        bad = [r for r in results if isinstance(r, Exception) or len(r) != 150]
        assert len(results) == 20 and not bad, bad
        assert victim.p.wait(240) == 0
