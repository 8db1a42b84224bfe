"""Bad input over HTTP: the OpenAI error object with the right status for each, and a server that goes on serving."""
import json
import os
import socket

import pytest

from cluster import Cluster

SUITE = os.path.join(os.environ.get("TM_SHARED", ""), "testdata", "jsontestsuite", "test_parsing")
CHAT = {"model": "demo-20m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def cluster():
    with Cluster(tp=1, groups=("a",), etcd=False) as c:
        yield c
        st, _, r = c.chat("What is the capital of France?")
        assert st == 200 and r["choices"][0]["message"]["content"] == "The capital of France is Paris."


def raw(c, data, limit=1 << 20):
    """Sends bytes, gives (status, body) of the first answer; (0, b"") when the server just closed."""
    s = socket.create_connection(("127.0.0.1", c.port), timeout=20)
    try:
        s.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass
    got = b""
    try:
        while len(got) < limit:
            part = s.recv(65536)
            if not part:
                break
            got += part
            head, sep, body = got.partition(b"\r\n\r\n")
            if sep and b"content-length:" in head.lower():
                n = int([h for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")][0].split(b":")[1])
                if len(body) >= n:
                    break
    except (ConnectionResetError, socket.timeout):
        pass
    s.close()
    if not got:
        return 0, b""
    return int(got.split(b" ", 2)[1]), got.partition(b"\r\n\r\n")[2]


def post_bytes(c, body, path="/v1/chat/completions", extra=b""):
    return raw(c, b"POST " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + extra
               + b"Content-Length: " + str(len(body)).encode() + b"\r\nConnection: close\r\n\r\n" + body)


def check_error(status, body, want, param=None):
    assert status == want, (status, body[:300])
    e = json.loads(body)["error"]
    assert e["message"] and e["type"] and "param" in e and "code" in e
    if param:
        assert e["param"] and e["param"].startswith(param), e


def test_json_suite(cluster):
    if not os.path.isdir(SUITE):
        pytest.skip("the full test data is not here")
    n = 0
    for name in sorted(os.listdir(SUITE)):
        with open(os.path.join(SUITE, name), "rb") as f:
            status, body = post_bytes(cluster, f.read())
        # valid JSON is still no chat request, so every answer is a 400 with our error object
        check_error(status, body, 400)
        n += 1
    assert n > 300


VALUES = [
    ({"temperature": 2.01}, "temperature"), ({"temperature": -0.1}, "temperature"), ({"temperature": "1"}, "temperature"),
    ({"top_p": 1.01}, "top_p"), ({"top_p": []}, "top_p"), ({"n": 0}, "n"), ({"n": 129}, "n"), ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"seed": "x"}, "seed"),
    ({"presence_penalty": 2.1}, "presence_penalty"), ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"logit_bias": {"abc": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"), ({"logit_bias": {"8192": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"), ({"stop": ["a"] * 17}, "stop"), ({"stop": ["x" * 257]}, "stop"), ({"stop": 5}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logprobs": 1}, "logprobs"),
    ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, None), ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0]"), ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"), ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"), ({"model": 7}, "model"), ({"model": None}, "model"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"top_k": -2}, "top_k"), ({"min_p": 1.5}, "min_p"),
]


@pytest.mark.parametrize("change,param", VALUES, ids=lambda v: json.dumps(v)[:40] if isinstance(v, dict) else str(v))
def test_values(cluster, change, param):
    body = json.dumps({**CHAT, **change}).encode()
    if change == {"messages": "hi"}:  # LMDeploy's extension: a bare string is one user message
        assert post_bytes(cluster, body)[0] == 200
        return
    check_error(*post_bytes(cluster, body), 400, param)


@pytest.mark.parametrize("text", [b'{"temperature": NaN}', b'{"temperature": 1e400}', b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
                                  b"[" * 100000, b'"string"', b"null", b"", b'{"a": 1} x', b"\xef\xbb\xbf{}"])
def test_not_json(cluster, text):
    check_error(*post_bytes(cluster, text), 400)


def test_unknown_model(cluster):
    check_error(*post_bytes(cluster, json.dumps({**CHAT, "model": "nothing"}).encode()), 404, "model")


def test_prompt_over_the_context_says_both_numbers(cluster):
    ids = [5] * 3000
    status, body = post_bytes(cluster, json.dumps({"model": "demo-20m", "prompt": ids, "max_tokens": 5}).encode(), "/v1/completions")
    check_error(status, body, 400)
    e = json.loads(body)["error"]
    assert e["code"] == "context_length_exceeded" and "3000" in e["message"] and "2048" in e["message"]


@pytest.mark.parametrize("prompt", [[], [[]], [8192], [-1], [1.5], ["x", 5], {"a": 1}, [[1], "x"], [[[1]]], None, 5])
def test_bad_prompts(cluster, prompt):
    check_error(*post_bytes(cluster, json.dumps({"model": "demo-20m", "prompt": prompt}).encode(), "/v1/completions"), 400, "prompt")


def test_sizes(cluster):
    check_error(*post_bytes(cluster, b'{"x": "' + b"a" * (10 << 20) + b'"}'), 413)
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(10000))
    check_error(*post_bytes(cluster, b"{}", extra=many), 431)
    check_error(*raw(cluster, b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"), 414)


def test_routes_and_methods(cluster):
    check_error(*raw(cluster, b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), 404)
    check_error(*raw(cluster, b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), 405)
    check_error(*raw(cluster, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}"), 415)


AMBIGUOUS = [b"Content-Length: 2\r\nContent-Length: 3\r\n", b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"Content-Length: +2\r\n",
             b"Content-Length: -2\r\n", b"Content-Length : 2\r\n", b"Transfer-Encoding: xchunked\r\n", b"X: a\r\n folded\r\nContent-Length: 2\r\n",
             b"Content-Length: 0x2\r\n", b"X: a\0b\r\nContent-Length: 2\r\n"]


@pytest.mark.parametrize("head", AMBIGUOUS)
def test_ambiguous_framing_is_refused(cluster, head):
    status, body = raw(cluster, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + head + b"\r\n{}")
    check_error(status, body, 400)
