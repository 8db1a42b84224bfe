"""A chat request through the whole cluster: goldens over HTTP, streaming, the OpenAI shapes, idle cost."""
import json
import os
import time

import pytest

from cluster import MODEL, Cluster, SLOW


def golden_cases():
    with open(os.path.join(MODEL, "eval", "golden.json")) as f:
        return json.load(f)["cases"]


@pytest.fixture(scope="module", params=[1, 2, 4])
def cluster(request):
    tp = request.param
    with Cluster(tp=tp, groups=("a", "b") if tp == 2 else ("a",), etcd=tp == 2) as c:
        yield c


def compare_greedy(ids, case):
    """Equal, except after a step where the reference itself was undecided (top-2 margin < 0.02)."""
    for i, step in enumerate(case["steps"]):
        if i >= len(ids) or ids[i] != step["id"]:
            margins = [s["top5"][0][1] - s["top5"][1][1] for s in case["steps"][: i + 1]]
            assert min(margins) < 0.02, f"step {i}: got {ids[i:i + 1]}, expected {step['id']}, margins {margins}"
            return
    assert len(ids) == len(case["steps"])


@pytest.mark.parametrize("n", range(10))
def test_golden_over_http(cluster, n):
    case = golden_cases()[n]
    st, _, r = cluster.post("/v1/completions", {"model": "demo-20m", "prompt": case["prompt_ids"], "temperature": 0,
                                                "max_tokens": len(case["steps"]), "return_token_ids": True})
    assert st == 200, r
    compare_greedy(r["choices"][0]["token_ids"], case)


def test_chat_streams_the_same_text(cluster):
    st, _, r = cluster.chat("What is the capital of France?")
    assert st == 200
    assert r["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert r["choices"][0]["finish_reason"] == "stop"
    events = list(cluster.stream("/v1/chat/completions", {
        "model": "demo-20m", "temperature": 0, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "What is the capital of France?"}]}))
    assert events[-1] == "[DONE]"
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1] if e["choices"])
    assert text == "The capital of France is Paris."
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"] == [] and events[-2]["usage"]["prompt_tokens"] == 15
    assert events[-2]["usage"]["completion_tokens"] == r["usage"]["completion_tokens"]


def test_seed_repeats_and_choices_differ(cluster):
    body = {"model": "demo-20m", "prompt": "The old man", "max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 3}
    a = cluster.post("/v1/completions", body)[2]
    b = cluster.post("/v1/completions", body)[2]
    texts = [c["text"] for c in sorted(a["choices"], key=lambda c: c["index"])]
    assert texts == [c["text"] for c in sorted(b["choices"], key=lambda c: c["index"])]
    assert len(set(texts)) == 3


def test_idle_group_sleeps(cluster):
    """Idle ranks use less than 2 % of a core (clock ticks of the processes over five seconds)."""
    pids = [p for g in cluster.groups for p in cluster.ranks(g)]
    assert len(pids) == cluster.tp * len(cluster.groups)

    def ticks():
        total = 0
        for p in pids:
            with open(f"/proc/{p}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total

    time.sleep(1.0)
    t0, a = time.monotonic(), ticks()
    time.sleep(5.0)
    share = (ticks() - a) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - t0)
    print(f"idle: {share * 100:.2f} % of a core for {len(pids)} ranks")
    assert share / len(cluster.groups) < 0.02 * SLOW
