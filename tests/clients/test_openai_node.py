"""The openai npm client, version pinned in package.json, installed into the build folder on first use."""
import json
import os
import shutil
import subprocess

import pytest

from cluster import MODEL, ROOT, Cluster

HERE = os.path.dirname(os.path.abspath(__file__))
WORK = os.path.join(os.environ.get("TM_BUILD", os.path.join(ROOT, "build")), "node-clients")


def node_ready():
    if not shutil.which("node") or not shutil.which("npm"):
        return False
    os.makedirs(WORK, exist_ok=True)
    for f in ("package.json", "openai_client.mjs", "openai_tools.mjs"):
        shutil.copy(os.path.join(HERE, f), WORK)
    if os.path.isdir(os.path.join(WORK, "node_modules", "openai")):
        return True
    return subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=WORK).returncode == 0


@pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")
def test_openai_npm_client():
    assert node_ready(), "npm could not install the client"
    with Cluster(tp=1, groups=("a",), etcd=False) as c:
        r = subprocess.run(["node", "openai_client.mjs", f"http://127.0.0.1:{c.port}"], cwd=WORK, capture_output=True,
                           text=True, timeout=240)
        print(r.stdout, r.stderr)
        assert r.returncode == 0


TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")
def test_openai_npm_client_tools():
    assert node_ready(), "npm could not install the client"
    with open(os.path.join(MODEL, "tokenizer.json")) as f:
        close = json.load(f)["model"]["vocab"][")"]
    with Cluster(tp=1, groups=("a",), etcd=False,
                 router_args=["--chat-template", TOOL_TEMPLATE, "--tool-call-parser", "chatglm3"]) as c:
        r = subprocess.run(["node", "openai_tools.mjs", f"http://127.0.0.1:{c.port}", str(close)], cwd=WORK, capture_output=True,
                           text=True, timeout=240)
        print(r.stdout, r.stderr)
        assert r.returncode == 0
