"""TurboMind workspaces: converting a model and serving it directly give the same logits to the bit, at every tp of the
files and of the engine. An independent writer in numpy (layouts.py) makes the layouts of three generations, and the
files that `turbomesh convert` writes are compared with its files byte by byte."""
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from cluster import BIN, MODEL, ROOT, SLOW

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import layouts  # noqa: E402

FAMILIES = os.path.join(os.environ.get("TM_SHARED", ""), "testdata", "families")
# What the formats hold, and what is refused with a word of the reason.
DENSE = ["own-llama", "own-qwen2", "own-internlm2", "llama", "codellama", "yi", "deepseek-coder", "mistral", "qwen", "qwen1.5", "qwen2-d64", "qwen2-d128",
         "qwen2.5-yarn", "internlm", "internlm-20b", "internlm2", "internlm2.5", "baichuan-7b", "baichuan2-7b", "chatglm3-32k",
         "glm4-chat"]
YAML_ONLY = ["own-qwen3-moe", "llama3-d128", "llama3.1-rope", "internlm3", "chatglm2", "glm4-hf", "qwen3", "mixtral", "qwen2-moe", "qwen3-moe"]
REFUSED = {"baichuan-13b": "ALiBi", "baichuan2-13b": "ALiBi", "gemma": "norms", "gemma2": "norms", "gemma3": "norms", "falcon-7b": "norms",
           "falcon-40b": "norms", "falcon-rw": "ALiBi", "dbrx": "norms", "deepseek-v2": "latent", "deepseek-v3": "latent", "glm4-0414": "norms behind",
           "deepseek-moe": "shared experts"}


def run(*args, timeout=120):
    p = subprocess.run([os.path.join(BIN, "turbomesh"), *map(str, args)], capture_output=True, text=True, timeout=timeout * SLOW)
    return p.returncode, p.stdout, p.stderr


def family(name):
    path = os.path.join(os.path.join(ROOT, "tests", "fixtures", "families") if name.startswith("own-") else FAMILIES, name)
    if not os.path.isdir(path):
        pytest.skip("TM_SHARED has no families")
    return path


def logits(model, dtype, tp=1):
    """Of one fixed sequence, all positions."""
    with open(os.path.join(MODEL, "eval", "golden.json")) as f:
        ids = [i % 61 + 1 for i in json.load(f)["cases"][0]["prompt_ids"]][:24]
    out = os.path.join(tempfile.gettempdir(), f"tm-workspace-{os.getpid()}.npy")
    rc, _, err = run("score", model, "--ids", ",".join(map(str, ids)), "--logits", out, "--last", len(ids), "--dtype", dtype, "--tp", tp,
                     "--session-len", 128)
    assert rc == 0, err
    x = np.load(out)
    os.remove(out)
    return x


def convert(model, dst, *flags):
    rc, out, err = run("convert", model, "--dst-path", dst, *flags)
    assert rc == 0, err
    return out


def equal(a, b):
    assert a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32)), np.abs(a - b).max()


# bf16 is how the files are stored; in float32 the head of Baichuan2 differs by the rounding of its unit rows.
def dtypes(name):
    return ["bfloat16"] if name == "baichuan2-7b" else ["bfloat16", "float32"]


@pytest.mark.parametrize("name", DENSE + YAML_ONLY)
def test_families(tmp_path, name):
    model = family(name)
    want = {d: logits(model, d) for d in dtypes(name)}
    for fmt in ["yaml"] if name in YAML_ONLY else ["ini", "yaml"]:
        for tp in [1, 2, 4]:
            dst = tmp_path / f"{fmt}{tp}"
            rc, _, err = run("convert", model, "--dst-path", dst, "--tp", tp, "--format", fmt)
            if rc != 0:
                assert tp == 4 and "not divisible by tp 4" in err, err
                continue
            for d, w in want.items():
                if d == "bfloat16" or tp == 2:
                    equal(logits(dst, d), w)


@pytest.mark.parametrize("name", ["own-llama", "own-qwen2", "own-qwen3-moe", "qwen2-d64", "glm4-hf", "qwen3-moe"])
def test_at_two_ranks(tmp_path, name):
    model = family(name)
    want = logits(model, "bfloat16", tp=2)
    for tp in [1, 2]:
        convert(model, tmp_path / f"w{tp}", "--tp", tp)
        equal(logits(tmp_path / f"w{tp}", "bfloat16", tp=2), want)


