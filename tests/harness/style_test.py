"""The rules of the tree that a compiler does not check: include directions (design, section 3), headers that
stand alone, banned calls, generated files not committed. Run: python3 tests/harness/style_test.py"""
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# folder -> folders it may include, besides itself
ALLOWED = {
    "common": set(),
    "text": {"common"},
    "proto": set(),
    "net": {"common"},
    "parallel": {"common"},
    "engine": {"parallel", "common"},
    "router": {"text", "net", "proto", "common"},
    "worker": {"engine", "parallel", "net", "proto", "common"},
    "cli": {"common", "text", "net", "proto", "parallel", "engine", "worker", "router"},
    "bench": {"common", "engine", "parallel", "text", "net", "proto"},
}
# inside engine: sub-folder -> sub-folders it may include ("" is engine/ itself)
ENGINE = {
    "backend": set(),
    "weights": {"backend"},
    "model": {"backend", "weights"},
    "cache": {"backend"},
    "sample": {"backend"},
    "sched": {"cache", "sample", "backend"},  # the batch it plans; tm_batch is in backend.h
    "quant": {"backend", "weights"},
    "": {"backend", "weights", "model", "cache", "sample", "sched"},
}
BANNED = re.compile(r"(?<![\w.>])(strcpy|strcat|sprintf|vsprintf|strtok|atoi|atol|atof|gets|alloca|localtime|gmtime|asctime|ctime)\s*\(")
SOURCE = re.compile(r"\.(c|h|cu|cuh)$")


def tracked():
    out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode == 0:
        return [f for f in out.stdout.split("\n") if f]
    found = []  # an unpacked tarball
    for base, dirs, files in os.walk(ROOT):
        dirs[:] = [d for d in dirs if not d.startswith((".", "build")) and d != "node_modules"]
        found += [os.path.relpath(os.path.join(base, f), ROOT) for f in files]
    return found


def check_includes(path, text, problems):
    parts = path.split("/")
    top = parts[0]
    if top not in ALLOWED:
        return
    for n, line in enumerate(text.split("\n"), 1):
        m = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if not m:
            continue
        target = m.group(1).split("/")
        if len(target) == 1:
            problems.append(f"{path}:{n}: include by path from the root, not \"{m.group(1)}\"")
        elif target[0] != top and target[0] not in ALLOWED[top]:
            problems.append(f"{path}:{n}: {top} may not include {target[0]}")
        elif top == "engine" and target[0] == "engine":
            mine = parts[1] if len(parts) > 2 else ""
            theirs = target[1] if len(target) > 2 else ""
            kernel = mine == "sched" and theirs == "backend" and m.group(1) != "engine/backend/backend.h"
            if kernel or (mine != theirs and theirs not in ENGINE.get(mine, set())):
                problems.append(f"{path}:{n}: engine/{mine} may not include engine/{theirs or m.group(1)}")


def strip_comments(text):
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', lambda m: " " * 0 + re.sub(r"[^\n]", " ", m.group(0)), text, flags=re.S)


def check_header_alone(path, problems):
    if path.endswith(".cuh") or "/cuda/" in path:
        return
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-fsyntax-only", "-I", ROOT, "-x", "c"]
    gen = os.environ.get("TM_GEN")
    if gen:
        flags += ["-I", gen]
    out = subprocess.run(["cc", *flags, os.path.join(ROOT, path)], capture_output=True, text=True)
    if out.returncode != 0:
        problems.append(f"{path}: does not compile by itself: {out.stderr.strip().splitlines()[0]}")


def main():
    problems = []
    headers = 0
    files = [f for f in tracked() if os.path.isfile(os.path.join(ROOT, f))]
    for path in files:
        if path.startswith(("build/", "build-")) or path.endswith((".pb-c.c", ".pb-c.h", ".o", ".so")):
            problems.append(f"{path}: generated, must not be committed")
        if not SOURCE.search(path):
            continue
        with open(os.path.join(ROOT, path), encoding="utf-8") as f:
            text = f.read()
        check_includes(path, text, problems)
        for n, line in enumerate(strip_comments(text).split("\n"), 1):
            m = BANNED.search(line)
            if m:
                problems.append(f"{path}:{n}: {m.group(1)} is banned")
            if len(line) > 140:
                problems.append(f"{path}:{n}: {len(line)} columns")
        if path.endswith(".h") and path.split("/")[0] in ALLOWED:
            headers += 1
            check_header_alone(path, problems)
    for p in problems:
        print(p)
    print(f"{len(files)} files, {headers} headers, {len(problems)} problems")
    return 1 if problems or headers == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
