"""A whole cluster on loopback for the end-to-end and fault tests: etcd, mpirun groups, the router. Everything a
Cluster starts ends with it, and close() fails the test when a process survives."""
import contextlib
import glob
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.environ.get("TM_BIN", os.path.join(ROOT, "build", "bin"))
MODEL = os.path.join(ROOT, "models", "demo-20m")
STATE_READY = 3  # of the metric turbomesh_group_state
SLOW = float(os.environ.get("TM_TIME_SCALE", "1"))  # sanitizer builds stretch every deadline


def free_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(what, check, timeout=60.0, every=0.05):
    """Polls until check() is true; the deadline only bounds a broken run."""
    end = time.monotonic() + timeout * SLOW
    while time.monotonic() < end:
        value = check()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"{what}: not within {timeout * SLOW:.0f} s")


class Proc:
    def __init__(self, name, argv, log_dir, env=None):
        self.name = name
        self.log_path = os.path.join(log_dir, f"{name}.log")
        self.log = open(self.log_path, "ab")
        self.p = subprocess.Popen(argv, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
                                  env={**os.environ, **(env or {})}, start_new_session=True)
        self.pid = self.p.pid

    def alive(self):
        return self.p.poll() is None

    def stop(self, sig=signal.SIGTERM, timeout=20.0):
        if self.alive():
            self.p.send_signal(sig)
        try:
            self.p.wait(timeout * SLOW)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.p.wait()
        self.log.close()
        return self.p.returncode

    def tail(self, n=40):
        with open(self.log_path, errors="replace") as f:
            return f"--- {self.name}\n" + "".join(f.readlines()[-n:])


