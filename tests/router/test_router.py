"""The router program under faults, with fake workers: many streams, fast, and the same tokens wherever they run."""
import concurrent.futures
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import grpc
import pytest

from cluster import BIN, MODEL, ROOT, SLOW, Cluster, Proc, free_port, wait_until

OUT = tempfile.mkdtemp(prefix="turbomesh-proto.")
subprocess.run(["protoc", f"--python_out={OUT}", f"-I{ROOT}/proto", f"{ROOT}/proto/turbomesh.proto"], check=True)
sys.path.insert(0, OUT)
import turbomesh_pb2 as pb  # noqa: E402


class Fakes(Cluster):
    """Groups are fake workers with a static list of members; ports stay over a restart."""

    def __init__(self, groups=("a", "b"), step="2ms", worker_args=(), router_args=(), etcd=False, router_wrap=()):
        self.step = step
        self.router_wrap = list(router_wrap)
        self.ports = {}
        super().__init__(tp=1, groups=groups, etcd=etcd, worker_args=worker_args, router_args=router_args)

    def start_group(self, name):
        port = self.ports.setdefault(name, free_port())
        self.static[name] = port
        argv = [os.path.join(BIN, "tm-fake-worker"), MODEL, "--group", f"{self.tag}-{name}", "--port", str(port),
                "--step-delay", self.step, *self.worker_args]
        if self.etcd:
            argv += ["--etcd", self.etcd_url]
        self.groups[name] = Proc(f"group-{name}", argv, self.dir)

    def start_router(self):
        members = ["--etcd", self.etcd_url] if self.etcd else ["--workers", ",".join(f"127.0.0.1:{p}" for p in self.static.values())]
        self.router = Proc("router", [*self.router_wrap, os.path.join(BIN, "turbomesh-router"), "--port", str(self.port), *members, *self.router_args], self.dir)
        wait_until("router", lambda: self.router.alive() and self.health() is not None)

    def health(self):
        return self.get_json("/health", any_status=True)

    def busy(self, name):
        rows = {g["name"]: g["in_flight"] for g in self.health()["groups"]}
        return rows.get(f"{self.tag}-{name}", 0)

    def completion(self, prompt, tokens, **kw):
        return self.post("/v1/completions", {"model": "demo-20m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **kw})

    def tokens(self, prompt, n, on_token=None, **kw):
        """The token ids of a stream that must end well, in order."""
        ids, usage, finish = [], None, None
        for e in self.stream("/v1/completions", {"model": "demo-20m", "prompt": prompt, "max_tokens": n, "ignore_eos": True,
                                                 "return_token_ids": True, "stream_options": {"include_usage": True}, **kw}):
            if e == "[DONE]":
                assert finish == "length" and usage["completion_tokens"] == len(ids) == n
                return ids
            assert "error" not in e, e
            usage = e.get("usage") or usage
            for ch in e["choices"]:
                ids += ch.get("token_ids") or []
                finish = ch["finish_reason"] or finish
                if on_token:
                    on_token(len(ids))
        raise AssertionError("the stream ended without [DONE]")


def run_streams(c, count, tokens, then):
    """count streams at once, `then` in the middle; each must equal what the same prompt gives undisturbed."""
    want = {i: c.tokens(f"prompt {i}", tokens) for i in range(0, count, max(1, count // 4))}
    started = threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        jobs = {i: pool.submit(c.tokens, f"prompt {i}", tokens, lambda n: n == 1 and started.release()) for i in range(count)}
        for _ in range(count):
            assert started.acquire(timeout=30 * SLOW)
        then()
        got = {i: j.result(120 * SLOW) for i, j in jobs.items()}
    for i, ids in want.items():
        assert got[i] == ids, f"stream {i}"
    return got


def check_logs(c):
    """Every line of the router is JSON; request lines say what an operator needs."""
    with open(c.router.log_path) as f:
        lines = [json.loads(line) for line in f if line.strip()]
    for r in (r for r in lines if r["event"] == "request"):
        assert {"ts", "level", "id", "key", "route", "status", "ms"} <= r.keys()
    return lines


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_streams_outlive_a_group(sig):
    with Fakes() as c:
        def fault():
            victim = max("ab", key=c.busy)
            assert c.busy(victim) > 0
            c.groups[victim].p.send_signal(sig)

        run_streams(c, 40, 600, fault)
        moved = sum(c.metric("turbomesh_migrations_total").values())
        assert sig == signal.SIGTERM or moved > 0
        assert c.health()["active"] == 0
        for g in c.groups.values():
            if sig == signal.SIGSTOP:
                g.p.send_signal(signal.SIGCONT)
        check_logs(c)


def test_all_groups_gone_then_one_back():
    with Fakes(router_args=["--queue-wait", "500ms"]) as c:
        assert c.completion("x", 3)[0] == 200
        for g in c.groups.values():
            g.stop(signal.SIGKILL)
        wait_until("no group", lambda: not c.ready_groups(), 10)
        for _ in range(3):
            status, headers, body = c.completion("x", 3)
            assert status == 503 and int(headers["retry-after"]) >= 1 and headers["x-should-retry"] == "true"
            assert body["error"]["code"] in ("no_worker", "model_loading")
        assert c.get_json("/readyz") is None and c.get_json("/livez")
        c.start_group("a")
        wait_until("service again", lambda: c.completion("x", 3)[0] == 200, 20)


def test_waiting_for_a_group_that_comes_back():
    """A request that waits in the queue while nobody is there is served once somebody is."""
    with Fakes(groups=("a",), router_args=["--queue-wait", "20s"]) as c:
        c.groups["a"].stop(signal.SIGKILL)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(c.completion, f"p{i}", 5) for i in range(4)]
            time.sleep(0.3)
            c.start_group("a")
            assert [j.result(60)[0] for j in jobs] == [200] * 4


def test_queue_bound_answers_429():
    with Fakes(groups=("a",), step="20ms", worker_args=["--max-batch-size", "2", "--queue-max", "1"],
               router_args=["--queue-max", "3"]) as c:
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            answers = [j.result(60) for j in [pool.submit(c.completion, f"p{i}", 40) for i in range(24)]]
        codes = sorted(a[0] for a in answers)
        assert set(codes) == {200, 429}, codes
        for status, headers, body in answers:
            if status == 429:
                assert 1 <= int(headers["retry-after"]) <= 30 and headers["x-should-retry"] == "true"
                assert body["error"]["code"] == "queue_full" and body["error"]["type"] == "rate_limit_error"
        assert c.metric("turbomesh_shed_total")['reason="queue_full"'] == codes.count(429)
        assert c.completion("after", 2)[0] == 200


def test_sigterm_drains_both_faces():
    port = free_port()
    with Fakes(router_args=["--grpc-port", str(port)]) as c:
        ch = grpc.insecure_channel(f"127.0.0.1:{port}")
        generate = ch.unary_stream("/turbomesh.v1.TurboMesh/Generate", request_serializer=lambda m: m.SerializeToString(),
                                   response_deserializer=pb.GenerateChunk.FromString)
        call = generate(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=600, ignore_eos=True)), timeout=60)
        assert next(call).token_id
        kept = c.connect()  # a connection that is there already
        kept.request("GET", "/readyz")
        assert kept.getresponse().read()

        def term():
            c.router.p.send_signal(signal.SIGTERM)
            wait_until("not listening", lambda: refused(c.port), 5)

        run_streams(c, 30, 600, term)
        chunks = list(call)
        assert 1 + sum(len(k.token_id) for k in chunks) >= 600 and chunks[-1].finish_reason == "length"
        ch.close()
        assert c.router.p.wait(20) == 0
        lines = check_logs(c)
        assert any(r["event"] == "drained" for r in lines)
        assert all(r["status"] == 200 for r in lines if r["event"] == "request")


def refused(port):
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex(("127.0.0.1", port)) != 0


def test_second_sigterm_ends_at_once():
    with Fakes(step="100ms") as c:
        c.tokens("x", 1)
        s = socket.create_connection(("127.0.0.1", c.port))
        body = json.dumps({"model": "demo-20m", "prompt": "x", "max_tokens": 1000, "ignore_eos": True}).encode()
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until("a stream runs", lambda: c.health()["active"] == 1, 10)
        c.router.p.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert c.router.alive()
        c.router.p.send_signal(signal.SIGTERM)
        assert c.router.p.wait(5) == 0
        s.close()


def test_clients_that_leave_at_any_moment():
    seed = int(os.environ.get("TM_SEED", random.randrange(1 << 30)))
    print(f"TM_SEED={seed}")
    rng = random.Random(seed)
    with Fakes() as c:
        for i in range(150):
            body = json.dumps({"model": "demo-20m", "prompt": "word " * rng.choice([1, 300]), "max_tokens": 1500, "stream": rng.random() < 0.7,
                               "ignore_eos": True, "n": rng.choice([1, 3])}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            data = head + body
            with socket.create_connection(("127.0.0.1", c.port)) as s:
                s.sendall(data[:rng.randrange(1, len(data))] if rng.random() < 0.3 else data)
                if rng.random() < 0.5:
                    s.settimeout(0.02)
                    try:
                        s.recv(rng.randrange(1, 8192))
                    except socket.timeout:
                        pass
        wait_until("nothing in flight", lambda: c.health()["active"] == 0 and c.busy("a") == c.busy("b") == 0, 10)
        assert c.metric("turbomesh_in_flight")[""] in (0, 1, 2, 3)  # sampled once a second
        assert c.completion("still here", 2)[0] == 200


def test_a_client_that_does_not_read_is_cut():
    """Its tokens stay bounded in memory, and its generation ends when it has taken nothing for the write timeout."""
    with Fakes(groups=("a",), step="0ms", router_args=["--write-timeout", "1s", "--stream-buffer-max", "16KiB"]) as c:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", c.port))
        body = json.dumps({"model": "demo-20m", "prompt": "x", "max_tokens": 2000, "stream": True, "ignore_eos": True, "n": 60}).encode()
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until("it runs", lambda: c.health()["active"] > 0, 10)
        wait_until("it was cut", lambda: c.health()["active"] == 0, 20)
        assert c.completion("others", 2)[0] == 200
        wait_until("the line is there", lambda: any(r["event"] == "request" and r["status"] in (200, 499) and r["tokens_out"] > 0
                                                    for r in check_logs(c)), 10)
        s.close()


CALLER = """
import sys, threading
import grpc
ch = grpc.insecure_channel(sys.argv[1])
call = ch.unary_stream("/turbomesh.v1.TurboMesh/Generate", request_serializer=bytes, response_deserializer=bytes)
request = bytes.fromhex(sys.argv[2])
def one():
    it = call(request)
    next(it)
    sys.stdout.write("started\\n")
    sys.stdout.flush()
    try:
        for _ in it:
            pass
    except grpc.RpcError:
        pass
threads = [threading.Thread(target=one) for _ in range(40)]
[t.start() for t in threads]
[t.join() for t in threads]
"""


def test_a_grpc_client_that_does_not_read_is_cut():
    """A stopped client: its calls end soon, although their generations ended long before."""
    port = free_port()
    big = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=2000, ignore_eos=True, logprobs=20))
    with Fakes(groups=("a",), step="2ms", router_args=["--grpc-port", str(port), "--write-timeout", "1s"]) as c:
        p = subprocess.Popen([sys.executable, "-c", CALLER, f"127.0.0.1:{port}", big.SerializeToString().hex()], stdout=subprocess.PIPE, text=True)
        try:
            for _ in range(40):
                assert p.stdout.readline() == "started\n"
            p.send_signal(signal.SIGSTOP)
            wait_until("the generations ended", lambda: c.health()["active"] == 0, 60)
            wait_until("the calls ended", lambda: c.metric("turbomesh_in_flight")[""] == 0, 30)
            assert c.completion("others", 2)[0] == 200
        finally:
            p.kill()
            p.wait()
            p.stdout.close()
        lines = [r for r in check_logs(c) if r["event"] == "request" and r["route"] == "grpc_generate"]
        assert len(lines) == 40
        # One that reads, however slowly, is not cut.
        with grpc.insecure_channel(f"127.0.0.1:{port}") as ch:
            generate = ch.unary_stream("/turbomesh.v1.TurboMesh/Generate", request_serializer=lambda m: m.SerializeToString(),
                                       response_deserializer=pb.GenerateChunk.FromString)
            n = 0
            for chunk in generate(big):
                n += len(chunk.token_id)
                if n % 200 == 0:
                    time.sleep(0.2)
            assert n == 2000 and chunk.finish_reason == "length"


def request_rows(c, count):
    """The log lines of completions once there are `count` of them."""
    rows = [r for r in check_logs(c) if r["event"] == "request" and r["route"] == "completions"]
    return rows if len(rows) == count else None


def test_policy_session_keeps_a_session_together():
    with Fakes(groups=("a", "b", "c"), router_args=["--policy", "session"]) as c:
        asked = 0
        for session in ("one", "two", "three", "four"):
            for i in range(4):
                assert c.completion(f"p{i}", 2, session_id=session)[0] == 200
            asked += 4
            rows = wait_until("the log lines", lambda: request_rows(c, asked), 10)  # written after the answer
            groups = {r["group"] for r in rows[-4:]}
            assert len(groups) == 1, (session, groups)


@pytest.mark.parametrize("policy", ["cost", "least-load", "round-robin"])
def test_policies_spread_the_load(policy):
    with Fakes(groups=("a", "b", "c"), router_args=["--policy", policy]) as c:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            assert all(j.result(60)[0] == 200 for j in [pool.submit(c.completion, f"p{i}", 20) for i in range(60)])
        count = {}
        for r in check_logs(c):
            if r["event"] == "request" and r["route"] == "completions":
                count[r["group"]] = count.get(r["group"], 0) + 1
        assert len(count) == 3 and min(count.values()) >= 8, count


def test_keys_are_read_again():
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as f:
        def write(key):
            f.seek(0)
            f.truncate()
            f.write(f"tester:{hashlib.sha256(key.encode()).hexdigest()}\n")
            f.flush()

        def status(key):
            return c.post("/v1/completions", {"model": "demo-20m", "prompt": "x", "max_tokens": 1}, {"authorization": f"Bearer {key}"})[0]

        write("old")
        with Fakes(groups=(), router_args=["--api-key-file", f.name]) as c:
            assert status("old") == 503 and status("new") == 401  # no group; no key
            write("new")
            c.router.p.send_signal(signal.SIGHUP)
            wait_until("the new key", lambda: status("new") == 503, 5)
            assert status("old") == 401
            f.seek(0)
            f.truncate()
            f.write("nonsense\n")
            f.flush()
            c.router.p.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert status("new") == 503  # a bad file changes nothing


def test_etcd_away_then_emptied():
    """Service goes on from the last known members; an emptied etcd is not believed while the links are well."""
    away = float(os.environ.get("TM_ETCD_AWAY_S", "8"))
    with Fakes(etcd=True) as c:
        assert c.completion("x", 2)[0] == 200
        c.etcd.stop(signal.SIGKILL)
        wait_until("it is noticed", lambda: c.health()["members_stale"], 15)
        end = time.monotonic() + away
        while time.monotonic() < end:
            assert c.completion("x", 2)[0] == 200
            time.sleep(0.1)
        # Members that die meanwhile are found by their links alone.
        c.groups["b"].stop(signal.SIGKILL)
        for _ in range(20):
            assert c.completion("x", 2)[0] == 200
        subprocess.run(["rm", "-rf", os.path.join(c.dir, "etcd")], check=True)
        c.start_etcd()
        for _ in range(30):
            assert c.completion("x", 2)[0] == 200
            time.sleep(0.1)
        wait_until("connected", lambda: not c.health()["members_stale"], 15)
        c.start_group("b")
        c.wait_groups(2)


def test_more_connections_than_the_soft_limit_of_descriptors():
    argv = ["bash", "-c", 'ulimit -Sn 64; exec "$@"', "bash"]
    with Fakes(groups=("a",), router_wrap=argv) as c:
        held = [socket.create_connection(("127.0.0.1", c.port)) for _ in range(300)]
        for s in held[::10]:
            s.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            s.settimeout(10)
            assert s.recv(100).startswith(b"HTTP/1.1 200")
        assert c.completion("x", 2)[0] == 200
        for s in held:
            s.close()


def test_bad_options():
    for args, part in [(["--workers", "x"], "x"), ([], "--etcd"), (["--workers", "a:1", "--host", "0.0.0.0"], "--api-key-file"),
                       (["--workers", "a:1", "--api-key-file", "/nonexistent"], "/nonexistent"), (["--workers", "a:1", "--polcy", "cost"], "policy"),
                       (["--workers", "a:1", "--port", "70000"], "port"), (["--workers", "a:1", "--tls-cert", "x"], "--tls-key")]:
        r = subprocess.run([os.path.join(BIN, "turbomesh-router"), *args], capture_output=True, text=True, timeout=20)
        assert r.returncode != 0 and part in r.stderr and len(r.stderr.strip().splitlines()[-1]) < 400, (args, r.stderr)
