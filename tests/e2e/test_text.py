"""turbomesh tokenize and render: the recorded tokenizers and templates through the command line, and bad input."""
import glob
import json
import os
import shutil
import subprocess

import pytest

from cluster import BIN, MODEL, ROOT

SHARED = os.path.join(os.environ.get("TM_SHARED", ""), "testdata")


def run(*args, stdin=""):
    p = subprocess.run([os.path.join(BIN, "turbomesh"), *map(str, args)], input=stdin.encode(), capture_output=True, timeout=120)
    return p.returncode, p.stdout.decode(), p.stderr.decode()


def lines(values):
    return "".join(json.dumps(v) + "\n" for v in values)


def tokenize(model, values, *flags):
    rc, out, err = run("tokenize", model, "--json", *flags, stdin=lines(values))
    assert rc == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_round_trip_of_the_demo_model():
    texts = ["", "Hello, world", "two\nlines", "naïve — 漢字 🙂", "nul \0 byte", "x" * 5000]
    ids = tokenize(MODEL, texts)
    assert tokenize(MODEL, ids, "--decode") == texts
    rc, plain, _ = run("tokenize", MODEL, stdin="Hello, world\n")
    assert rc == 0 and [int(i) for i in plain.split()] == ids[1]
    assert run("tokenize", MODEL, "--decode", stdin=plain)[1] == "Hello, world\n"


@pytest.mark.parametrize("name", ["falcon", "internlm2", "llama2", "llama3.1", "mistral-v3", "qwen", "qwen2.5", "unigram-bytefallback"])
def test_recorded_tokenizers(tmp_path, name):
    folder = os.path.join(SHARED, "tokenizers", name)
    if not os.path.isdir(folder):
        pytest.skip("TM_SHARED has no tokenizers")
    for f in os.listdir(folder):
        shutil.copy(os.path.join(folder, f), tmp_path)
    with open(os.path.join(folder, "cases.json")) as f:
        d = json.load(f)
    if not os.path.exists(tmp_path / "tokenizer_config.json"):
        s = d["settings"]
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"add_bos_token": s.get("add_bos", False), "add_eos_token": s.get("add_eos", False), "legacy": False}))
    cases = d["cases"]
    texts = [c["text"] for c in cases]
    assert tokenize(tmp_path, texts) == [c["ids"] for c in cases]
    assert tokenize(tmp_path, texts, "--special") == [c.get("ids_special", c["ids"]) for c in cases]
    for key, want, flags in (("ids", "decoded", []), ("ids_special", "decoded_skip", ["--skip-special"])):
        some = [c for c in cases if key in c and (want in c or "decoded" in c)]
        got = tokenize(tmp_path, [c[key] for c in some], "--decode", *flags)
        for c, text in zip(some, got):
            right = [c.get(want, c["decoded"])] + [v for k, v in c.items() if k.startswith(want + "_")]
            assert text in right, c["text"][:80]


def test_own_tokenizer_and_template(tmp_path):
    model = os.path.join(ROOT, "tests", "fixtures", "families", "own-llama")
    with open(os.path.join(model, "cases.json")) as f:
        d = json.load(f)
    texts, ids = [c["text"] for c in d["encode"]], [c["ids"] for c in d["encode"]]
    assert tokenize(model, texts) == ids and tokenize(model, ids, "--decode") == texts
    for c in d["render"]:
        (tmp_path / "m.json").write_text(json.dumps(c["messages"]))
        rc, out, err = run("render", model, "--messages", tmp_path / "m.json", "--add-generation-prompt")
        assert rc == 0 and out == c["text"], err


def test_tokenize_refusals():
    for stdin, flags, words in [("5\n", [], "line 1: expected a string, got"), ("\"a\"\n[\n", [], "line 2: not valid JSON"),
                                ("[1, 99999999]\n", ["--decode"], "vocabulary of"), ("[\"a\"]\n", ["--decode"], "token ids"),
                                ("\"a\"\n", ["--decode"], "expected an array")]:
        rc, _, err = run("tokenize", MODEL, "--json", *flags, stdin=stdin)
        assert rc == 2 and words in err and err.count("\n") == 1, err
    assert run("tokenize", "/no/such/model", "--json")[0] == 78
    assert run("tokenize", MODEL, "--nonsense")[0] == 2


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"