def test_demo_model_and_cutting_again(tmp_path):
    want = logits(MODEL, "bfloat16")
    out = convert(MODEL, tmp_path / "a", "--tp", 4, "--format", "ini")
    assert "tp            4" in out and "bf16" in out
    equal(logits(tmp_path / "a", "bfloat16"), want)
    convert(tmp_path / "a", tmp_path / "b", "--tp", 2)
    equal(logits(tmp_path / "b", "bfloat16"), want)
    assert logits(tmp_path / "b", "bfloat16", tp=4).shape == want.shape


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, name):
    rc, _, err = run("convert", family(name), "--dst-path", tmp_path / "w")
    assert rc != 0 and REFUSED[name] in err and "does not fit a workspace" in err and err.count("\n") == 1, err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", YAML_ONLY)
def test_what_only_the_later_format_holds(tmp_path, name):
    rc, _, err = run("convert", family(name), "--dst-path", tmp_path / "w", "--format", "ini")
    assert rc != 0 and "config.yaml has" in err, err


@pytest.mark.parametrize("layout", ["v0.1", "v0.7", "v0.9"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("with_config", [True, False])
def test_layouts_of_an_independent_writer(tmp_path, layout, tp, with_config):
    dst = tmp_path / "w"
    layouts.write(MODEL, dst, layout, tp, with_config)
    equal(logits(dst, "bfloat16"), logits(MODEL, "bfloat16"))


@pytest.mark.parametrize("layout,fmt,name", [("v0.1", "ini", None), ("v0.9", "yaml", None), ("v0.1", "ini", "own-qwen2"), ("v0.9", "yaml", "own-qwen2"),
                                             ("v0.9", "yaml", "own-qwen3-moe")])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_files_equal_those_of_an_independent_writer(tmp_path, layout, fmt, name, tp):
    model = family(name) if name else MODEL
    layouts.write(model, tmp_path / "theirs", layout, tp, True)
    convert(model, tmp_path / "ours", "--tp", tp, "--format", fmt)
    a, b = (tmp_path / n / "triton_models" / "weights" for n in ("theirs", "ours"))
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))
    for f in os.listdir(a):
        if not f.startswith("config."):
            assert (a / f).read_bytes() == (b / f).read_bytes(), f


@pytest.mark.parametrize("with_config", [True, False])
def test_padded_widths_and_repeated_heads(tmp_path, with_config):
    """Eight parts of four key heads, and a feed-forward part padded with zeros, as converters write for more ranks."""
    want = logits(MODEL, "bfloat16")
    layouts.write(MODEL, tmp_path / "w", "v0.9", 8, with_config, pad_width=64)
    got = logits(tmp_path / "w", "bfloat16")
    if with_config:
        equal(got, want)  # padding and copies are left aside
    else:
        assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()


def test_widths_that_tp_does_not_divide(tmp_path):
    model = tmp_path / "m"
    shutil.copytree(os.path.join(ROOT, "tests", "fixtures", "families", "own-llama"), model)
    tensors = layouts.load(model)
    for name, x in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = x[:30]
        if "down_proj" in name:
            tensors[name] = np.ascontiguousarray(x[:, :30])
    layouts.save(model / "model.safetensors", tensors)
    (model / "config.json").write_text(edit((model / "config.json").read_text(), '"intermediate_size": 32', '"intermediate_size": 30'))
    want = logits(model, "bfloat16")
    for tp in [2, 4]:
        convert(model, tmp_path / "w", "--tp", tp)
        equal(logits(tmp_path / "w", "bfloat16"), want)
    rc, _, err = run("convert", model, "--dst-path", tmp_path / "w", "--tp", 4, "--format", "ini")
    assert rc != 0 and "intermediate_size 30 is not divisible by tp 4" in err


def edit(text, old, new):
    assert old in text
    return text.replace(old, new)


