"""The public gRPC service, health and reflection, from Debian's python3-grpcio."""
import hashlib
import os
import subprocess
import sys
import tempfile
import time

import grpc
import pytest

from cluster import ROOT, Cluster, free_port, wait_until

OUT = tempfile.mkdtemp(prefix="turbomesh-proto.")
KEY = "grpc-test-key"
KEYS = os.path.join(OUT, "keys")
with open(KEYS, "w") as keys:
    keys.write(f"tester:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
subprocess.run(["protoc", f"--python_out={OUT}", f"-I{ROOT}/proto", f"{ROOT}/proto/turbomesh.proto",
                f"{ROOT}/proto/health.proto"], check=True)
sys.path.insert(0, OUT)
import health_pb2  # noqa: E402
import turbomesh_pb2 as pb  # noqa: E402


LONG = pb.SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster():
    port = free_port()
    with Cluster(tp=1, groups=("a",), etcd=False, router_args=["--grpc-port", str(port)]) as c:
        c.grpc = f"127.0.0.1:{port}"
        yield c


@pytest.fixture(scope="module")
def channel(cluster):
    with grpc.insecure_channel(cluster.grpc) as ch:
        grpc.channel_ready_future(ch).result(20)
        yield ch


def stream(channel, method, request, reply, timeout=60, metadata=None):
    return channel.unary_stream(f"/turbomesh.v1.TurboMesh/{method}", request_serializer=lambda m: m.SerializeToString(),
                                response_deserializer=reply.FromString)(request, timeout=timeout, metadata=metadata)


def in_flight(cluster):
    return (cluster.get_json("/health", any_status=True) or {}).get("active", -1)


def test_chat_streams(channel):
    chunks = list(stream(channel, "Chat", pb.ChatRequest(
        message=[pb.ChatMessage(role="user", content="What is the capital of France?")],
        sampling=pb.SamplingParams(temperature=0, max_tokens=40)), pb.GenerateChunk))
    assert "".join(c.text for c in chunks) == "The capital of France is Paris."
    assert chunks[-1].finish_reason == "stop" and chunks[-1].usage.prompt_tokens == 15


def test_generate_tokens(channel):
    chunks = list(stream(channel, "Generate", pb.GenerateRequest(
        tokens=pb.TokenList(id=[1, 320, 201]), sampling=pb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)),
        pb.GenerateChunk))
    assert sum(len(c.token_id) for c in chunks) == 8
    assert chunks[-1].finish_reason == "length"


def test_bad_request_has_a_status(channel):
    with pytest.raises(grpc.RpcError) as e:
        list(stream(channel, "Generate", pb.GenerateRequest(model="no-such-model", text="x"), pb.GenerateChunk))
    assert e.value.code() == grpc.StatusCode.NOT_FOUND


def test_health(channel):
    check = channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=lambda m: m.SerializeToString(),
                                response_deserializer=health_pb2.HealthCheckResponse.FromString)
    assert check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as e:
        check(health_pb2.HealthCheckRequest(service="nothing"), timeout=10)
    assert e.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services(channel, version):
    # ServerReflectionRequest{list_services: "*"} is field 7; the answer names the services in plain bytes.
    call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                                 request_serializer=bytes, response_deserializer=bytes)
    reply = next(iter(call(iter([b"\x3a\x01*"]), timeout=10)))
    assert b"turbomesh.v1.TurboMesh" in reply and b"grpc.health.v1.Health" in reply


def test_equals_the_http_answer(cluster, channel):
    status, _, body = cluster.post("/v1/completions", {"model": "demo-20m", "prompt": "Once upon a time", "max_tokens": 60,
                                                       "temperature": 0, "ignore_eos": True, "return_token_ids": True})
    assert status == 200
    chunks = list(stream(channel, "Generate", pb.GenerateRequest(text="Once upon a time", request_id="same-1", sampling=pb.SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)), pb.GenerateChunk))
    assert "".join(c.text for c in chunks) == body["choices"][0]["text"]
    assert [i for c in chunks for i in c.token_id] == body["choices"][0]["token_ids"]
    assert chunks[0].request_id == "same-1"
    tops = [t for c in chunks for t in c.top_logprobs]
    assert len(tops) == 60 and all(len(t.token_id) == 2 for t in tops)
    # Greedy: the token is the best one.
    assert [t.token_id[0] for t in tops] == body["choices"][0]["token_ids"]