def test_render(tmp_path):
    messages, template = tmp_path / "m.json", tmp_path / "t.jinja"
    messages.write_text(json.dumps(MESSAGES))
    template.write_text(TEMPLATE)
    args = ["--messages", messages, "--chat-template", template]
    rc, out, err = run("render", MODEL, *args, "--add-generation-prompt", "--kwargs", '{"mood": "calm"}')
    assert rc == 0 and out == "<system>Be brief.<user>a\nb<assistant>calm", err
    rc, out, _ = run("render", MODEL, *args, "--json")
    assert rc == 0 and json.loads(out) == "<system>Be brief.<user>a\nb"
    rc, ids, _ = run("render", MODEL, *args, "--ids", "--json")
    assert rc == 0 and tokenize(MODEL, [json.loads(ids)], "--decode") == ["<system>Be brief.<user>a\nb"]
    (tmp_path / "request.json").write_text(json.dumps({"model": "x", "messages": MESSAGES[:1]}))
    assert run("render", "--chat-template", template, "--messages", tmp_path / "request.json")[1] == "<system>Be brief."


def test_render_with_tools_as_the_server_does(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": {"name": "f"}, "extra": 1}]))
    (tmp_path / "bad.json").write_text('[{"type": "function", "function": {"name": "a b"}}]')
    (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]}]))
    template = "{{ tools | length }} {{ tools[0].function.name }} {{ messages[1].tool_calls[0].function.arguments.a + 1 }}"
    args = ["render", MODEL, "--chat-template", template, "--messages", tmp_path / "m.json", "--tools"]
    rc, out, err = run(*args, tmp_path / "tools.json")
    assert rc == 0 and out == "1 f 2", err
    rc, _, err = run(*args, tmp_path / "bad.json")
    assert rc == 2 and "tools[0].function.name" in err, err


def test_render_refusals(tmp_path):
    m, bad = tmp_path / "m.json", tmp_path / "bad.json"
    m.write_text(json.dumps(MESSAGES))
    bad.write_text('[{"role": "king", "content": "x"}]')
    template = ["--chat-template", TEMPLATE]
    for args, rc, words in [([*template, "--messages", tmp_path / "none.json"], None, "none.json"), ([*template], 2, "--messages"),
                            ([MODEL, *template, "--messages", bad], 2, "messages[0].role"),
                            ([*template, "--messages", m, "--kwargs", "[]"], 2, "--kwargs"),
                            ([*template, "--messages", m, "--now", "noon"], 2, "--now"), ([*template, "--messages", m, "--ids"], 2, "MODEL"),
                            (["--chat-template", "{% for x in %}", "--messages", m], 78, "chat template")]:
        code, out, err = run("render", *args)
        assert (code == rc if rc is not None else code != 0) and words in err and err.count("\n") == 1 and out == "", (args, code, err)


@pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, "chat_templates")), reason="TM_SHARED has no chat templates")
def test_recorded_templates(tmp_path):
    """Two cases of each template; all of them run in tests/text/jinja_cases_test.c."""
    count = 0
    for path in sorted(glob.glob(os.path.join(SHARED, "chat_templates", "*.cases.json"))):
        with open(path) as f:
            d = json.load(f)
        texts = [c for c in d["cases"] if "text" in c["expect"] and "documents" not in c["input"] and "12345678901234567890" not in json.dumps(c["input"])]
        errors = [c for c in d["cases"] if "error" in c["expect"] and c["expect"]["error"]["kind"] == "raise_exception"]
        for c in texts[:1] + texts[-1:] + errors[:1]:
            i = c["input"]
            (tmp_path / "m.json").write_text(json.dumps(i["messages"]))
            args = ["--chat-template", path.replace(".cases.json", ".jinja"), "--messages", tmp_path / "m.json", "--now", d["now"]]
            args += ["--kwargs", json.dumps({**d["special_tokens"], **i.get("kwargs", {})})]
            if i.get("tools") is not None:
                (tmp_path / "tools.json").write_text(json.dumps(i["tools"]))
                args += ["--tools", tmp_path / "tools.json"]
            args += ["--add-generation-prompt"] * bool(i.get("add_generation_prompt")) + ["--continue-final-message"] * bool(i.get("continue_final_message"))
            rc, out, err = run("render", *args)
            count += 1
            if "text" in c["expect"]:
                assert rc == 0 and out == c["expect"]["text"], (path, c["name"], err)
            else:
                assert rc == 2 and out == "", (path, c["name"])
    print(count, "cases")
    assert count > 140
