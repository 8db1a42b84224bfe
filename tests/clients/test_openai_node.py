"""The openai npm client, version pinned in package.json, installed into the build folder on first use."""
import os
import shutil
import subprocess

import pytest

from cluster import ROOT, Cluster

HERE = os.path.dirname(os.path.abspath(__file__))
WORK = os.path.join(os.environ.get("TM_BUILD", os.path.join(ROOT, "build")), "node-clients")


def node_ready():
    if not shutil.which("node") or not shutil.which("npm"):
        return False
    os.makedirs(WORK, exist_ok=True)
    for f in ("package.json", "openai_client.mjs"):
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