def processes(match):
    """(pid, command line) of processes whose command line contains every word of match."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            with open(path, "rb") as f:
                cmd = f.read().replace(b"\0", b" ").decode(errors="replace")
            if all(w in cmd for w in match):
                found.append((int(path.split("/")[2]), cmd))
    return found


class Cluster:
    def __init__(self, tp=2, groups=("a", "b"), etcd=True, router_args=(), worker_args=(), model=MODEL,
                 folder=None, start_timeout=90):
        # close() kills what has the tag in its command line, so the tag is never a name that a caller chose.
        self.dir = tempfile.mkdtemp(prefix="turbomesh-test.", dir=folder)
        self.keep = folder is not None  # logs in a folder that was given stay
        self.tag = os.path.basename(self.dir)
        self.model, self.tp, self.worker_args, self.router_args = model, tp, list(worker_args), list(router_args)
        self.etcd = self.router = None
        self.groups = {}
        self.static = {}
        try:
            if etcd:
                self.etcd_port, self.etcd_peer = free_port(), free_port()
                self.etcd_url = f"http://127.0.0.1:{self.etcd_port}"
                self.start_etcd()
            for g in groups:
                self.start_group(g)
            self.port = free_port()
            self.start_router()
            self.wait_groups(len(groups), start_timeout)
        except BaseException:
            print(self.logs())
            self.close(check=False)
            raise

    # -- parts
    def start_etcd(self):
        peer = f"http://127.0.0.1:{self.etcd_peer}"
        self.etcd = Proc("etcd", ["etcd", "--name", "t", "--data-dir", os.path.join(self.dir, "etcd"),
                                  "--listen-client-urls", self.etcd_url, "--advertise-client-urls", self.etcd_url,
                                  "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                                  "--initial-cluster", f"t={peer}", "--logger", "zap", "--log-level", "warn"], self.dir)
        wait_until("etcd", lambda: self.get_json("/health", self.etcd_port))

    def group_args(self, name):
        """Options of one group beside those of all."""
        return []

    def start_group(self, name):
        group = f"{self.tag}-{name}"
        argv = [os.path.join(BIN, "turbomesh-worker"), self.model, "--tp", str(self.tp), "--group", group]
        if self.etcd:
            argv += ["--etcd", self.etcd_url]
        else:
            self.static[name] = free_port()
            argv += ["--port", str(self.static[name])]
        argv += self.worker_args + self.group_args(name)
        if self.tp > 1:
            argv = ["mpirun", "-n", str(self.tp), "--oversubscribe", "--bind-to", "none", *argv]
        self.groups[name] = Proc(f"group-{name}", argv, self.dir,
                                 {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})

    def start_router(self):
        argv = [os.path.join(BIN, "turbomesh-router"), "--port", str(self.port)]
        if self.etcd:
            argv += ["--etcd", self.etcd_url]
        else:
            argv += ["--workers", ",".join(f"127.0.0.1:{p}" for p in self.static.values())]
        self.router = Proc("router", argv + self.router_args, self.dir)
        wait_until("router", lambda: self.router.alive() and self.get_json("/health", any_status=True) is not None)

    def ranks(self, name):
        """Process ids of a group's ranks."""
        return [p for p, cmd in processes(["turbomesh-worker", f"{self.tag}-{name}"]) if "mpirun" not in cmd.split()[0]]

    def metric(self, name):
        """{labels as written: value} of one metric of the router; empty while it does not answer."""
        text = self.get_text("/metrics")
        rows = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.M)
        return {labels: float(value) for labels, value in rows}

    def group_metric(self, name):
        return {labels.split('"')[1]: v for labels, v in self.metric(name).items()}

    def ready_groups(self):
        return [g for g, state in self.group_metric("turbomesh_group_state").items() if state == STATE_READY]

    def serving_group(self):
        """The short name of a group that has a generation of the router, or None."""
        busy = [g for g, n in self.group_metric("turbomesh_group_in_flight").items() if n > 0]
        return busy[0].removeprefix(f"{self.tag}-") if busy else None

    def wait_groups(self, n, timeout=90):
        wait_until(f"{n} ready groups", lambda: len(self.ready_groups()) == n, timeout)

    # -- requests
    def connect(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout * SLOW)

    def get_text(self, path, port=None, any_status=False):
        """The body, or an empty string when there is no answer or it is not 200."""
        try:
            c = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=5)
            c.request("GET", path)
            r = c.getresponse()
            body = r.read().decode()
            return body if any_status or r.status == 200 else ""
        except (OSError, http.client.HTTPException):
            return ""

    def get_json(self, path, port=None, any_status=False):
        try:
            return json.loads(self.get_text(path, port, any_status))
        except ValueError:
            return None

    def post(self, path, body, headers=None):
        c = self.connect()
        c.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body),
                  {"content-type": "application/json", **(headers or {})})
        r = c.getresponse()
        return r.status, dict((k.lower(), v) for k, v in r.getheaders()), json.loads(r.read())

    def stream(self, path, body):
        """Yields the parsed events of an SSE answer; the last is the string [DONE]."""
        c = self.connect()
        c.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
        r = c.getresponse()
        if r.status != 200:
            raise AssertionError(f"HTTP {r.status}: {r.read().decode()}")
        for raw in r:
            line = raw.decode().rstrip("\r\n")
            if line.startswith("data: "):
                yield "[DONE]" if line[6:] == "[DONE]" else json.loads(line[6:])

    def chat(self, text, **kw):
        return self.post("/v1/chat/completions", {"model": "demo-20m", "temperature": 0, **kw,
                                                  "messages": [{"role": "user", "content": text}]})

    # -- end
    def logs(self):
        return "\n".join(p.tail() for p in [self.etcd, self.router, *self.groups.values()] if p)

    def close(self, check=True):
        codes = {}
        for p in [self.router, *self.groups.values(), self.etcd]:
            if p:
                codes[p.name] = p.stop()
        left = processes([self.tag])
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not self.keep:
            shutil.rmtree(self.dir, ignore_errors=True)
        if check:
            assert not left, f"processes left behind: {left}"
        return codes

    def __enter__(self):
        return self

    def __exit__(self, kind, value, tb):
        if kind:
            print(self.logs())
        self.close(check=kind is None)