def test_stop_string_ends_the_generation(channel):
    chunks = list(stream(channel, "Chat", pb.ChatRequest(
        message=[pb.ChatMessage(role="user", content="What is the capital of France?")],
        sampling=pb.SamplingParams(temperature=0, max_tokens=40, stop=["France"])), pb.GenerateChunk))
    assert "".join(c.text for c in chunks) == "The capital of "
    assert chunks[-1].finish_reason == "stop"


def test_cancel_reaches_the_engine(cluster, channel):
    call = stream(channel, "Generate", pb.GenerateRequest(text="x", sampling=LONG), pb.GenerateChunk)
    assert next(iter(call)).token_id
    assert in_flight(cluster) == 1
    call.cancel()
    wait_until("nothing in flight", lambda: in_flight(cluster) == 0, 5)


def test_deadline(cluster, channel):
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as e:
        list(stream(channel, "Generate", pb.GenerateRequest(text="x", sampling=LONG), pb.GenerateChunk, timeout=0.2))
    assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - start < 5
    wait_until("nothing in flight", lambda: in_flight(cluster) == 0, 5)


@pytest.mark.parametrize("request_, part", [
    (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=3)), "temperature"),
    (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_p=float("nan"))), "top_p"),
    (pb.GenerateRequest(text="word " * 5000), "2048"),
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(tokens=pb.TokenList(id=[-1])), "vocabulary"),
])
def test_bad_values_are_named(channel, request_, part):
    with pytest.raises(grpc.RpcError) as e:
        list(stream(channel, "Generate", request_, pb.GenerateChunk))
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT and part in e.value.details()


def test_list_models(channel):
    call = channel.unary_unary("/turbomesh.v1.TurboMesh/ListModels", request_serializer=lambda m: m.SerializeToString(),
                               response_deserializer=pb.ListModelsReply.FromString)
    models = call(pb.ListModelsRequest(), timeout=10).model
    assert [(m.id, m.max_context, m.groups) for m in models] == [("demo-20m", 2048, 1)]


def test_unknown_method(channel):
    with pytest.raises(grpc.RpcError) as e:
        list(stream(channel, "Nothing", pb.GenerateRequest(), pb.GenerateChunk))
    assert e.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_keys_and_limits():
    port = free_port()
    args = ["--grpc-port", str(port), "--api-key-file", KEYS, "--key-requests-per-minute", "2"]
    bearer = [("authorization", f"Bearer {KEY}")]
    short = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=1))

    def code(metadata):
        try:
            list(stream(ch, "Generate", short, pb.GenerateChunk, metadata=metadata))
        except grpc.RpcError as e:
            return e.code(), e.details()
        return grpc.StatusCode.OK, ""

    # The harness asks /metrics, which needs the key too: the probes are enough here.
    with Cluster(tp=1, groups=(), etcd=False, router_args=args) as c:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as ch:
            grpc.channel_ready_future(ch).result(20)
            assert code(None)[0] == grpc.StatusCode.UNAUTHENTICATED
            assert code([("authorization", "Bearer wrong")])[0] == grpc.StatusCode.UNAUTHENTICATED
            for _ in range(2):
                assert code(bearer)[0] == grpc.StatusCode.UNAVAILABLE  # no group at all
            last = code(bearer)
            assert last[0] == grpc.StatusCode.RESOURCE_EXHAUSTED and "retry after" in last[1]
        assert c.get_json("/health", any_status=True)["status"] == "loading"