W = "triton_models/weights/"
BAD = {
    "missing": (lambda d: os.remove(d / W / "layers.1.attention.wo.1.weight"), ["layers.1.attention.wo.1.weight is missing"]),
    "truncated": (lambda d: os.truncate(d / W / "layers.0.feed_forward.w1.0.weight", 1000), ["w1.0.weight has 1000 bytes, expected 786432"]),
    "extended": (lambda d: (d / W / "norm.weight").write_bytes(b"\0" * 1026), ["norm.weight has 1026 bytes, expected 1024"]),
    "extra": (lambda d: shutil.copy(d / W / "norm.weight", d / W / "layers.9.ffn_norm.weight"), ["layers.9.ffn_norm.weight", "is not a file of the model"]),
    "wrong tp": (lambda d: (d / W / "config.ini").write_text(edit((d / W / "config.ini").read_text(), "tensor_para_size = 2", "tensor_para_size = 4")),
                 ["2 parts are there, config.ini says 4"]),
    "int4": (lambda d: (d / W / "config.ini").write_text(edit((d / W / "config.ini").read_text(), "weight_type = bf16", "weight_type = int4")),
             ["config.ini", "weight_type 'int4'", "quantised"]),
    "no layers": (lambda d: (d / W / "config.ini").write_text(edit((d / W / "config.ini").read_text(), "num_layer = 5\n", "")),
                  ["config.ini", "num_layer", "missing"]),
    "other size": (lambda d: (d / W / "config.ini").write_text(edit((d / W / "config.ini").read_text(), "num_layer = 5", "num_layer = 6")),
                   ["num_layer is 6", "config.json", "says 5"]),
    "not ini": (lambda d: (d / W / "config.ini").write_text("[llama]\nnonsense\n"), ["config.ini: line 2"]),
    "no config": (lambda d: os.remove(d / W / "config.ini"), ["neither config.yaml nor config.ini"]),
    "no weights": (lambda d: shutil.rmtree(d / W), ["triton_models/weights"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    d = tmp_path_factory.mktemp("ws") / "w"
    convert(MODEL, d, "--tp", 2, "--format", "ini")
    return d


@pytest.mark.parametrize("name", BAD)
def test_bad_workspaces_are_refused_in_one_line(tmp_path, good, name):
    change, words = BAD[name]
    d = tmp_path / "w"
    shutil.copytree(good, d)
    change(d)
    rc, _, err = run("score", d, "--ids", "1,2,3")
    assert rc == 78 and all(w in err for w in words) and err.count("\n") == 1, err


def test_destination(tmp_path, good):
    """Only a workspace or an empty folder is replaced; a failure leaves what was there."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    rc, _, err = run("convert", MODEL, "--dst-path", mine)
    assert rc == 2 and "is not a workspace" in err and (mine / "thesis.txt").exists()
    ws = tmp_path / "ws"
    shutil.copytree(good, ws)
    rc, _, err = run("convert", MODEL, "--dst-path", ws, "--tp", 3)
    assert rc != 0 and "not divisible by tp 3" in err and sorted(os.listdir(tmp_path)) == ["mine", "ws"]
    assert (ws / W / "layers.0.attention.w_qkv.1.weight").exists()
    convert(MODEL, ws)
    assert not (ws / W / "config.ini").exists() and (ws / W / "config.yaml").exists()
    assert run("convert", ws, "--dst-path", ws)[0] == 2
    assert run("convert", "/no/such", "--dst-path", tmp_path / "n")[0] == 78


def test_old_command_line(tmp_path):
    """MODEL_NAME MODEL_PATH, underscores, names printed; the tokenizer from elsewhere."""
    rc, out, err = run("convert", "internlm-chat", MODEL, "--dst_path", tmp_path / "w", "--model_format", "hf", "--tp", 1)
    assert rc == 0 and "internlm-chat" in out and MODEL in out, err
    assert "model_name: 'internlm-chat'" in (tmp_path / "w" / W / "config.yaml").read_text()
    rc, _, err = run("convert", "internlm-chta", MODEL, "--dst-path", tmp_path / "x")
    assert rc == 2 and "'internlm-chta'" in err and "internlm-chat," in err
    for flags in (["--model-format", "awq"], ["--quant-path", "x"], ["--model-format", "llama"]):
        rc, _, err = run("convert", MODEL, "--dst-path", tmp_path / "x", *flags)
        assert rc == 78 or rc == 1 and err.count("\n") == 1, (rc, err)


def test_template_by_the_workspace_s_name(tmp_path):
    """Old models have no template of their own: the workspace's config names one of the built-in ones."""
    model = tmp_path / "m"
    shutil.copytree(os.path.join(ROOT, "tests", "fixtures", "families", "own-llama"), model)
    c = json.loads((model / "tokenizer_config.json").read_text())
    del c["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(c))
    (tmp_path / "messages.json").write_text('[{"role": "user", "content": "hi"}]')
    for fmt in ["ini", "yaml"]:
        convert(model, tmp_path / "w", "--model-name", "vicuna", "--format", fmt)
        rc, out, err = run("render", tmp_path / "w", "--messages", tmp_path / "messages.json", "--add-generation-prompt")
        assert rc == 0 and "USER: hi ASSISTANT:" in out, err
        convert(model, tmp_path / "plain", "--format", fmt)
        assert run("render", tmp_path / "plain", "--messages", tmp_path / "messages.json")[0] != 0


def test_every_command_reads_a_workspace(good):
    rc, out, err = run("inspect", good, "--json")
    assert rc == 0 and json.loads(out)["problem"] is None, err
    rc, out, err = run("chat", good, "--prompt", "Once upon a time", "--max-tokens", 8, "--temperature", 0)
    rc2, out2, _ = run("chat", MODEL, "--prompt", "Once upon a time", "--max-tokens", 8, "--temperature", 0)
    assert rc == 0 and rc2 == 0 and out == out2, err
    p = subprocess.run([os.path.join(BIN, "turbomesh"), "tokenize", str(good), "--json"], input='"Hello"\n', capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.startswith("[")
