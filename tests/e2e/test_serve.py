"""turbomesh serve: one command that serves a model, and that leaves nothing behind however it ends."""
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request

import pytest

from cluster import BIN, MODEL, SLOW, free_port, processes, wait_until


class Serve:
    def __init__(self, *args, model=MODEL):
        self.port = free_port()
        self.log = tempfile.TemporaryFile("a+")  # append: reading moves the offset that the children share
        self.name = f"serve-{self.port}"
        self.p = subprocess.Popen([os.path.join(BIN, "turbomesh"), "serve", str(model), "--port", str(self.port),
                                   "--served-model-name", self.name, *map(str, args)],
                                  stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def ask(self):
        body = json.dumps({"model": self.name, "temperature": 0,
                           "messages": [{"role": "user", "content": "What is the capital of France?"}]}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(
                    f"http://127.0.0.1:{self.port}/v1/chat/completions", body,
                    {"content-type": "application/json"}), timeout=30 * SLOW) as r:
                return json.load(r)["choices"][0]["message"]["content"]
        except (OSError, urllib.error.HTTPError):
            return None

    def children(self):
        return [(pid, cmd) for pid, cmd in processes([self.name]) if pid != self.p.pid]

    def __enter__(self):
        wait_until("an answer", lambda: self.p.poll() is not None or self.ask(), 60)
        assert self.p.poll() is None, self.text()
        return self

    def __exit__(self, kind, value, tb):
        if kind:
            print(self.text())
        self.p.kill()
        self.p.wait()
        for pid, _ in self.children():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("tp", [1, 2])
def test_serves_and_ends(tp):
    with Serve("--tp", tp) as s:
        assert "Paris" in s.ask()


def test_serves_a_workspace(tmp_path):
    """Of four parts, on two ranks."""
    subprocess.run([os.path.join(BIN, "turbomesh"), "convert", MODEL, "--dst-path", str(tmp_path / "w"), "--tp", "4"], check=True, timeout=60)
    with Serve("--tp", 2, model=tmp_path / "w") as s:
        assert "Paris" in s.ask()
        banner = wait_until("the banner", lambda: "try       curl" in s.text() and s.text(), 10)
        assert s.name in banner and f"http://127.0.0.1:{s.port}" in banner
        assert float(re.search(r"memory\s+([0-9.]+) MiB weights", banner)[1]) > 10
        assert int(re.search(r"KV cache\s+(\d+) blocks", banner)[1]) > 0
        s.p.send_signal(signal.SIGTERM)
        assert s.p.wait(40 * SLOW) == 0
        wait_until("no child is left", lambda: not s.children(), 10)


@pytest.mark.parametrize("tp", [1, 2])
def test_killed_serve_leaves_no_orphan(tp):
    with Serve("--tp", tp) as s:
        assert s.children()
        s.p.kill()
        wait_until("no child is left", lambda: not s.children(), 40)


def test_a_dead_group_is_started_again():
    with Serve() as s:
        os.kill(next(pid for pid, cmd in s.children() if "turbomesh-worker" in cmd), signal.SIGKILL)
        wait_until("an answer of the new group", s.ask, 40)


def test_refuses_to_listen_openly_without_keys():
    p = subprocess.run([os.path.join(BIN, "turbomesh"), "serve", MODEL, "--host", "0.0.0.0", "--port", str(free_port())],
                       capture_output=True, text=True, timeout=60 * SLOW)
    assert p.returncode != 0 and "key" in p.stderr, p.stderr


def copy_of_the_demo(folder, config=None, **tokenizer_config):
    for f in os.listdir(MODEL):
        if os.path.isfile(os.path.join(MODEL, f)):
            shutil.copy(os.path.join(MODEL, f), folder)
    for name, change in (("config.json", config or {}), ("tokenizer_config.json", tokenizer_config)):
        d = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**d, **change}))


def test_text_files_that_cannot_serve_are_refused(tmp_path):
    def refused(*args):
        p = subprocess.run([os.path.join(BIN, "turbomesh"), "serve", str(tmp_path), "--port", str(free_port()), *args],
                           capture_output=True, text=True, timeout=60 * SLOW)
        assert p.returncode == 78 and len(p.stderr.splitlines()) == 1, p.stderr
        return p.stderr
    copy_of_the_demo(tmp_path, chat_template="{% if %}")
    assert "tokenizer_config.json: line 1: expected an expression" in refused()
    assert "'chatmlx' is neither a file, nor template text" in refused("--chat-template", "chatmlx")
    os.remove(tmp_path / "tokenizer.json")
    assert "the model has no tokenizer file" in refused()


def test_context_of_a_scaled_rope_is_offered(tmp_path):
    copy_of_the_demo(tmp_path, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}})
    with Serve(model=tmp_path) as s:
        with urllib.request.urlopen(f"http://127.0.0.1:{s.port}/v1/models", timeout=30 * SLOW) as r:
            assert json.load(r)["data"][0]["max_model_len"] == 8192
