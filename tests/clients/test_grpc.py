"""The public gRPC service, health and reflection, from Debian's python3-grpcio."""
import os
import subprocess
import sys
import tempfile

import grpc
import pytest

from cluster import ROOT, Cluster, free_port

OUT = tempfile.mkdtemp(prefix="turbomesh-proto.")
subprocess.run(["protoc", f"--python_out={OUT}", f"-I{ROOT}/proto", f"{ROOT}/proto/turbomesh.proto",
                f"{ROOT}/proto/health.proto"], check=True)
sys.path.insert(0, OUT)
import health_pb2  # noqa: E402
import turbomesh_pb2 as pb  # noqa: E402


@pytest.fixture(scope="module")
def channel():
    port = free_port()
    with Cluster(tp=1, groups=("a",), etcd=False, router_args=["--grpc-port", str(port)]):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as ch:
            grpc.channel_ready_future(ch).result(20)
            yield ch


def stream(channel, method, request, reply):
    return channel.unary_stream(f"/turbomesh.v1.TurboMesh/{method}", request_serializer=lambda m: m.SerializeToString(),
                                response_deserializer=reply.FromString)(request, timeout=60)


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
